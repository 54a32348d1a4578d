"""Closed-form repair of a block's two output projections: new weights, or a bias.

Shapes: N tokens, K kept inputs of a projection, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bipdeploy.recipe.recover import RIDGES

ROWS = 1024  # of a sum that are computed at once


def add_product(total_KD: torch.Tensor, a_NK: torch.Tensor, b_ND: torch.Tensor) -> None:
    """Add a'b to a sum in float64, in place. By slices of rows: a whole product in both types
    would be larger than the sum."""
    for start in range(0, len(total_KD), ROWS):
        rows = slice(start, start + ROWS)
        total_KD[rows] += a_NK[:, rows].T @ b_ND


@dataclass
class RidgeProblem:
    """min over W of |R_ND - Z_NK W_DK'|^2 + ridge |W - W0|^2, from sums over batches.

    Solved as W = W0 + B' (A + ridge I)^-1 with A = Z'Z and B = Z'(R - Z W0'), so that W0 is what
    it falls back to: the error on the fitted tokens never exceeds that of W0.
    """

    start_DK: torch.Tensor
    gram_KK: torch.Tensor = field(init=False)
    cross_KD: torch.Tensor = field(init=False)
    before: float = 0.0  # squared error of W0, in all

    def __post_init__(self) -> None:
        d, k = self.start_DK.shape
        self.gram_KK = self.start_DK.new_zeros((k, k), dtype=torch.float64)
        self.cross_KD = self.start_DK.new_zeros((k, d), dtype=torch.float64)

    def see(self, z_NK: torch.Tensor, target_ND: torch.Tensor) -> None:
        """Take in a batch: inputs of the projection, and what its output should be."""
        # Products in float32, sums in float64: exact enough at GPU speed, as windows are short.
        z = z_NK.flatten(0, -2).float()
        residual = target_ND.flatten(0, -2).float() - z @ self.start_DK.float().T
        add_product(self.gram_KK, z, z)
        add_product(self.cross_KD, z, residual)
        self.before += float(residual.double().square().sum())

    def absorb(self, other: RidgeProblem) -> None:
        """Take in all that another problem with the same start has seen."""
        self.gram_KK += other.gram_KK
        self.cross_KD += other.cross_KD
        self.before += other.before

    def restricted(self, columns: torch.Tensor) -> RidgeProblem:
        """The same problem with only some of the inputs there, from the sums alone."""
        gone = torch.ones(len(self.gram_KK), dtype=torch.bool, device=columns.device)
        gone[columns] = False
        left = RidgeProblem(self.start_DK[:, columns])
        left.gram_KK = self.gram_KK[columns][:, columns]
        left.cross_KD = (self.cross_KD[columns] + self.gram_KK[columns][:, gone]
                         @ self.start_DK[:, gone].double().T)
        lost = self.start_DK[:, gone].double().T  # the error of the start without it
        left.before = self.before + float((lost * (self.gram_KK[gone][:, gone] @ lost)).sum()
                                          + 2 * (lost * self.cross_KD[gone]).sum())
        return left

    def solve(self, ridge: float) -> torch.Tensor:
        """The refitted weight [D, K] in float64. `ridge` is relative to the mean of diag(Z'Z)."""
        scale = self.gram_KK.diagonal().mean().clamp_min(1e-12)
        # Never exactly zero: inputs that are always zero would make the system singular.
        diagonal = self.gram_KK.diagonal()
        undamped = diagonal.clone()
        diagonal += max(ridge, 1e-10) * scale  # in place: at 7B a copy would take a gigabyte
        update_KD = torch.linalg.solve(self.gram_KK, self.cross_KD)
        diagonal.copy_(undamped)
        return update_KD.T.add_(self.start_DK)

    def error(self, weight_DK: torch.Tensor) -> float:
        """Squared error of any weight on the tokens seen, from the sums alone."""
        step_KD = (weight_DK.double() - self.start_DK.double()).T
        return self.before + float((step_KD * (self.gram_KK @ step_KD)).sum()
                                   - 2 * (step_KD * self.cross_KD).sum())


def best_ridge(fitted: RidgeProblem, held_back: RidgeProblem) -> float:
    """The ridge of `RIDGES` with which the weight fitted to some tokens fits the others best."""
    return min(RIDGES, key=lambda ridge: held_back.error(fitted.solve(ridge)))


@dataclass
class MeanShift:
    """The bias that keeps a projection's mean output when some of its inputs leave.

    W[:, gone] mean_t(X[:, gone]), as in FLAP (arXiv 2312.11983). Taken as the difference of the
    whole and the sliced projection on their own inputs, of which the kept ones are the same.
    """

    whole_DK: torch.Tensor
    sliced_DK: torch.Tensor
    tokens: int = 0
    sums: list[torch.Tensor] = field(default_factory=list)  # of the inputs: whole [K], sliced [K]

    def see(self, whole_NK: torch.Tensor, sliced_NK: torch.Tensor) -> None:
        """Take in a batch: the inputs of both projections on the same tokens."""
        seen = [x.flatten(0, -2).double() for x in (whole_NK, sliced_NK)]
        self.tokens += len(seen[0])
        sums = [x.sum(0) for x in seen]
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else sums

    def bias(self) -> torch.Tensor:
        """What to add to the bias [D], in float64."""
        whole, sliced = (weight.double() @ total for weight, total in
                         zip((self.whole_DK, self.sliced_DK), self.sums, strict=True))
        return (whole - sliced) / self.tokens
