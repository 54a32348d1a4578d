"""The one guard of what leaves a walk: NaN and infinity go no further."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bipdeploy.errors import InputError


def require(what: str, values: Iterable[torch.Tensor | float], dtype: torch.dtype) -> None:
    """Raise InputError where one of `values` is NaN or infinite. `dtype`: computed in."""
    for value in values:
        found = torch.as_tensor(value)
        if found.numel() and not torch.stack(found.aminmax()).isfinite().all():
            raise InputError(f"{what} are not finite in {dtype}; set model.dtype to float32")
