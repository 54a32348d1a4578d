"""Smaller forms of a float32 ONNX folder, made by onnxruntime's own quantisers.

- `int4`, `int8`: weights in blocks of 32 inputs, with 4 or 8 bits and a scale and zero point for
  each; products are taken in 8-bit integers. Embeddings and head have 8 bits in both, and are
  stored once where they are tied. A width that is no multiple of 32 is filled up with zeros.
- `int8_dynamic`: 8-bit weights with a scale for each output, and activations quantised as they
  come; for CPUs only. Embeddings stay float32. A tied head is stored once more, in 8 bits: every
  token reads all of it, and of the embeddings one row.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from bipdeploy.errors import InputError
from bipdeploy.ort import folder as onnx_folder
from bipdeploy.ort.folder import DATA, MODEL, Contents
from bipdeploy.ort.graph import EMBEDDED, HIDDEN, named_value
from bipdeploy.ort.installed import require
from bipdeploy.ort.nodes import MICROSOFT

BLOCK = 32
INT8_PRODUCTS = 4  # MatMulNBits' accuracy_level


def quantize(source: Path, out: Path, kind: str) -> None:
    """Write the new folder `out`: that of `source` with weights of `kind`, see `KINDS`.

    All weights are in memory meanwhile, for int8_dynamic three times. Raises InputError for another
    kind, for a folder that is not float32, and where onnxruntime is missing.
    """
    if kind not in KINDS:
        raise InputError(f"{kind!r} is no way to quantise; use {', '.join(KINDS)}")
    require("onnxruntime")
    contents = onnx_folder.read(source)
    if contents.dtype != "float32" or contents.quantized:
        raise InputError(f"{source} holds {contents.quantized or contents.dtype} weights; quantise "
                         "a float32 export")
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=out) as place, _quiet():
        model = KINDS[kind](ir.load(source / MODEL), contents, source, Path(place))
        ir.save(model, out / MODEL, external_data=DATA)
    onnx_folder.carry(source, out)
    onnx_folder.finish(out, replace(contents, quantized=kind))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantisers from logging a line for every node; importing one sets logging up so."""
    root = logging.getLogger()
    before = (root.handlers[:], root.level, root.manager.disable)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        root.handlers[:], root.level, root.manager.disable = before


def _blockwise(model: ir.Model, contents: Contents, source: Path, _: Path, *, bits: int
               ) -> ir.Model:
    from onnx.external_data_helper import load_external_data_for_model
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    configs = {b: DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, bits=b,
                                               accuracy_level=INT8_PRODUCTS) for b in (bits, 8)}
    _quantize_embeddings(model, contents, configs[8])
    head = _producer(model, "logits").name
    proto = ir.to_proto(model)
    load_external_data_for_model(proto, str(source))
    for config, left_out in ((configs[bits], [head]), (configs[8], [])):
        quantizer = MatMulNBitsQuantizer(proto, nodes_to_exclude=left_out, algo_config=config)
        quantizer.process()
        proto = quantizer.model.model
    return ir.from_proto(proto)


def _quantize_embeddings(model: ir.Model, contents: Contents, config: Any) -> None:
    """Make the embeddings [V, D] 8-bit blocks [V, D / 32, 32], which a tied head reads too."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantizer

    table = _embeddings(model)
    rows, width = table.shape
    if width % BLOCK:
        return
    parts = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(table.T))
    tape = ir.tape.Tape(model.graph)
    packed, scales, zeros = (tape.initializer(ir.tensor(part, name=f"embeddings.{name}"))
                             for name, part in zip(("blocks", "scales", "zeros"), parts,
                                                   strict=True))
    shape = tape.initializer(ir.tensor([rows, width // BLOCK, 1], name="embeddings.shape"))
    whole = tape.initializer(ir.tensor([0, 0, width], name="embeddings.row"))
    columns = [tape.op("Reshape", [part, shape]) for part in (scales, zeros)]
    looked_up = tape.op(
        "GatherBlockQuantized", [packed, model.graph.inputs[0], *columns],
        {"bits": 8, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 2}, domain=MICROSOFT)
    _replace(model, EMBEDDED, tape.op("Reshape", [looked_up, whole]))
    if contents.tied:
        _replace(model, "logits", tape.op(
            "MatMulNBits", [named_value(model, HIDDEN), packed, scales, zeros],
            {"K": width, "N": rows, "bits": 8, "block_size": BLOCK,
             "accuracy_level": INT8_PRODUCTS}, domain=MICROSOFT))


def _dynamic(model: ir.Model, contents: Contents, _: Path, place: Path) -> ir.Model:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if contents.tied:
        tape = ir.tape.Tape(model.graph)
        weight = tape.initializer(ir.tensor(np.ascontiguousarray(_embeddings(model).T),
                                            name="lm_head.weight"))
        _replace(model, "logits", tape.op("MatMul", [named_value(model, HIDDEN), weight],
                                          name="lm_head"))
    ir.save(model, place / MODEL, external_data=DATA)
    # Seven bits, because CPUs without VNNI add pairs of products in 16 bits, which eight overflow.
    quantize_dynamic(place / MODEL, place / "quantized.onnx", ["MatMul"], per_channel=True,
                     reduce_range=True, weight_type=QuantType.QInt8,
                     use_external_data_format=True,
                     extra_options={"DefaultTensorType": ir.DataType.FLOAT})
    return ir.load(place / "quantized.onnx")


def _producer(model: ir.Model, name: str) -> ir.Node:
    node = named_value(model, name).producer()
    assert node is not None
    return node


def _embeddings(model: ir.Model) -> np.ndarray:
    """The float32 table [V, D], not copied."""
    table = _producer(model, EMBEDDED).inputs[0]
    assert table is not None and table.const_value is not None
    return table.const_value.numpy()


def _replace(model: ir.Model, name: str, new: ir.Value) -> None:
    """Put `new` in the place of the value `name`, and remove what only that one needed."""
    old = named_value(model, name)
    old.name, new.name = f"{name}.old", name
    new.shape, new.dtype = old.shape, ir.DataType.FLOAT
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    model.graph.sort()
    RemoveUnusedNodesPass()(model)


# The ways to quantise, by the name that a folder's record says.
KINDS: dict[str, Callable[[ir.Model, Contents, Path, Path], ir.Model]] = {
    "int8_dynamic": _dynamic,
    "int8": partial(_blockwise, bits=8),
    "int4": partial(_blockwise, bits=4),
}
