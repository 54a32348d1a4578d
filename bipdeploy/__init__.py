"""bipdeploy: prune a causal language model, repair it, and prove that it is accurate and faster."""

from __future__ import annotations

from importlib import metadata
from typing import Any

__version__ = metadata.version("bipdeploy")
__all__ = ["bench", "compare", "curves", "evaluate", "export", "gate", "plan", "profile", "prune",
           "recover", "report", "run", "score", "sweep", "tune"]


def __getattr__(name: str) -> Any:
    """The API's functions, imported when first used: `import bipdeploy` stays instant."""
    if name in __all__:
        from bipdeploy import api

        return getattr(api, name)
    raise AttributeError(f"module 'bipdeploy' has no attribute {name!r}")
