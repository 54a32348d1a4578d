"""Token windows: what calibration and perplexity read."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bipdeploy.data.text import Text
from bipdeploy.errors import InputError

if TYPE_CHECKING:
    import torch


def tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises InputError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} has no tokenizer that can be loaded: "
                         f"{str(error).splitlines()[0]}") from error


def token_ids(text: Text, folder: Path) -> torch.Tensor:
    """All tokens of a text as one sequence [tokens], documents joined by blank lines.

    The tokenizer adds its own special tokens once, at the very beginning, as the published
    perplexity protocols do. Texts that were seen last are not read again.
    """
    files = sorted(folder.glob("*token*")) + sorted(folder.glob("*.model"))
    return _token_ids(text, folder, tuple((p, p.stat().st_mtime_ns) for p in files))


@lru_cache(maxsize=4)
def _token_ids(text: Text, folder: Path, _: tuple[tuple[Path, int], ...]) -> torch.Tensor:
    import torch

    # verbose=False: a text longer than the model's maximum is expected here; windows cut it.
    return torch.tensor(tokenizer(folder)(text.joined(), verbose=False)["input_ids"])


def draw(ids: torch.Tensor, samples: int, tokens: int, seed: int) -> torch.Tensor:
    """`samples` distinct, non-overlapping windows of a token sequence, drawn by `seed`.

    Returns [samples, tokens], in the order of the text. Raises InputError where the text is
    too short.
    """
    import torch

    available = len(ids) // tokens
    if available < samples:
        raise InputError(f"calibration.samples: the text has {len(ids)} tokens, which is "
                         f"{available} windows of {tokens}, and {samples} are asked for; lower "
                         "samples or tokens, or give a longer text")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:samples].sort().values
    return ids[:available * tokens].view(available, tokens)[chosen]


def overlap(calibration: Text, test: Text, words: int = 13) -> float:
    """Share of the test text's `words`-grams that the calibration text also holds.

    Thirteen words is the length that contamination studies use (Brown et al. 2020, appendix C).
    """
    seen = set(_grams(calibration.joined(), words))
    grams = list(_grams(test.joined(), words))
    return sum(g in seen for g in grams) / len(grams) if grams else 0.0


def _grams(text: str, words: int) -> Any:
    parts = text.lower().split()
    return (hash(tuple(parts[i:i + words])) for i in range(0, len(parts) - words + 1))
