"""The tokenizer that a GGUF file describes, as one that transformers loads.

A GGUF file holds a vocabulary, merges or scores, and llama.cpp's name of a way to cut text. What
the names stand for is written down here: transformers cuts text under most of them as GPT-2 does,
which gives other tokens without an error. A name that is not here is refused. All that are here
give llama.cpp's own tokens (each was compared on 108 texts: prose, code, many languages).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bipdeploy.errors import InputError, did_you_mean
from bipdeploy.model.loading import load_tokenizer

# `tokenizer.ggml.token_type`
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
           r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
           r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


@dataclass(frozen=True)
class Cut:
    """A byte-level BPE's way to cut text into words. `regex`: what a word is; `digits`: every digit
    is cut off first; `whole`: a word that the vocabulary has is not merged; `nfc`: characters are
    composed first; `bos`: a text begins with BOS unless the file says otherwise."""

    regex: str
    digits: bool = False
    whole: bool = False
    nfc: bool = False
    bos: bool = False


CUTS = {
    "gpt-2": Cut(_GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), Cut(_GPT2, digits=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), Cut(_LLAMA3, whole=True, bos=True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), Cut(_QWEN2, nfc=True)),
    "tekken": Cut(_TEKKEN, whole=True, bos=True),
}


# Text on which ways to cut differ: case, digits, blanks, marks, characters that compose.
PROBE = "It's 12345 DON'T f(x)==2,  e\u0301 naïve\u00a0你好 😀\r\n\n\t\t x1 \n 7  9"


def build(metadata: Mapping[str, Any], path: Path, longest: int) -> Any:
    """The tokenizer of a GGUF file's `metadata`, ready to be saved; `path` is the file's, for
    messages, and `longest` the longest text in tokens.

    Raises InputError where the file has none, or one that is not known here.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    kind, tokens = value("model"), value("tokens")
    if not tokens or kind not in ("gpt2", "llama"):
        raise InputError(f"{path}: its tokenizer is {kind!r}, and only those of the kinds gpt2 "
                         "(byte-level BPE) and llama (SentencePiece) are read; give the model's "
                         "original checkpoint")
    if len(set(tokens)) < len(tokens):
        twice = next(t for i, t in enumerate(tokens) if t in tokens[:i])
        raise InputError(f"{path}: its vocabulary holds {twice!r} twice; give the model's original "
                         "checkpoint")
    backend, bos = _sentencepiece(value, path) if kind == "llama" else _byte_level(value, path)
    types = value("token_type") or ()
    backend.add_tokens([
        AddedToken(token, special=type_ != USER_DEFINED, normalized=False)
        for token, type_ in zip(tokens, types, strict=False)
        if type_ in (UNKNOWN, CONTROL, USER_DEFINED)])

    defaults = {"bos": 1, "eos": 2, "unknown": 0} if kind == "llama" else {}
    ids = {key: value(f"{key}_token_id", defaults.get(key))
           for key in ("bos", "eos", "unknown", "padding")}
    beyond = [f"{key}_token_id {i}" for key, i in ids.items() if i and i >= len(tokens)]
    if beyond:
        raise InputError(f"{path}: its {beyond[0]} is beyond its {len(tokens)} tokens; the file is "
                         "damaged")
    special = {key: None if i is None else tokens[i] for key, i in ids.items()}
    _frame(backend, tokens, ids["bos"] if value("add_bos_token", bos) else None,
           ids["eos"] if value("add_eos_token", False) else None)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=longest, clean_up_tokenization_spaces=False,
        bos_token=special["bos"], eos_token=special["eos"], unk_token=special["unknown"],
        pad_token=special["padding"])
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def verify(built: Any, folder: Path, path: Path) -> None:
    """Whether transformers loads from `folder` the tokenizer that was saved there: for some types
    of models it takes the vocabulary alone, and its own way to cut text.

    Raises InputError where it does not.
    """
    loaded = load_tokenizer(folder)
    if loaded(PROBE)["input_ids"] != built(PROBE)["input_ids"]:
        raise InputError(f"{path}: transformers cuts text for a model of this type in its own way, "
                         "which is not that of the file's tokenizer; give the model's original "
                         "checkpoint")


def _byte_level(value: Any, path: Path) -> tuple[Any, bool]:
    """A byte-level BPE, and whether its texts begin with BOS."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    cut = CUTS.get(str(value("pre")))
    if cut is None:
        raise InputError(f"{path}: its tokenizer cuts text as {value('pre')!r} does, which is not "
                         f"known here{did_you_mean(str(value('pre')), CUTS)}; give the model's "
                         "original checkpoint")
    vocabulary = {token: index for index, token in enumerate(value("tokens"))}
    merges = [tuple(merge.split(" ", 1)) for merge in value("merges") or ()]
    try:
        backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut.whole))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path}: its vocabulary and its merges do not fit together ({error}); "
                         "the file is damaged") from error
    if cut.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        *([pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []),
        pre_tokenizers.Split(Regex(cut.regex), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend, cut.bos


def _sentencepiece(value: Any, path: Path) -> tuple[Any, bool]:
    """SentencePiece's BPE: two pieces merge where both and their sum are in the vocabulary, the
    sum of the highest score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, scores = value("tokens"), value("scores")
    if not scores or len(scores) != len(tokens):
        raise InputError(f"{path}: its tokenizer has no score for each token; the file is damaged")
    ranks = {token: index for index, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        found = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += [(-score, index, pair) for index, pair in enumerate(
            sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])))]
    merges.sort(key=lambda merge: merge[0])  # stable: as they stand in the vocabulary
    unknown = tokens[value("unknown_token_id", 0)]
    backend = Tokenizer(models.BPE(ranks, [pair for _, _, pair in merges], unk_token=unknown,
                                   fuse_unk=True, byte_fallback=True))
    prefix = bool(value("add_space_prefix", True))
    backend.normalizer = normalizers.Sequence([
        *([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return backend, True


def _frame(backend: Any, tokens: list[str], bos: int | None, eos: int | None) -> None:
    """Let every text begin with BOS and end with EOS, where they are given."""
    from tokenizers import processors

    frame = {tokens[i]: i for i in (bos, eos) if i is not None}
    before = [] if bos is None else [tokens[bos]]
    after = [] if eos is None else [tokens[eos]]
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{t}:1" for t in before), "$B:1",
              *(f"{t}:1" for t in after)],
        special_tokens=list(frame.items()))
