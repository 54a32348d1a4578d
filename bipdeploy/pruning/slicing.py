"""Cutting a block's tensors down to the groups that stay. Pure functions on tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bipdeploy.model.families import Architecture
from bipdeploy.pruning.kept import Kept


def slice_block(tensors: Mapping[str, torch.Tensor], arch: Architecture, block: int,
                kept: Kept) -> dict[str, torch.Tensor]:
    """The tensors of a block with only the kept KV groups, query heads and channels.

    A KV group leaves with its query heads: rows of q, k and v (and their biases), columns of o. A
    query head that leaves alone takes rows of q and columns of o.
    A channel leaves as a row of gate and up and a column of down. Where nothing of a part is
    kept, all its tensors go. Names, types and the device are unchanged.
    """
    family, widths = arch.family, arch.blocks[block]
    device = next(iter(tensors.values())).device if tensors else None
    kv_rows = expand(kept.groups, arch.head_dim).to(device)
    query_rows = expand(kept.query_heads(widths.group), arch.head_dim).to(device)
    channels = torch.tensor(kept.channels, dtype=torch.long, device=device)
    sliced = {}
    for name, tensor in tensors.items():
        if _removed(name, kept):
            continue
        if name in family.query_rows:
            tensor = tensor.index_select(0, query_rows)
        elif name in family.kv_rows:
            tensor = tensor.index_select(0, kv_rows)
        elif name in family.query_columns:
            tensor = tensor.index_select(1, query_rows)
        elif name in family.ffn_rows:
            tensor = tensor.index_select(0, channels)
        elif name in family.ffn_columns:
            tensor = tensor.index_select(1, channels)
        sliced[name] = tensor
    return sliced


def scale_columns(tensors: Mapping[str, torch.Tensor], arch: Architecture,
                  columns: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A block's tensors with the columns of o_proj multiplied by `columns["heads"]` [H*e] and those
    of down_proj by `columns["ffn"]` [F], where these are given; rounded to the types they have."""
    scaled, family = dict(tensors), arch.family
    for part, names in (("heads", family.query_columns), ("ffn", family.ffn_columns)):
        for name in names if part in columns else ():
            weight = tensors[name]
            scaled[name] = (weight.double() * columns[part].to(weight.device)).to(weight.dtype)
    return scaled


def add_biases(tensors: Mapping[str, torch.Tensor], arch: Architecture,
               added: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A block's tensors with `added` [D] on the biases of o_proj and down_proj, by tensor name.

    Every bias that `arch` has and the block lacks is written: what nothing is added to is zero.
    """
    biased = dict(tensors)
    for part, present in (("self_attn.q_proj", arch.qkv_bias), ("self_attn.k_proj", arch.qkv_bias),
                          ("self_attn.v_proj", arch.qkv_bias),
                          ("self_attn.o_proj", arch.output_bias),
                          ("mlp.gate_proj", arch.ffn_bias), ("mlp.up_proj", arch.ffn_bias),
                          ("mlp.down_proj", arch.down_bias)):
        weight, name = tensors.get(f"{part}.weight"), f"{part}.bias"
        if weight is None or not present:
            continue
        bias = tensors.get(name, weight.new_zeros(len(weight)))
        if name in added:
            bias = (bias.double() + added[name].cpu()).to(weight.dtype)
        biased[name] = bias
    return biased


def mask_block(tensors: Mapping[str, torch.Tensor], arch: Architecture, block: int,
               kept: Kept) -> dict[str, torch.Tensor]:
    """The same choice at full width: columns of o and down of what leaves are zero.

    The definition that `slice_block` must agree with: removing a head is zeroing what it adds.
    Where nothing of a part is kept, its output bias is zero too: the whole part adds nothing.
    """
    family, widths = arch.family, arch.blocks[block]
    masked = {name: tensor.clone() for name, tensor in tensors.items()}
    for names, indices in ((family.query_columns,
                            expand(kept.query_heads(widths.group), arch.head_dim)),
                           (family.ffn_columns, torch.tensor(kept.channels, dtype=torch.long))):
        for name in names:
            gone = torch.ones(masked[name].shape[1], dtype=torch.bool)
            gone[indices] = False
            masked[name][:, gone] = 0
            bias = f"{name.removesuffix('weight')}bias"
            if gone.all() and bias in masked:
                masked[bias].zero_()
    return masked


def expand(groups: tuple[int, ...], width: int) -> torch.Tensor:
    """Row indices of whole groups of `width` rows."""
    starts = torch.tensor(groups, dtype=torch.long)[:, None] * width
    return (starts + torch.arange(width)).flatten()


def _removed(name: str, kept: Kept) -> bool:
    attention = name.startswith(("self_attn.", "input_layernorm."))
    ffn = name.startswith(("mlp.", "post_attention_layernorm."))
    return (attention and not kept.groups) or (ffn and not kept.channels)
