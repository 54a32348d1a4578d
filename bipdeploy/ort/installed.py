"""Whether what writes and runs ONNX graphs is installed. Loads none of it."""

from __future__ import annotations

import importlib.util

from bipdeploy.errors import InputError

PACKAGES = ("onnx", "onnx_ir", "onnxruntime")


def require(*packages: str) -> None:
    """Raise InputError where a package that ONNX needs is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is not installed; `pip install 'bipdeploy[onnx]'` for the "
                             "CPU, 'bipdeploy[onnx-gpu]' for an NVIDIA GPU (one of them only)")
