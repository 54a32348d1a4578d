"""Joint selection: groups leave in rounds, and after each round what stays takes over their part.

Scores taken once, from the whole model, let groups leave together that cover for each other.
Here a group's cost is what it costs once all that is left has been refitted, as in the Optimal
Brain Surgeon (Hassibi and Stork, 1993) for whole structures (ZipLM, arXiv 2302.04089); several
groups leave at a time, so that the cost is that of a few matrix products.

Shapes: K inputs of a projection, in groups of `size`; D outputs.
"""

from __future__ import annotations

import math

import torch

RIDGE = 0.01  # of the refits in between; a share of the mean energy of the inputs
ROUNDS = 32  # fewer groups than this leave one by one


def costs(gram_KK: torch.Tensor, weight_DK: torch.Tensor, size: int = 1, *,
          ridge: float = RIDGE, rounds: int = ROUNDS) -> torch.Tensor:
    """Squared error of the output that the removal of each group adds, in the order they leave.

    `gram_KK` is Z'Z over all tokens, float64; `weight_DK` the projection that minimises the error
    with all inputs there. Returns [K / size], float64 on the CPU. Costs rise strictly in the order
    of removal, so that the dearest n are the n that stay, whatever n is.
    """
    gram = gram_KK.double()
    damping = ridge * gram.diagonal().mean().clamp_min(1e-12)
    inverse = torch.linalg.inv(gram + damping * torch.eye(len(gram), dtype=gram.dtype,
                                                          device=gram.device))
    weight_KD = weight_DK.double().T
    count = len(gram) // size
    found = torch.zeros(count, dtype=torch.float64)
    left, highest = torch.arange(count, device=gram.device), 0.0
    while len(left):
        own = _diagonal_blocks(inverse, size)
        parts = weight_KD.reshape(len(left), size, -1)
        cost = (parts * torch.linalg.solve(own, parts)).sum((1, 2))
        order = cost.argsort()
        gone, rest = order.split([per := min(-(-count // rounds), len(left)), len(left) - per])
        rest = rest.sort().values
        for group, value in zip(left[gone].tolist(), cost[gone].tolist(), strict=True):
            highest = max(value, math.nextafter(highest, math.inf))
            found[group] = highest
        out, stay = _columns(gone, size), _columns(rest, size)
        across = inverse[stay][:, out]
        take_over = torch.linalg.solve(inverse[out][:, out], across.T).T
        weight_KD = weight_KD[stay] - take_over @ weight_KD[out]
        inverse = inverse[stay][:, stay] - take_over @ across.T
        left = left[rest]
    return found


def _diagonal_blocks(matrix_KK: torch.Tensor, size: int) -> torch.Tensor:
    """The blocks [K / size, size, size] on the diagonal."""
    count = len(matrix_KK) // size
    return matrix_KK.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _columns(groups: torch.Tensor, size: int) -> torch.Tensor:
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()
