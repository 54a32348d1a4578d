"""What the calibration walk keeps of a block, and what a criterion is given.

Shapes: N tokens in all, D hidden size, G KV groups, q query heads per group, E head_dim,
F FFN channels. A group's inputs to o_proj are its q*E columns, side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn.functional import cosine_similarity

from bipdeploy.model.blocks import Block
from bipdeploy.model.families import BlockWidths
from bipdeploy.pruning.refit import add_product

# Upper bound of |silu'|, reached near x = 2.4.
SILU_LIPSCHITZ = 1.0999


class Scores(NamedTuple):
    """Scores of a block, float64 on the CPU: of its KV groups heads [G], of its channels ffn [F],
    of its query heads, group by group, queries [G*q]. Higher is kept."""

    heads: torch.Tensor
    ffn: torch.Tensor
    queries: torch.Tensor


@dataclass
class Statistics:
    """Sums over all calibration tokens of a block, float64 except the Gram matrices (float32).

    z_energy [G*q*E] and h_energy [F]: sums of squares of the inputs of o_proj and down_proj.
    z_sum, z_square, h_sum, h_square: sums and sums of squares, exact enough for variances.
    z_gram [G, q*E, q*E]: sum of z z'; z_gram_scaled: the same over mean(u^2) of each token.
    z_outer [G*q*E, G*q*E], h_outer [F, F]: sums of z z' and h h' over all groups, float64.
    inverse_energy: sum of 1 / mean(u^2) over the tokens.
    up_energy, gate_energy [F]: sums of squares of up and silu(gate). output_energy: of y.
    measured [G]: sums of squares of the change of y when the group is removed.
    similarity [3]: sums of the cosines of x and u, of u and y, and of x and y.
    """

    groups: int
    needs: frozenset[str]
    eps: float
    tokens: int = 0
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def _add(self, name: str, value: torch.Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def absorb(self, other: Statistics) -> None:
        """Take in what another device saw."""
        self.tokens += other.tokens
        for name, value in other.sums.items():
            self._add(name, value.to(self.sums[name].device))

    def _add_moments(self, prefix: str, x: torch.Tensor) -> None:
        x = x.double()  # in float32 a variance far below the mean's square would drown
        self._add(f"{prefix}_sum", x.sum(0))
        self._add(f"{prefix}_square", x.square().sum(0))

    def _add_outer(self, name: str, x: torch.Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = x.new_zeros((x.shape[1], x.shape[1]), dtype=torch.float64)
        add_product(self.sums[name], x, x)

    def variance(self, prefix: str) -> torch.Tensor:
        """Unbiased variance over all tokens of the inputs of o_proj (`z`) or down_proj (`h`)."""
        mean = self.sums[f"{prefix}_sum"] / self.tokens
        centred = self.sums[f"{prefix}_square"] - self.tokens * mean.square()
        return centred.clamp_min(0) / max(self.tokens - 1, 1)

    def see_attention(self, z: torch.Tensor, u: torch.Tensor) -> None:
        """Take in a batch of o_proj's inputs z [.., G*q*E] and attention outputs u [.., D]."""
        z = z.flatten(0, -2).float()
        if "energy" in self.needs:
            self._add("z_energy", squares(z))
        if "moments" in self.needs:
            self._add_moments("z", z)
        if "gram" in self.needs:
            z_G = z.view(len(z), self.groups, -1).transpose(0, 1)
            scaled = z_G * inverse_rms(u, self.eps)[None, :, None]
            self._add("z_gram", z_G.transpose(1, 2) @ z_G)
            self._add("z_gram_scaled", scaled.transpose(1, 2) @ scaled)
        if "outer" in self.needs:
            self._add_outer("z_outer", z)
            self._add("inverse_energy", inverse_rms(u, self.eps).square().sum().double())

    def see_ffn(self, gate: torch.Tensor, up: torch.Tensor, h: torch.Tensor) -> None:
        """Take in a batch of silu(gate), up and their product h, all [.., F]."""
        gate, up, h = (part.flatten(0, -2).float() for part in (gate, up, h))
        if "energy" in self.needs:
            self._add("h_energy", squares(h))
        if "moments" in self.needs:
            self._add_moments("h", h)
        if "outer" in self.needs:
            self._add_outer("h_outer", h)
        if "ffn_parts" in self.needs:
            self._add("gate_energy", squares(gate))
            self._add("up_energy", squares(up))

    def see_output(self, y: torch.Tensor) -> None:
        """Take in a batch of block outputs y [.., D]."""
        self.tokens += y.numel() // y.shape[-1]
        if "output" in self.needs:
            self._add("output_energy", y.float().square().sum().double())

    def see_flow(self, x: torch.Tensor, u: torch.Tensor, y: torch.Tensor) -> None:
        """Take in a batch of block inputs, attention outputs and block outputs, all [.., D]."""
        x, u, y = x.float(), u.float(), y.float()
        self._add("similarity", torch.stack([
            cosine_similarity(a, b, dim=-1).double().sum() for a, b in ((x, u), (u, y), (x, y))]))

    def influence(self) -> torch.Tensor:
        """1 - mean cosine of input and output of the attention, the FFN, the whole block: [3].

        Block influence of ShortGPT (arXiv 2403.03853); taken of the parts, each with its norm and
        residual, as in "What matters in transformers" (arXiv 2406.15786).
        """
        return (1 - self.sums["similarity"] / self.tokens).clamp_min(0).cpu()

    def see_measured(self, energy: torch.Tensor) -> None:
        """Take in the change of a batch's output by removing each group: sums of squares [G]."""
        self._add("measured", energy.double())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.sums[name]


def pieces(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Slices of rows [.., K], so that what is made from one is small. On a CPU it stays in the
    cache: to make a whole new matrix of a block's size takes several times as long."""
    return x.split(64 if x.device.type == "cpu" else 1024)


def squares(x_NK: torch.Tensor) -> torch.Tensor:
    """Sums of the squares of every column [K], float64."""
    total_K = x_NK.new_zeros(x_NK.shape[1], dtype=torch.float64)
    for rows in pieces(x_NK):
        total_K += rows.float().square().sum(0)
    return total_K


def inverse_rms(u: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / rms of every token of u [.., D], as RMSNorm takes it: [N]."""
    return (u.flatten(0, -2).float().square().mean(-1) + eps).rsqrt()


@dataclass(frozen=True)
class BlockView:
    """All that a criterion may look at: the block, its statistics, and the walk's settings."""

    block: Block
    statistics: Statistics | None
    groups: int
    channels: int
    propagation: str
    generator: torch.Generator
    gradients: Mapping[str, torch.Tensor] = field(default_factory=dict)  # by weight, float32
    kept: BlockWidths | None = None  # what is to stay, where the criterion depends on that

    @property
    def query_heads(self) -> int:
        """G*q; 0 without an attention."""
        if not self.block.has_attention:
            return 0
        return self.block.output.in_features // self.block.layer.self_attn.head_dim

    def grouped_output(self, groups: int) -> torch.Tensor:
        """o_proj's weight by groups of its columns, KV groups or query heads: [groups, D, .],
        float32."""
        weight = self.block.output.weight.float()
        return weight.view(len(weight), groups, -1).transpose(0, 1)


def of_query_heads(columns: torch.Tensor, rows: Sequence[torch.Tensor], groups: int, heads: int
                   ) -> torch.Tensor:
    """Sums over the weights of each query head: [heads], of which each of `groups` shares out the
    sums over its K and V evenly.

    columns [G*q*E]: a value for each column of o_proj; rows: for each row of q_proj [G*q*E], k_proj
    and v_proj [G*E].
    """
    queries, *shared = rows
    own = columns.view(heads, -1).sum(1) + queries.view(heads, -1).sum(1)
    share = torch.stack([values.view(groups, -1).sum(1) for values in shared]).sum(0)
    return own + share.repeat_interleave(heads // groups) / (heads // groups)
