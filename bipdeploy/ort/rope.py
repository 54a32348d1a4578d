"""Rotary position embeddings as two tables, taken from the model's own rotary module."""

from __future__ import annotations

from typing import Any

import torch

from bipdeploy.errors import InputError
from bipdeploy.model import loading
from bipdeploy.model.families import Family


def check(config: Any, positions: int) -> None:
    """Raise InputError where the rotation depends on more than the position, so that no table can
    hold it: "longrope" takes other frequencies for all tokens once a text is long."""
    rope = config.rope_parameters
    short = rope.get("original_max_position_embeddings") or positions
    if rope["rope_type"] == "longrope" and positions > short:
        raise InputError(f"rope_type longrope changes its frequencies beyond {short} tokens, and "
                         "an ONNX graph has one table of them; lower max_position_embeddings in "
                         f"config.json from {positions} to {short}")


def tables(family: Family, config: Any, positions: int, dtype: torch.dtype
           ) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [positions, head_dim / 2], with every scaling of the configuration in them."""
    rotary = getattr(loading.family_module(family), f"{family.class_prefix}RotaryEmbedding")(config)
    cos, sin = rotary(torch.zeros(1, dtype=dtype), torch.arange(positions)[None])
    half = cos.shape[-1] // 2  # the second half repeats the first
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
