"""Nodes and weights of an ONNX graph that is being written.

A weight is named and sized here, and read from the checkpoint only when the graph is saved, one
tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

from bipdeploy.errors import InputError
from bipdeploy.model.checkpoint import Checkpoint, require_finite

MICROSOFT = "com.microsoft"  # the domain of onnxruntime's own operators
IR_VERSION = 10  # the oldest that has all that is written here


class Nodes:
    """The nodes so far, in order, and the weights that they read."""

    def __init__(self, source: Checkpoint, dtype: torch.dtype):
        self.source, self.torch_dtype = source, dtype
        self.dtype = from_torch_dtype(dtype)
        self.tape = ir.tape.Tape()
        self._named: dict[str, ir.Value] = {}

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
           ) -> ir.Value:
        """Add a node with one output, and give the output."""
        return self.ops(kind, 1, *inputs, domain=domain, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: ir.Value | None, domain: str = "",
            **attributes: Any) -> Sequence[ir.Value]:
        """Add a node with several outputs."""
        return self.tape.op_multi_out(kind, inputs, attributes, num_outputs=outputs, domain=domain,
                                      name=f"{kind}_{len(self.tape.nodes)}")

    def linear(self, x: ir.Value, stem: str, layers: Sequence[str], rows: Sequence[int],
               columns: int, bias: bool) -> ir.Value:
        """x [..., columns] through the linear layers `stem + layer`, their outputs side by side:
        [..., sum of rows]."""
        names = [stem + layer for layer in layers]
        name = stem + "_".join(layers)
        weight = self.rows([f"{n}.weight" for n in names], [(r, columns) for r in rows],
                           f"{name}.weight", transposed=True)
        out = self.op("MatMul", x, weight)
        if bias:
            out = self.op("Add", out, self.rows([f"{n}.bias" for n in names],
                                                [(r,) for r in rows], f"{name}.bias"))
        return out

    def rows(self, tensors: Sequence[str], shapes: Sequence[tuple[int, ...]], name: str, *,
             transposed: bool = False) -> ir.Value:
        """The weight `name`: tensors of the checkpoint, one below the other."""
        shape = (sum(s[0] for s in shapes), *shapes[0][1:])
        return self.weight(name, shape[::-1] if transposed else shape,
                           lambda: self._load(tensors, shapes, transposed))

    def tensor(self, name: str, *shape: int) -> ir.Value:
        """A tensor of the checkpoint as it is."""
        return self.rows([name], [shape], name)

    def weight(self, name: str, shape: Sequence[int], make: Callable[[], torch.Tensor]
               ) -> ir.Value:
        """The weight `name`, made when the graph is saved; the same value when asked for again."""
        if name not in self._named:
            lazy = ir.LazyTensor(lambda: TorchTensor(make()), self.dtype, ir.Shape(shape),
                                 name=name)
            self._named[name] = self.tape.initializer(lazy)
        return self._named[name]

    def ints(self, *values: int, scalar: bool = False) -> ir.Value:
        """A constant of 64-bit integers: a vector, or the one number that is given."""
        name = ("int." if scalar else "ints.") + "_".join(map(str, values))
        if name not in self._named:
            tensor = ir.tensor(values[0] if scalar else list(values), ir.DataType.INT64, name=name)
            self._named[name] = self.tape.initializer(tensor)
        return self._named[name]

    def _load(self, tensors: Sequence[str], shapes: Sequence[tuple[int, ...]], transposed: bool
              ) -> torch.Tensor:
        loaded = self.source.tensors(tensors)
        for name, shape in zip(tensors, shapes, strict=True):
            if tuple(loaded[name].shape) != shape:
                raise InputError(f"{self.source.folder}: tensor {name} has the shape "
                                 f"{list(loaded[name].shape)}, and config.json says {list(shape)}")
        parts = {name: loaded[name].to(self.torch_dtype) for name in tensors}
        for name, part in parts.items():
            # Much faster than looking at each value: both are NaN where one value is.
            if not torch.stack(part.aminmax()).isfinite().all():
                require_finite({name: loaded[name]}, self.source.folder)
                raise InputError(f"{self.source.folder}: tensor {name} has values that "
                                 f"{str(self.torch_dtype).removeprefix('torch.')} cannot hold; "
                                 "export bfloat16 or float32")
        joined = torch.cat(list(parts.values())) if len(parts) > 1 else parts[tensors[0]]
        return joined.T.contiguous() if transposed else joined
