"""Joint selection: groups leave in rounds, and after each round what stays takes over their part.

Scores taken once, from the whole model, let groups leave together that cover for each other.
Here a group's cost is what it costs once all that is left has been refitted, as in the Optimal
Brain Surgeon (Hassibi and Stork, 1993) for whole structures (ZipLM, arXiv 2302.04089); several
groups leave at a time, so that the cost is that of a few matrix products.

Shapes: K inputs of a projection, in groups of `size`; D outputs.
"""

from __future__ import annotations

import torch

RIDGE = 0.01  # of the refits in between; a share of the mean energy of the inputs
ROUNDS = 32  # fewer groups than this leave one by one
STEP = 1e-12  # by which costs rise at least, of their size: a root or a quotient keeps it
LEAST = 1e-250  # of all costs


def costs(gram_KK: torch.Tensor, weight_DK: torch.Tensor, size: int = 1, *,
          ridge: float = RIDGE, rounds: int = ROUNDS) -> torch.Tensor:
    """Squared error of the output that the removal of each group adds, in the order they leave.

    `gram_KK` is Z'Z over all tokens, float64; `weight_DK` the projection that minimises the error
    with all inputs there. Returns [K / size], float64 on the CPU. Costs rise strictly in the order
    of removal, so that the dearest n are the n that stay, whatever n is.
    """
    inverse = _damped_inverse(gram_KK, ridge)
    weight_KD = weight_DK.double().T
    count = len(gram_KK) // size
    found = torch.zeros(count, dtype=torch.float64)
    left, highest = torch.arange(count, device=gram_KK.device), 0.0
    while len(left):
        own = diagonal_blocks(inverse, size)
        parts = weight_KD.reshape(len(left), size, -1)
        # For single inputs the systems are numbers, and on a CPU a division is far faster.
        solved = parts / own if size == 1 else torch.linalg.solve(own, parts)
        cost = (parts * solved).sum((1, 2))
        order = cost.argsort()
        gone, rest = order.split([per := min(-(-count // rounds), len(left)), len(left) - per])
        rest = rest.sort().values
        for group, value in zip(left[gone].tolist(), cost[gone].tolist(), strict=True):
            highest = max(value, highest * (1 + STEP), LEAST)
            found[group] = highest
        if not len(rest):  # no system with nothing on its right side
            break
        out, stay = _columns(gone, size), _columns(rest, size)
        across = inverse[stay[:, None], out]
        take_over = torch.linalg.solve(inverse[out[:, None], out], across.T).T
        weight_KD = weight_KD[stay].addmm_(take_over, weight_KD[out], alpha=-1)
        inverse = inverse[stay[:, None], stay].addmm_(take_over, across.T, alpha=-1)
        left = left[rest]
    return found


def _damped_inverse(gram_KK: torch.Tensor, ridge: float) -> torch.Tensor:
    """(Z'Z + ridge mean(diag Z'Z) I)^-1 in float64. At 7B each copy would take a gigabyte."""
    own = damped(gram_KK, ridge)
    torch.linalg.cholesky(own, out=own)
    return torch.cholesky_inverse(own)


def damped(gram_KK: torch.Tensor, ridge: float) -> torch.Tensor:
    """Z'Z + ridge mean(diag Z'Z) I in float64, a copy."""
    own = gram_KK.to(torch.float64, copy=True)
    diagonal = own.diagonal()
    diagonal += ridge * diagonal.mean().clamp_min(1e-12)
    return own


def diagonal_blocks(matrix_KK: torch.Tensor, size: int) -> torch.Tensor:
    """The blocks [K / size, size, size] on the diagonal."""
    count = len(matrix_KK) // size
    return matrix_KK.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _columns(groups: torch.Tensor, size: int) -> torch.Tensor:
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()
