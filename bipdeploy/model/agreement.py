"""Whether a model's parts agree: its head with its embeddings, its token ids with its vocabulary.

What does not is found late otherwise, or never: in an index error of an evaluation, or in a model
that transformers reads as another one. No torch but to compare a tied head.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bipdeploy.errors import InputError
from bipdeploy.model.checkpoint import Checkpoint

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def require(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose weights are not what its config says, or whose parts do not agree.

    Reads headers, the tokenizer's vocabulary and, of a head beside tied embeddings, both. Raises
    InputError with one line.
    """
    checkpoint.verify()
    _require_one_head(checkpoint)
    rows, folder = checkpoint.architecture.vocabulary, checkpoint.folder
    for name, token in _stated(folder, checkpoint.config):
        # -1, for none, is how older configurations say it.
        if not -1 <= token < rows:
            raise InputError(f"{folder}/config.json: {name}: {token} is beyond the vocabulary, "
                             f"whose embeddings have {rows} rows; correct it, or resize the "
                             "embeddings")
    for token, text in _tokens(folder):
        if token >= rows:
            raise InputError(f"{folder}/tokenizer.json: token {token} ({text!r}) is beyond the "
                             f"vocabulary, whose embeddings have {rows} rows; take this model's "
                             "own tokenizer, or resize the embeddings (resize_token_embeddings)")


def _require_one_head(checkpoint: Checkpoint) -> None:
    if not (checkpoint.architecture.tied and HEAD in checkpoint.entries):
        return
    head, table = checkpoint.entry(HEAD), checkpoint.entry(EMBEDDINGS)
    if head.shape == table.shape:
        import torch

        if torch.equal(head.read(), table.read()):
            return
    raise InputError(f"{checkpoint.folder}: config.json ties the head to the embeddings, and "
                     f"{HEAD} is not equal to {EMBEDDINGS}; set tie_word_embeddings to false in "
                     f"config.json, or take {HEAD} out")


def _stated(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every token id that the config states: the key, and the id. (Those of generation_config.json
    are dropped where they are none: nothing is looked up by them.)"""
    for name in _IDS:
        value = config.get(name)
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and not isinstance(token, bool):
                yield name, token
            elif token is not None:
                raise InputError(f"{folder}/config.json: {name}: {token!r} is no token id; write a "
                                 "whole number")


def _tokens(folder: Path) -> Iterator[tuple[int, str]]:
    """Ids and texts of a `tokenizer.json`'s own vocabulary, where there is one that can be read.
    Tokens that were added to it may lie beyond the model's rows: few texts hold one, and what they
    are cut into is looked at then."""
    stated = _json(folder / "tokenizer.json")
    model = stated.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from ((token, text) for text, token in vocabulary.items() if isinstance(token, int))
    elif isinstance(vocabulary, list):  # Unigram: pairs of text and score
        yield from enumerate(str(pair[0]) for pair in vocabulary if isinstance(pair, list) and pair)


def _json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where it cannot be read, which its reader says."""
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stated if isinstance(stated, dict) else {}
