"""The multiple-choice tasks that zero-shot accuracy is measured on, by name.

A task is one of lm-eval's, built in, or defined by YAML files in a folder of the user's. What is
looked at here is the names alone; `measuring/tasks.py` finds the tasks themselves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bipdeploy.errors import did_you_mean

# The tasks of LLM-Pruner's table.
GROUPS: dict[str, tuple[str, ...]] = {"llm_bip_7": (
    "boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")}
BUILTIN = ("builtin:pydocs_choice",)
KNOWN = (*GROUPS["llm_bip_7"], *GROUPS, *BUILTIN)

_NAME = re.compile(r"^task:[ \t]*[\"']?([\w.-]+)", re.MULTILINE)


def fault(spec: str) -> str | None:
    """What is wrong with a name in a recipe; None where nothing is, as far as files here tell."""
    if spec.startswith("builtin:"):
        return None if spec in BUILTIN else f"no built-in task {spec!r}{did_you_mean(spec, KNOWN)}"
    if not is_path(spec):
        return None
    path = Path(spec).expanduser()
    if not path.exists():
        return f"there is no file or folder {spec!r}; give a YAML file or a folder of them"
    return None if local(spec) else (f"{spec!r} defines no task; a .yaml file in it has to say "
                                      "`task: NAME`")


def names(specs: Sequence[str]) -> list[str]:
    """lm-eval's names of the tasks that a recipe lists, each once; groups in full."""
    found: dict[str, None] = {}
    for spec in specs:
        if spec in GROUPS:
            found |= dict.fromkeys(GROUPS[spec])
        elif spec in BUILTIN:
            found[spec.removeprefix("builtin:")] = None
        elif is_path(spec):
            found |= dict.fromkeys(local(spec))
        else:
            found[spec] = None
    return list(found)


def is_path(spec: str) -> bool:
    """Whether a task's name is that of a file or a folder."""
    return "/" in spec or spec.startswith(("~", ".")) or spec.endswith(".yaml")


def local(spec: str) -> dict[str, Path]:
    """The tasks that a file or the files of a folder define, by lm-eval's names."""
    path = Path(spec).expanduser()
    return scan([path] if path.is_file() else sorted(path.rglob("*.yaml")))


def scan(files: Sequence[Path]) -> dict[str, Path]:
    """The tasks that files define, by name."""
    found: dict[str, Path] = {}
    for path in files:
        if match := _NAME.search(path.read_text(encoding="utf-8", errors="replace")):
            found.setdefault(match[1], path.resolve())
    return found
