"""The same graph with logits for the last token of each row only.

Generating reads no other, and over a large vocabulary the head is much of a prompt's work. The
second graph reads the weights of the first where they lie.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from bipdeploy.ort.graph import HIDDEN, named_value


def write(full: Path, out: Path) -> None:
    """Write the graph file `out` beside `full`, whose external data it shares."""
    model = ir.load(full)
    graph = model.graph
    hidden = named_value(model, HIDDEN)
    tape = ir.tape.Tape(graph)

    def ints(name: str, values: list[int] | int) -> ir.Value:
        return tape.initializer(ir.tensor(values, ir.DataType.INT64, name=f"last.{name}"))

    ids, mask = graph.inputs[:2]
    readers = [(use.node, use.idx) for use in hidden.uses()]
    zero, one = ints("zero", 0), ints("one", 1)
    new = tape.op("Gather", [tape.op("Shape", [ids]), one])
    # The last column that is no padding, on whichever side the padding is. A row that is all
    # padding but for earlier tokens has one new token, at 0.
    tail = tape.op("Slice", [mask, tape.op("Neg", [tape.op("Unsqueeze", [new, zero])]),
                             ints("end", [2**31 - 1]), ints("axis", [1])])
    places = tape.op("Mul", [tail, tape.op("Range", [zero, new, one])])
    index = tape.op("ReduceMax", [places, ints("columns", [1])], {"keepdims": 1})
    rows = tape.op("GatherND", [hidden, tape.op("Unsqueeze", [index, ints("inner", [2])])],
                   {"batch_dims": 1})
    for node, position in readers:
        node.replace_input_with(position, rows)
    logits = graph.outputs[0]
    assert logits.shape is not None
    logits.shape = ir.Shape((logits.shape[0], 1, logits.shape[2]))
    graph.sort()
    ir.save(model, out)
