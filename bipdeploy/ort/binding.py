"""PyTorch tensors as the inputs and outputs of an onnxruntime session, read and written in place.

Plain addresses serve every type; NumPy has no bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch

# Numbers of onnx.TensorProto.DataType.
ELEMENT = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}


class Binding:
    """The tensors of one session's runs. It keeps them alive: onnxruntime has their addresses only.
    """

    def __init__(self, session: Any, device: torch.device):
        self._session, self._device = session, device
        self._binding = session.io_binding()
        self._held: dict[str, torch.Tensor] = {}

    def input(self, name: str, tensor: torch.Tensor) -> None:
        self._binding.bind_input(name, *self._place(name, tensor))

    def output(self, name: str, tensor: torch.Tensor) -> None:
        self._binding.bind_output(name, *self._place(name, tensor))

    def run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # onnxruntime has a stream of its own
        self._session.run_with_iobinding(self._binding)

    def _place(self, name: str, tensor: torch.Tensor) -> tuple[Any, ...]:
        assert tensor.is_contiguous() and tensor.device == self._device
        self._held[name] = tensor
        return (self._device.type, self._device.index or 0, ELEMENT[tensor.dtype],
                list(tensor.shape), tensor.data_ptr())
