"""Export targets. To add one, write its function and section, and add a line to `EXPORTERS`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bipdeploy.stages.job import Job


@dataclass(frozen=True)
class Exporter:
    """`function` is "module:name" below bipdeploy.exporters. It writes a folder, verifies that what
    it wrote loads and agrees with the model it came from, and returns figures and a record."""

    function: str
    description: str

    def load(self) -> Callable[[Job, Path], tuple[dict[str, float], dict[str, Any]]]:
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(f"bipdeploy.exporters.{module}"), name)


# Keys are the fields of the recipe's export section and the folders' names.
EXPORTERS: dict[str, Exporter] = {
    "transformers": Exporter("transformers:export", "safetensors for AutoModelForCausalLM"),
    "onnx": Exporter("onnx:export", "a graph for ONNX Runtime, with its KV cache"),
    "vllm": Exporter("vllm:export", "safetensors that vLLM serves"),
}
