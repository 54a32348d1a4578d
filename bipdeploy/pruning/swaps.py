"""Exchanging groups that stay for groups that leave, as long as the refitted error falls.

The local search of OSSCAR (arXiv 2403.12983). The error of a set S of inputs that stay is that of
the best weights on them, tr((W - W0) H (W - W0)') with H the damped Gram matrix. All that an
exchange needs is one symmetric matrix swept on S, and what the weights make of it:

    T_SS = -inv(H_SS)    T_SR = inv(H_SS) H_SR    T_RR = H_RR - H_RS inv(H_SS) H_SR
    B_S = the refitted weights W_S                B_R = H_R (W0 - W)', what the error asks of R

To move a group across is one sweep of both on its columns (Goodnight, The American Statistician
33, 1979), which adds a matrix of the group's rank.

Shapes: K inputs of a projection, in groups of `size`; D outputs; S groups that stay, R that leave.
"""

from __future__ import annotations

import torch

from bipdeploy.pruning.elimination import RIDGE, damped, diagonal_blocks

SWAPS = 200  # at most; as many as the authors' code makes for channels, 20 times 10
LEAST = 1e-10  # of the projection's whole energy, that a swap has to save: above rounding


def improved(gram_KK: torch.Tensor, weight_DK: torch.Tensor, stays: torch.Tensor, size: int = 1,
             *, ridge: float = RIDGE, swaps: int = SWAPS) -> torch.Tensor:
    """Which groups stay [K / size], bool on the CPU, after at most `swaps` exchanges of one group
    each from those that `stays` says.

    Every exchange is the best of all; none is left that lowers the error, unless `swaps` were made.
    `gram_KK` is Z'Z over all tokens, float64; `weight_DK` the projection with all inputs there.
    """
    stays = stays.to(gram_KK.device, copy=True)
    state = Swept(damped(gram_KK, ridge), weight_DK, stays.repeat_interleave(size))
    for _ in range(swaps):
        inside, outside = stays.nonzero().flatten(), (~stays).nonzero().flatten()
        if not len(inside) or not len(outside):
            break
        change_SR = state.changes(inside, outside, size)
        best = int(change_SR.argmin())
        if float(change_SR.flatten()[best]) >= -LEAST * state.energy:
            break
        out, into = inside[best // len(outside)], outside[best % len(outside)]
        state.move(out, size, inwards=False)
        state.move(into, size, inwards=True)
        stays[out], stays[into] = False, True
    return stays.cpu()


class Swept:
    """T and B of the module's head, float64, for a set of inputs that stay (bool [K])."""

    def __init__(self, gram_KK: torch.Tensor, weight_DK: torch.Tensor, stays: torch.Tensor):
        """`gram_KK`: damped; it becomes T in place."""
        start_KD = weight_DK.double().T
        self.energy = float((start_KD * (gram_KK @ start_KD)).sum())
        inside, outside = stays.nonzero().flatten(), (~stays).nonzero().flatten()
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram_KK[inside][:, inside]))
        across = gram_KK[inside][:, outside]
        solved = inverse @ across
        schur = gram_KK[outside][:, outside].addmm_(across.T, solved, alpha=-1)
        self.t_KK, self.b_KD = gram_KK, torch.empty_like(start_KD)
        self.b_KD[inside] = start_KD[inside] + solved @ start_KD[outside]
        self.b_KD[outside] = schur @ start_KD[outside]
        self.t_KK[inside[:, None], inside] = -inverse
        self.t_KK[inside[:, None], outside] = solved
        self.t_KK[outside[:, None], inside] = solved.T
        self.t_KK[outside[:, None], outside] = schur

    def changes(self, inside: torch.Tensor, outside: torch.Tensor, size: int) -> torch.Tensor:
        """Change of the error by every exchange of a group that stays for one that leaves: [S, R].
        """
        return (self._of_single_inputs(inside, outside) if size == 1 else
                self._of_groups(inside, outside, size))

    def _of_single_inputs(self, inside: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
        """All pairs at once. Without i the others' weights take over its part, by which what the
        error asks of j changes, and so does what j alone can add."""
        diagonal = self.t_KK.diagonal()
        inverse, schur = -diagonal[inside, None], diagonal[outside]
        weight, asked = self.b_KD[inside], self.b_KD[outside]
        lost = weight.square().sum(1, keepdim=True)
        share = self.t_KK[inside[:, None], outside] / inverse
        gained = asked.square().sum(1) + share * (2 * (weight @ asked.T) + share * lost)
        return lost / inverse - gained / (schur + share.square() * inverse)

    def _of_groups(self, inside: torch.Tensor, outside: torch.Tensor, size: int) -> torch.Tensor:
        """The same for groups, which are few: all that leave beside one that stays at a time."""
        blocks = diagonal_blocks(self.t_KK, size)
        parts = self.b_KD.view(len(blocks), size, -1)
        across = self.t_KK.view(len(blocks), size, len(blocks), size)
        rows = []
        for own in inside.tolist():
            weight, to_own = parts[own], across[own][:, outside].transpose(0, 1)
            share = torch.linalg.solve(-blocks[own], to_own)  # [R, size, size]
            asked = parts[outside] + share.transpose(1, 2) @ weight
            schur = blocks[outside] + to_own.transpose(1, 2) @ share
            lost = (weight * torch.linalg.solve(-blocks[own], weight)).sum()
            rows.append(lost - (asked * torch.linalg.solve(schur, asked)).sum((1, 2)))
        return torch.stack(rows)

    def move(self, group: torch.Tensor, size: int, *, inwards: bool) -> None:
        """Let a group stay, or leave."""
        own = slice(int(group) * size, (int(group) + 1) * size)
        pivot = torch.linalg.inv(self.t_KK[own, own])
        column, part = self.t_KK[:, own].clone(), self.b_KD[own].clone()
        solved = column @ pivot
        self.t_KK.addmm_(solved, column.T, alpha=-1)
        self.b_KD.addmm_(solved, part, alpha=-1)
        sign = 1 if inwards else -1
        self.t_KK[:, own], self.t_KK[own] = sign * solved, sign * solved.T
        self.t_KK[own, own] = -pivot
        self.b_KD[own] = sign * pivot @ part
