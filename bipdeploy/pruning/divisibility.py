"""What widths must divide by: the GPUs of tensor parallelism, the groups of quantised weights.

vLLM splits a block over n GPUs by query heads, by KV heads (fewer than n are copied to several
GPUs) and by FFN channels. A part that was removed is always fine. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bipdeploy.errors import InputError
from bipdeploy.model.families import Architecture, BlockWidths, Heads

_USUAL = (1, 2, 4, 8, 16)


def faults(widths: Sequence[BlockWidths], parallel: int) -> list[str]:
    """What vLLM cannot split over `parallel` GPUs: a line for each, as `block 3: 7 query heads`."""
    return [f"block {i}: {fault}" for i, w in enumerate(widths) for fault in _faults(w, parallel)]


def _faults(w: BlockWidths, parallel: int) -> Iterator[str]:
    if w.heads % parallel:
        yield counted(w.heads, "query head")
    if w.kv_heads % parallel and (w.kv_heads > parallel or parallel % w.kv_heads):
        yield counted(w.kv_heads, "KV head")
    if w.intermediate % parallel:
        yield counted(w.intermediate, "channel")


def head_choices(dense: BlockWidths, parallel: int, leaving: str = "kv") -> list[Heads]:
    """What may stay of a block's attention, fewest query heads first, from none (it is removed).

    `leaving`: "kv" heads with their query heads, "query" heads from every KV head alike, or "both".
    Where every query head has a KV head of its own the three are one.
    """
    leaving = "kv" if dense.group == 1 else leaving
    kv_heads = [dense.kv_heads] if leaving == "query" else range(1, dense.kv_heads + 1)
    queries = [dense.group] if leaving == "kv" else range(1, dense.group + 1)
    found = [Heads(k, q) for k in kv_heads for q in queries if k and q]
    return [Heads(0, 0), *sorted(
        (own for own in found if not any(_faults(BlockWidths(own.total, own.kv, 0), parallel))),
        key=lambda own: (own.total, own.kv))]


def group_faults(arch: Architecture, widths: Sequence[BlockWidths], group: int,
                 parallel: int = 1) -> list[str]:
    """Inputs of linear layers that are no multiple of `group` on each of `parallel` GPUs.

    Weights quantised in groups need that; tensor cores run best on such multiples too. Only the
    inputs of the two output projections are split over the GPUs.
    """
    found = [f"hidden size {arch.hidden}"] if arch.hidden % group else []
    for i, w in enumerate(widths):
        if w.heads * arch.head_dim % (group * parallel):
            found.append(f"block {i}: {counted(w.heads, 'query head')} of size {arch.head_dim}")
        if w.intermediate % (group * parallel):
            found.append(f"block {i}: {counted(w.intermediate, 'channel')}")
    return found


def tensor_core_faults(arch: Architecture, widths: Sequence[BlockWidths], multiple: int,
                       parallel: int = 1) -> list[str]:
    """Sides of matrices that are no multiple of `multiple` on each of `parallel` GPUs, where tensor
    cores compute some of their tile for nothing. KV heads that are copied count whole."""
    found = [f"hidden size {arch.hidden}"] if arch.hidden % multiple else []
    for i, w in enumerate(widths):
        for count, size, noun in ((w.heads, arch.head_dim, "query head"),
                                  (w.kv_heads, arch.head_dim, "KV head"),
                                  (w.intermediate, 1, "channel")):
            split = 1 if noun == "KV head" and count < parallel else parallel
            if count * size % (multiple * split):
                of = f" of size {size}" if size > 1 else ""
                found.append(f"block {i}: {counted(count, noun)}{of}")
    return found


def require_parallel(arch: Architecture, parallel: int) -> None:
    """Raise InputError where the dense model itself cannot be split over `parallel` GPUs."""
    found = faults(arch.blocks, parallel)
    if found:
        *others, last = [str(n) for n in _USUAL if not faults(arch.blocks, n)]
        usable = f"{', '.join(others)} or {last}" if others else last
        raise InputError(f"hardware.tensor_parallel: {parallel} does not divide this model "
                         f"({found[0]}); use {usable}")


def counted(number: int, noun: str) -> str:
    """`1 KV head`, `2 KV heads`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
