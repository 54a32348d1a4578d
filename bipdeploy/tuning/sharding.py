"""All weights of a model over several processes: each holds a part (torch's FSDP, version 2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def shard(module: nn.Module, blocks: Iterable[nn.Module], dtype: torch.dtype,
          device: torch.device) -> None:
    """Split the weights of `module`, in place, over all processes; one of `blocks` at a time is
    gathered, in `dtype`. Gradients are averaged in float32."""
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor gathered from all processes, which must all ask for it; one that is in one piece as
    it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A whole value, split and placed as a parameter is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh,
                                 parameter.placements)
    return value.to(parameter.device)
