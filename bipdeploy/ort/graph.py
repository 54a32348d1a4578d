"""A causal language model as an ONNX graph, written from the widths of each block.

Two styles. `gqa` uses onnxruntime's fused operators and is the faster; it reads right-padded
batches only. `std` uses the standard operators of opset 24 and takes padding on either side.

Inputs: `input_ids` [batch, sequence], `attention_mask` [batch, total] over past and new tokens,
both int64, and `past_key_values.{n}.key` and `.value` [batch, KV heads, past, head_dim]. Outputs:
`logits` [batch, sequence, vocabulary] and `present.{n}.key` and `.value`. Positions are counted
from the mask. n counts the blocks that have attention: one whose attention was removed keeps no
cache, and leaves no gap in the numbers.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any

import onnx_ir as ir
import torch

from bipdeploy.errors import InputError, did_you_mean
from bipdeploy.model import loading
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.model.families import Architecture
from bipdeploy.ort import rope
from bipdeploy.ort.nodes import IR_VERSION, MICROSOFT, Nodes

DTYPES = ("float32", "float16", "bfloat16")
WRITTEN = ("llama", "mistral", "qwen2", "qwen3")  # families whose blocks `_Writer` knows
# Names of values in every graph: what the blocks read first, and what the head reads.
EMBEDDED, HIDDEN = "embedded", "hidden_states"


def build(source: Checkpoint, style: str, dtype: str) -> ir.Model:
    """The graph of a checkpoint; its weights are read when it is saved.

    Raises InputError for a style, a type or a model that there is no way to write.
    """
    if style not in STYLES:
        raise InputError(f"style {style!r} is no ONNX graph style{did_you_mean(style, STYLES)}")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is no type of ONNX weights{did_you_mean(dtype, DTYPES)}")
    arch = source.architecture
    config = loading.load_config(source.folder)
    _check(arch, config)
    return STYLES[style](Nodes(source, getattr(torch, dtype)), arch, config).model()


def named_value(model: ir.Model, name: str) -> ir.Value:
    """The value `name` of a graph."""
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def _check(arch: Architecture, config: Any) -> None:
    if arch.family.model_type not in WRITTEN:
        raise InputError(f"model_type {arch.family.model_type!r} has no ONNX writer (known: "
                         f"{', '.join(WRITTEN)})")
    if config.hidden_act != "silu":
        raise InputError(f"hidden_act is {config.hidden_act!r}, and the ONNX writer knows silu")
    for index, widths in enumerate(arch.blocks):
        if widths.kv_heads and widths.heads % widths.kv_heads:
            raise InputError(f"block {index} has {widths.heads} query heads, which is no multiple "
                             f"of its {widths.kv_heads} KV heads; ONNX attention needs that")
    rope.check(config, arch.max_positions)


def window_of(config: Any, arch: Architecture, index: int) -> int | None:
    """Tokens that block `index` looks back on, itself included; None: all that there can be."""
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if types is not None and types[index] != "sliding_attention":
        return None
    return window if window and window < arch.max_positions else None


class _Writer(ABC):
    """What both styles share: embeddings, linear layers, the order of things in a block."""

    opset: int

    def __init__(self, nodes: Nodes, arch: Architecture, config: Any):
        self.n, self.arch, self.config = nodes, arch, config
        self.inputs: list[ir.Value] = []
        self.present: list[ir.Value] = []
        self.input_ids = self._input("input_ids", ir.DataType.INT64, "batch", "sequence")
        self.mask = self._input("attention_mask", ir.DataType.INT64, "batch", "total")
        # The residual stream, and what the last part adds to it, which is not added yet.
        self.stream: ir.Value
        self.pending: ir.Value | None = None

    @abstractmethod
    def prepare(self) -> None:
        """Nodes that all blocks read: lengths, positions, masks."""

    @abstractmethod
    def norm(self, name: str) -> ir.Value:
        """Add what is pending to the stream; the stream under RMSNorm `name`."""

    @abstractmethod
    def head_norm(self, x: ir.Value, name: str) -> ir.Value:
        """x [batch, sequence, heads, head_dim] under RMSNorm `name` of each head."""

    @abstractmethod
    def attend(self, index: int, qkv: list[ir.Value], cache: list[ir.Value]) -> list[ir.Value]:
        """Attention of packed or separate q, k and v: its output, and the new key and value."""

    def model(self) -> ir.Model:
        embeddings = self.n.tensor("model.embed_tokens.weight", self.arch.vocabulary,
                                   self.arch.hidden)
        self.stream = self.n.op("Gather", embeddings, self.input_ids)
        self.stream.name = EMBEDDED
        self.prepare()
        cached = 0
        for index, widths in enumerate(self.arch.blocks):
            if widths.heads:
                self._attention(index, cached)
                cached += 1
            if widths.intermediate:
                self._ffn(index)
        hidden = self.norm("model.norm.weight")
        hidden.name = HIDDEN
        logits = self._output(self._head(hidden, embeddings), "logits", "batch", "sequence",
                              self.arch.vocabulary)
        graph = ir.Graph(self.inputs, [logits, *self.present], nodes=self.n.tape.nodes,
                         initializers=self.n.tape.initializers, name=self.arch.family.model_type,
                         opset_imports={"": self.opset, MICROSOFT: 1})
        cached_blocks = [i for i, w in enumerate(self.arch.blocks) if w.heads]
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="bipdeploy",
                        metadata_props={"cached_blocks": json.dumps(cached_blocks)})

    def _attention(self, index: int, cached: int) -> None:
        widths, size = self.arch.blocks[index], self.arch.head_dim
        stem = f"model.layers.{index}."
        normed = self.norm(stem + "input_layernorm.weight")
        rows = [widths.heads * size, widths.kv_heads * size, widths.kv_heads * size]
        qkv = [self.n.linear(normed, stem + "self_attn.", ["q_proj", "k_proj", "v_proj"], rows,
                             self.arch.hidden, self.arch.qkv_bias)]
        if self.arch.family.qk_norm:
            q, k, v = self.unpacked(qkv[0], rows)
            qkv = [*(self._head_normed(x, f"{stem}self_attn.{which}_norm.weight", width)
                     for which, x, width in (("q", q, rows[0]), ("k", k, rows[1]))), v]
        shape = ("batch", widths.kv_heads, "past", size)
        past = [self._input(f"past_key_values.{cached}.{part}", self.n.dtype, *shape)
                for part in ("key", "value")]
        out, *new = self.attend(index, qkv, past)
        self.present += [self._output(made, f"present.{cached}.{part}", "batch", widths.kv_heads,
                                      "total", size)
                         for part, made in zip(("key", "value"), new, strict=True)]
        self.pending = self.n.linear(out, stem + "self_attn.", ["o_proj"], [self.arch.hidden],
                                     rows[0], self.arch.output_bias)

    def _head_normed(self, x: ir.Value, name: str, width: int) -> ir.Value:
        """x [batch, sequence, width] under the RMSNorm of its heads."""
        heads = self.n.op("Reshape", x, self.n.ints(0, 0, -1, self.arch.head_dim))
        return self.n.op("Reshape", self.head_norm(heads, name), self.n.ints(0, 0, width))

    def unpacked(self, qkv: ir.Value, rows: list[int]) -> list[ir.Value]:
        return list(self.n.ops("Split", 3, qkv, self.n.ints(*rows), axis=-1))

    def _ffn(self, index: int) -> None:
        width, hidden = self.arch.blocks[index].intermediate, self.arch.hidden
        stem, bias = f"model.layers.{index}.", self.arch.ffn_bias
        normed = self.norm(stem + "post_attention_layernorm.weight")
        gate, up = (self.n.linear(normed, stem + "mlp.", [layer], [width], hidden, bias)
                    for layer in ("gate_proj", "up_proj"))
        gated = self.n.op("Mul", gate, self.n.op("Sigmoid", gate))
        self.pending = self.n.linear(self.n.op("Mul", gated, up), stem + "mlp.", ["down_proj"],
                                     [hidden], width, self.arch.down_bias)

    def _head(self, hidden: ir.Value, embeddings: ir.Value) -> ir.Value:
        if not self.arch.tied:
            return self.n.linear(hidden, "", ["lm_head"], [self.arch.vocabulary], self.arch.hidden,
                                 bias=False)
        # Gemm reads the embeddings as they lie, transposed; MatMul would need a second copy.
        flat = self.n.op("Reshape", hidden, self.n.ints(-1, self.arch.hidden))
        scores = self.n.op("Gemm", flat, embeddings, transB=1)
        sizes = self.n.op("Concat", self.n.op("Shape", hidden, start=0, end=2),
                          self.n.ints(self.arch.vocabulary), axis=0)
        return self.n.op("Reshape", scores, sizes)

    def tables(self) -> list[ir.Value]:
        """cos and sin [positions, head_dim / 2]."""
        positions, half = self.arch.max_positions, self.arch.head_dim // 2

        def both() -> tuple[torch.Tensor, torch.Tensor]:
            return rope.tables(self.arch.family, self.config, positions, self.n.torch_dtype)

        return [self.n.weight("rope.cos", (positions, half), lambda: both()[0]),
                self.n.weight("rope.sin", (positions, half), lambda: both()[1])]

    def _input(self, name: str, dtype: ir.DataType, *shape: str | int) -> ir.Value:
        value = ir.val(name, dtype, shape)
        self.inputs.append(value)
        return value

    def _output(self, value: ir.Value, name: str, *shape: str | int) -> ir.Value:
        value.name, value.shape, value.dtype = name, ir.Shape(shape), self.n.dtype
        return value


class _Gqa(_Writer):
    """GroupQueryAttention with the rotation in it, and sums fused into the norms."""

    opset = 21

    def prepare(self) -> None:
        # The kernels read the two lengths as 32-bit integers, the second on the CPU: Shape keeps
        # it there.
        counts = self.n.op("ReduceSum", self.mask, self.n.ints(1), keepdims=0)
        last = self.n.op("Sub", counts, self.n.ints(1))
        total = self.n.op("Gather", self.n.op("Shape", self.mask), self.n.ints(1, scalar=True))
        self.lengths = [self.n.op("Cast", value, to=ir.DataType.INT32) for value in (last, total)]

    def norm(self, name: str) -> ir.Value:
        weight = self.n.tensor(name, self.arch.hidden)
        if self.pending is None:
            return self._simplified(self.stream, weight)
        normed, _, _, self.stream = self.n.ops(
            "SkipSimplifiedLayerNormalization", 4, self.stream, self.pending, weight,
            domain=MICROSOFT, epsilon=self.config.rms_norm_eps)
        self.pending = None
        return normed

    def head_norm(self, x: ir.Value, name: str) -> ir.Value:
        return self._simplified(x, self.n.tensor(name, self.arch.head_dim))

    def _simplified(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        return self.n.op("SimplifiedLayerNormalization", x, weight, axis=-1, stash_type=1,
                         epsilon=self.config.rms_norm_eps)

    def attend(self, index: int, qkv: list[ir.Value], cache: list[ir.Value]) -> list[ir.Value]:
        widths = self.arch.blocks[index]
        inputs = qkv if len(qkv) == 3 else [qkv[0], None, None]
        return list(self.n.ops(
            "GroupQueryAttention", 3, *inputs, *cache, *self.lengths, *self.tables(),
            domain=MICROSOFT, num_heads=widths.heads, kv_num_heads=widths.kv_heads, do_rotary=1,
            scale=self.arch.head_dim ** -0.5,
            local_window_size=window_of(self.config, self.arch, index) or -1))


class _Std(_Writer):
    """The standard Attention with the cache in it, under a mask that says all there is to say."""

    opset = 24

    def prepare(self) -> None:
        total = self.n.op("Gather", self.n.op("Shape", self.mask), self.n.ints(1, scalar=True))
        new = self.n.op("Gather", self.n.op("Shape", self.input_ids), self.n.ints(1, scalar=True))
        past = self.n.op("Sub", total, new)
        zero, one = self.n.ints(0, scalar=True), self.n.ints(1, scalar=True)
        counted = self.n.op("Sub", self.n.op("CumSum", self.mask, one), one)
        self.key_positions = self.n.op("Max", counted, zero)
        self.positions = self.n.op("Slice", self.key_positions,
                                   self.n.op("Unsqueeze", past, self.n.ints(0)),
                                   self.n.op("Unsqueeze", total, self.n.ints(0)), self.n.ints(1))
        keys = self.n.op("Range", zero, total, one)
        queries = self.n.op("Unsqueeze", self.n.op("Range", past, total, one), self.n.ints(1))
        # A token of padding sees itself, or its row would be empty and its output no number.
        real = self.n.op("Unsqueeze", self.n.op("Cast", self.mask, to=ir.DataType.BOOL),
                         self.n.ints(1, 2))
        seen = self.n.op("Or", real, self.n.op("Equal", keys, queries))
        before = self.n.op("LessOrEqual", keys, queries)
        self.masks: dict[int | None, ir.Value] = {None: self.n.op("And", seen, before)}

    def norm(self, name: str) -> ir.Value:
        if self.pending is not None:
            self.stream = self.n.op("Add", self.stream, self.pending)
            self.pending = None
        return self._rms(self.stream, self.n.tensor(name, self.arch.hidden))

    def head_norm(self, x: ir.Value, name: str) -> ir.Value:
        return self._rms(x, self.n.tensor(name, self.arch.head_dim))

    def _rms(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        return self.n.op("RMSNormalization", x, weight, axis=-1,
                         epsilon=self.config.rms_norm_eps)

    def attend(self, index: int, qkv: list[ir.Value], cache: list[ir.Value]) -> list[ir.Value]:
        widths, size = self.arch.blocks[index], self.arch.head_dim
        rows = [widths.heads * size, widths.kv_heads * size, widths.kv_heads * size]
        q, k, v = qkv if len(qkv) == 3 else self.unpacked(qkv[0], rows)
        q, k = (self.n.op("RotaryEmbedding", x, *self.tables(), self.positions, num_heads=heads)
                for x, heads in ((q, widths.heads), (k, widths.kv_heads)))
        return list(self.n.ops(
            "Attention", 3, q, k, v, self._mask(window_of(self.config, self.arch, index)), *cache,
            q_num_heads=widths.heads, kv_num_heads=widths.kv_heads, scale=size ** -0.5))

    def _mask(self, window: int | None) -> ir.Value:
        """Which key each query sees: [batch, 1, sequence, total]."""
        if window not in self.masks:
            # By positions, not columns: padding between two tokens is no distance.
            first = self.n.op("Sub", self.positions, self.n.ints(window or 0, scalar=True))
            near = self.n.op("Greater",
                             self.n.op("Unsqueeze", self.key_positions, self.n.ints(1, 2)),
                             self.n.op("Unsqueeze", first, self.n.ints(1, 3)))
            self.masks[window] = self.n.op("And", self.masks[None], near)
        return self.masks[window]


STYLES: dict[str, type[_Writer]] = {"gqa": _Gqa, "std": _Std}
