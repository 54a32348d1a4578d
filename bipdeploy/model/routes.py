"""The ways in which a checkpoint that bipdeploy wrote can be loaded, one row each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VERIFIED, FAILED, NOT_RUN = "verified", "failed", "not run"


@dataclass(frozen=True)
class Route:
    """A way to load a checkpoint. `stock` and `per_block`: for which checkpoints it is a way."""

    engine: str
    title: str
    how: str
    stock: bool
    per_block: bool
    bipdeploy: bool = False
    trust_remote_code: bool = False
    model_impl: str | None = None  # of vLLM, where it is not to choose


# Ways in the order of the table that the report and the model card show.
ROUTES: dict[str, Route] = {
    "transformers.stock": Route("transformers", "transformers", "as it is", True, False),
    "transformers.remote_code": Route("transformers", "transformers", "trust_remote_code=True",
                                      False, True, trust_remote_code=True),
    "transformers.bipdeploy": Route("transformers", "transformers", "bipdeploy installed",
                                    False, True, bipdeploy=True),
    "vllm.stock": Route("vllm", "vLLM", "as it is", True, False),
    "vllm.transformers_backend": Route("vllm", "vLLM", "Transformers backend, "
                                       "--trust-remote-code", True, True, trust_remote_code=True,
                                       model_impl="transformers"),
    "vllm.plugin": Route("vllm", "vLLM", "bipdeploy installed", False, True, bipdeploy=True),
}


def not_run(why: str) -> dict[str, Any]:
    return {"status": NOT_RUN, "why": why}


def inapplicable(name: str, per_block: bool) -> str | None:
    """Why a route is no way to load such a checkpoint; None where it is one."""
    if per_block and not ROUTES[name].per_block:
        return "no stock class holds blocks of different widths"
    if not per_block and not ROUTES[name].stock:
        return "not needed, this is a stock checkpoint"
    return None
