"""The table of export targets.

A function takes a `Job` and a folder, writes it, verifies that what it wrote loads and agrees with
the model it came from, and returns figures and a record.
"""

from __future__ import annotations

from bipdeploy.errors import InputError
from bipdeploy.ort import installed
from bipdeploy.planning.resolved import Resolved
from bipdeploy.table import Row, by_name


def _onnx(resolved: Resolved) -> None:
    recipe = resolved.recipe
    if recipe.export.onnx.dtype == "bfloat16" and recipe.model.device == "cpu":
        raise InputError("export.onnx.dtype: onnxruntime has no bfloat16 on a CPU, and "
                         "model.device is cpu; use float32 or float16")
    onnx = recipe.export.onnx
    why = installed.not_on_cuda(onnx.style, onnx.dtype, onnx.quantize)
    if recipe.model.device == "cuda" and why:
        raise InputError(f"export.onnx: model.device is cuda, and {why}")


# Names are the fields of the recipe's export section and the folders'; `needs`: packages without
# which a run is refused.
EXPORTERS = by_name(
    Row("transformers", (), None, "bipdeploy.exporters.transformers:export"),
    Row("onnx", installed.PACKAGES, _onnx, "bipdeploy.exporters.onnx:export"),
    Row("vllm", (), None, "bipdeploy.exporters.vllm:export"),
)
