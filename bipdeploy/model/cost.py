"""What widths cost: parameters, FLOPs, bytes. Pure functions on sizes; no torch.

FLOPs are two per multiply-add of matrix products, as torch.utils.flop_counter counts them: norms,
activations, softmax and biases are left out, and attention scores are counted whole, not just
their causal half. Parts are named "heads" (a block's attention, by `Heads`) and "ffn" (by
channels). T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bipdeploy.model.families import Architecture, BlockWidths, Heads, Width

PartCost = Callable[[int, str, Width], float]  # block, part, width → cost; 0 where it is removed


@dataclass(frozen=True)
class Cost:
    """A cost that adds up over parts: `part` of each at its width, and `rest` whatever they are."""

    part: PartCost
    rest: float = 0.0

    def whole(self, widths: Sequence[BlockWidths]) -> float:
        return self.rest + sum(self.part(i, part, w.of(part)) for i, w in enumerate(widths)
                               for part in ("heads", "ffn"))


def parameters(arch: Architecture) -> Cost:
    """Parameters of the blocks."""
    return Cost(lambda block, part, width: arch.block_parameters(
        block, BlockWidths(0, 0, 0).having(width)))


def flops(arch: Architecture, new: int, past: int = 0) -> Cost:
    """FLOPs of the blocks for `new` tokens of one sequence that see `past` earlier ones and each
    other."""

    def part(block: int, part: str, width: Width) -> float:
        if not isinstance(width, Heads):
            return 6 * new * arch.hidden * width
        projections = 2 * new * arch.hidden * arch.head_dim * 2 * (width.total + width.kv)
        return projections + 4 * new * (past + new) * arch.head_dim * width.total

    return Cost(part)


def head_flops(arch: Architecture, tokens: int) -> int:
    """FLOPs of the output layer for the tokens whose logits are computed."""
    return 2 * tokens * arch.hidden * arch.vocabulary


def memory(arch: Architecture, value: int, cached_tokens: int = 0, cache_value: int | None = None
           ) -> Cost:
    """Bytes of the whole model's weights, at `value` bytes each, and of the KV cache of
    `cached_tokens` in all."""
    cache = 2 * arch.head_dim * cached_tokens * (cache_value or value)
    inside = parameters(arch)
    outside = arch.parameters() - inside.whole(arch.blocks)
    return Cost(lambda block, part, width: value * inside.part(block, part, width)
                + (cache * width.kv if isinstance(width, Heads) else 0), value * outside)


def read_per_step(arch: Architecture, value: int, batch: int, context: int) -> float:
    """Bytes that one decode step reads: all weights but the embeddings' other rows, and K and V.

    It holds for a prefill too, which reads no cache: `context` 0.
    """
    table = 0 if arch.tied else arch.vocabulary * arch.hidden * value
    return memory(arch, value, batch * context).whole(arch.blocks) - table


def value_bytes(config: Mapping[str, Any]) -> int | None:
    """Bytes of one stored weight, as config.json states its type; None where it does not."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return {"float32": 4, "float16": 2, "bfloat16": 2}.get(name)
