"""The exceptions that reach a user, each with the exit code that the command line gives it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

PASSED, STAGE_FAILED, BAD_INPUT, GATE_FAILED = 0, 1, 2, 3


class BipdeployError(Exception):
    """Base of all errors that are shown as one line. `exit_code` is the process's."""

    exit_code = STAGE_FAILED


class StageError(BipdeployError):
    """A stage could not finish: the machine's fault (disk, memory), not the input's."""


class InputError(BipdeployError):
    """Something the user gave is wrong; the message names the field, the value and the fix."""

    exit_code = BAD_INPUT


class RecipeError(InputError):
    """One or more faults of a recipe, reported together. `faults` holds a line for each."""

    def __init__(self, source: str, faults: list[str]):
        self.faults = faults
        count = f"{len(faults)} fault" + ("s" if len(faults) > 1 else "")
        super().__init__("\n".join([f"{source}: {count}", *(f"  {fault}" for fault in faults)]))


class GateError(BipdeployError):
    """A gate of the recipe was not met."""

    exit_code = GATE_FAILED


def says_no_memory(text: str) -> bool:
    """Whether a message is that of memory that ran out: PyTorch raises RuntimeError for a CPU
    without memory, and another process leaves nothing but its words."""
    return any(words in text.lower() for words in (
        "out of memory", "can't allocate memory", "not enough memory"))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' where a known word is close to `word`; else the known words."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(known)})" if known else ""
