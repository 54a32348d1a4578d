"""Token windows: what calibration and perplexity read."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bipdeploy.data import chat
from bipdeploy.data.sampling import PER_TOKEN
from bipdeploy.data.text import Text
from bipdeploy.errors import InputError
from bipdeploy.model import loading, sources
from bipdeploy.model.checkpoint import read_config

if TYPE_CHECKING:
    import torch

# Texts of at most so many characters are tokenised whole, though only their beginning is asked for.
WHOLE = 2**21
MARGIN = 4096  # characters behind a token that are read before it is taken for settled
_WORDS = 16  # words in the margin that settle it


def tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; code of its own runs where the recipe trusts the folder.
    Raises InputError where there is none that can be loaded."""
    return loading.load_tokenizer(folder, trust_remote_code=sources.runs_code(folder))


def token_ids(text: Text, folder: Path) -> torch.Tensor:
    """All tokens of a text as one sequence [tokens], documents joined by blank lines.

    The tokenizer adds its own special tokens once, at the very beginning, as the published
    perplexity protocols do. Conversations follow one another as the chat template writes them, and
    nothing is added. Texts that were seen last are not read again.
    """
    files = [path for pattern in ("*token*", "*.model", "*chat_template*")
             for path in sorted(folder.glob(pattern))]
    return _token_ids(text, folder, tuple((p, p.stat().st_mtime_ns) for p in files))


@lru_cache(maxsize=4)
def _token_ids(text: Text, folder: Path, _: tuple[tuple[Path, int], ...]) -> torch.Tensor:
    import torch

    tokens = tokenizer(folder)
    if text.conversations:
        found = [i for ids in _encoded(written(text, tokens), tokens) for i in ids]
    else:
        # verbose=False: a text longer than the model's maximum is expected; windows cut it.
        found = tokens(text.joined(), verbose=False)["input_ids"]
    return require_known(torch.tensor(found), folder)


def written(text: Text, tokens: Any) -> list[str]:
    """A text's conversations as a tokenizer's chat template writes them.

    Raises InputError where there is no template, or it refuses one.
    """
    try:
        return [chat.written(messages, tokens) for messages in text.conversations]
    except InputError as error:
        raise InputError(f"data: {text.name} {error}") from error


def _encoded(said: list[str], tokens: Any) -> list[list[int]]:
    """Token ids of each of some written conversations, which hold their special tokens."""
    return tokens(said, add_special_tokens=False, verbose=False)["input_ids"]


class Leading(NamedTuple):
    """ids: the first tokens of a text [tokens]. tokens_per_byte: of all of it where `whole`, else
    of the beginning that was tokenised."""

    ids: torch.Tensor
    tokens_per_byte: float
    whole: bool


def leading(text: Text, folder: Path, limit: int | None) -> Leading:
    """The first `limit` tokens of a text (None: all), as `token_ids` has them, bit for bit.

    Of a text of more than `WHOLE` characters only the beginning is tokenised, where the tokenizer's
    own rules say that the rest cannot change these tokens (see `_settled`).
    """
    size = sum(text.sizes())
    if limit is not None and size > WHOLE:
        tokens, beginning = tokenizer(folder), PER_TOKEN * limit + 2 * MARGIN
        while 2 * beginning < size:
            found = (_first_said if text.conversations else _first_of)(
                text, tokens, limit, beginning)
            if found is not None:
                return found._replace(ids=require_known(found.ids, folder))
            beginning *= 4
    ids = token_ids(text, folder)
    whole = "".join(written(text, tokenizer(folder))) if text.conversations else text.joined()
    return Leading(ids[:limit], len(ids) / len(whole.encode()), True)


def _first_said(text: Text, tokens: Any, limit: int, beginning: int) -> Leading | None:
    """The first tokens of conversations, each of which is encoded on its own."""
    import torch

    count = bisect_left(list(accumulate(text.sizes())), beginning) + 1
    said = written(text.take(range(count)), tokens)
    ids = [i for own in _encoded(said, tokens) for i in own]
    if len(ids) < limit:
        return None
    return Leading(torch.tensor(ids[:limit]), len(ids) / len("".join(said).encode()), False)


def _first_of(text: Text, tokens: Any, limit: int, beginning: int) -> Leading | None:
    """The first tokens of running text, where those of its beginning are certain to be them."""
    import torch

    start = text.joined()[:beginning]
    if not _settled(start[-MARGIN:], tokens):
        return None
    found = tokens(start, verbose=False)
    last = found.token_to_chars(limit - 1) if len(found["input_ids"]) >= limit else None
    if last is None or last.end > len(start) - MARGIN:
        return None
    return Leading(torch.tensor(found["input_ids"][:limit]),
                   limit / len(start[:last.end].encode()), False)


def _settled(margin: str, tokens: Any) -> bool:
    """Whether tokens before `margin` are the same whatever follows it.

    So they are where the tokenizer splits text into words, each of which is encoded on its own, and
    `margin` holds several: where a word ends is decided by what is near it. Tokenizers that do not
    split (Llama 2's) still cannot join letters with a blank that follows them where none of their
    tokens does, so a blank parts the text as well. Of all others nothing is known.
    """
    if not tokens.is_fast:
        return False
    backend = tokens.backend_tokenizer
    margin = backend.normalizer.normalize_str(margin) if backend.normalizer else margin
    if backend.pre_tokenizer:
        words = len(backend.pre_tokenizer.pre_tokenize_str(margin))
        if words >= _WORDS:
            return True
    crossing = re.compile("[^\u2581]\u2581")
    return (len(crossing.findall(margin)) >= _WORDS
            and not any(crossing.search(token) for token in tokens.get_vocab()))


def require_known(ids: torch.Tensor, folder: Path) -> torch.Tensor:
    """The ids, all of which the folder's model has embeddings for, where there is one. Raises
    InputError naming an id that it has none for."""
    rows = read_config(folder).get("vocab_size") if (folder / "config.json").is_file() else None
    if isinstance(rows, int) and ids.numel() and (highest := int(ids.max())) >= rows:
        said = tokenizer(folder).convert_ids_to_tokens(highest)
        raise InputError(f"{folder}: the text holds token {highest} ({said!r}), and the model's "
                         f"embeddings have {rows} rows; take that token out of the tokenizer or "
                         "of the text, or resize the embeddings (resize_token_embeddings)")
    return ids


def draw(ids: torch.Tensor, samples: int, tokens: int, seed: int,
         name: str = "the text") -> torch.Tensor:
    """`samples` distinct, non-overlapping windows of a token sequence, drawn by `seed`.

    Returns [samples, tokens], in the order of the text. Raises InputError where the text, which is
    called by its `name`, is too short.
    """
    import torch

    available = len(ids) // tokens
    if available < samples:
        raise InputError(f"calibration.samples: {name} has {len(ids)} tokens, which is "
                         f"{available} windows of {tokens}, and {samples} are asked for; lower "
                         "samples or tokens (or tokens_per_channel, where samples is left out), "
                         "or give a longer text")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:samples].sort().values
    return ids[:available * tokens].view(available, tokens)[chosen]


def overlap(seen: Iterable[Text], test: Text, words: int = 13) -> float:
    """Share of the test text's `words`-grams that one of the texts that were `seen` also holds.

    Thirteen words is the length that contamination studies use (Brown et al. 2020, appendix C).
    """
    asked = list(_grams(test, words))
    missing = set(asked)
    for text in seen:
        for gram in _grams(text, words):
            missing.discard(gram)
    return sum(gram not in missing for gram in asked) / len(asked) if asked else 0.0


def _grams(text: Text, words: int) -> Iterator[int]:
    """Hashes of all words in a row, across documents too."""
    parts: list[str] = []
    for document in text.documents:
        parts += document.lower().split()
        yield from (hash(tuple(parts[i:i + words])) for i in range(len(parts) - words + 1))
        del parts[:max(0, len(parts) - words + 1)]
