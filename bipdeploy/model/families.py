"""Model families: what a block is made of, how its parts couple, and how much they weigh.

Everything here is read from `config.json` alone and needs no torch, so that a recipe can be
checked and a plan be made before any weight is loaded. To add a family whose blocks use the
same projection names, add a line to `FAMILIES`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bipdeploy.errors import InputError, did_you_mean
from bipdeploy.recipe.figures import compared

# Key of our own per-block format: o_proj and down_proj have biases whatever the family's has.
OUTPUT_BIAS = "output_bias"
# Model types of our own per-block checkpoints are the family's name behind this prefix.
PER_BLOCK_PREFIX = "bipdeploy_"


@dataclass(frozen=True)
class Family:
    """Where a model type keeps the parts that are pruned together.

    `query_rows`, `kv_rows`, `query_columns` name tensors (relative to the block) that are cut
    by whole heads of `head_dim` rows or columns; `ffn_rows` and `ffn_columns` by FFN channel.
    A tensor that a checkpoint does not have (a bias) is passed over.
    """

    model_type: str
    class_prefix: str  # of the classes in transformers.models.<model_type>
    attention_bias: bool = False  # q, k and v have biases whatever the config says
    qk_norm: bool = False  # RMSNorm over head_dim on q and k, shared by all heads
    head_dim: int | None = None  # where config.json does not say; else hidden size / heads
    kv_heads: int | None = None  # where config.json does not say; else as many as query heads
    query_rows: tuple[str, ...] = ("self_attn.q_proj.weight", "self_attn.q_proj.bias")
    kv_rows: tuple[str, ...] = ("self_attn.k_proj.weight", "self_attn.k_proj.bias",
                                "self_attn.v_proj.weight", "self_attn.v_proj.bias")
    query_columns: tuple[str, ...] = ("self_attn.o_proj.weight",)
    ffn_rows: tuple[str, ...] = ("mlp.gate_proj.weight", "mlp.gate_proj.bias",
                                 "mlp.up_proj.weight", "mlp.up_proj.bias")
    ffn_columns: tuple[str, ...] = ("mlp.down_proj.weight",)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "Llama"),
        Family("mistral", "Mistral", kv_heads=8),
        Family("qwen2", "Qwen2", attention_bias=True),
        Family("qwen3", "Qwen3", qk_norm=True, head_dim=128),
    )
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a `config.json`. Raises InputError where there is none."""
    stated = str(config.get("model_type", ""))
    name = stated.removeprefix(PER_BLOCK_PREFIX)
    if name not in FAMILIES:
        hint = (f" (known: {', '.join(sorted(FAMILIES))})" if _is_another(name)
                else did_you_mean(name, FAMILIES))
        raise InputError(f"model_type {stated!r} has no family{hint}")
    return FAMILIES[name]


def _is_another(name: str) -> bool:
    """Whether transformers has such a model type, so that it is no slip of the pen: mixtral is not
    meant to be mistral."""
    package = importlib.util.find_spec("transformers")
    places = package.submodule_search_locations if package else None
    return bool(name) and any((Path(place) / "models" / name).is_dir() for place in places or ())


class Heads(NamedTuple):
    """The width of an attention: its KV heads, and the query heads of each. Zeros: it is gone."""

    kv: int
    queries: int

    @property
    def total(self) -> int:
        """Query heads in all."""
        return self.kv * self.queries


Width = int | Heads  # of one part of a block: channels of its FFN, or heads of its attention


@dataclass(frozen=True)
class BlockWidths:
    """The prunable widths of one transformer block. Zero heads or channels: a part is removed."""

    heads: int
    kv_heads: int
    intermediate: int

    @property
    def group(self) -> int:
        """Query heads per KV head; 0 where the block has no attention."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def attention(self) -> Heads:
        return Heads(self.kv_heads, self.group)

    def having(self, width: Width) -> BlockWidths:
        """The same with another attention or another number of channels."""
        if isinstance(width, Heads):
            return BlockWidths(width.total, width.kv, self.intermediate)
        return BlockWidths(self.heads, self.kv_heads, width)

    def of(self, part: str) -> Width:
        """The width of a part: "heads" or "ffn"."""
        return self.attention if part == "heads" else self.intermediate


@dataclass(frozen=True)
class Architecture:
    """The sizes of a whole model, enough to count its parameters exactly."""

    family: Family
    hidden: int
    head_dim: int
    vocabulary: int
    tied: bool
    qkv_bias: bool
    output_bias: bool  # of o_proj
    ffn_bias: bool  # of gate_proj and up_proj
    down_bias: bool
    max_positions: int
    blocks: tuple[BlockWidths, ...]

    @property
    def uniform(self) -> bool:
        return len(set(self.blocks)) == 1 and self.blocks[0].heads > 0 < self.blocks[0].intermediate

    @property
    def widest(self) -> int:
        """Inputs of the widest output projection, of an attention or an FFN."""
        return max(max(w.intermediate, w.heads * self.head_dim) for w in self.blocks)

    def kv_group_parameters(self, block: int, group: int | None = None) -> int:
        """Parameters of one KV head with its query heads, all or `group` of them: rows of q, k, v
        and columns of o."""
        queries = self.blocks[block].group if group is None else group
        rows = (queries + 2) * self.head_dim
        return rows * (self.hidden + self.qkv_bias) + queries * self.head_dim * self.hidden

    def channel_parameters(self) -> int:
        """Parameters of one FFN channel: a row of gate and of up, a column of down."""
        return 3 * self.hidden + 2 * self.ffn_bias

    def block_parameters(self, block: int, widths: BlockWidths | None = None) -> int:
        """All parameters of a block, at its own widths or at those given."""
        w = widths or self.blocks[block]
        total = w.intermediate * self.channel_parameters()
        if w.kv_heads:
            total += w.kv_heads * self.kv_group_parameters(block, w.group)
            total += self.hidden + self.hidden * self.output_bias
            total += 2 * self.head_dim * self.family.qk_norm
        if w.intermediate:
            total += self.hidden + self.hidden * self.down_bias
        return total

    def parameters(self, blocks: Sequence[BlockWidths] | None = None) -> int:
        """All parameters of the model, tied embeddings counted once."""
        widths = blocks or self.blocks
        body = sum(self.block_parameters(i, w) for i, w in enumerate(widths))
        return body + self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor of a checkpoint by name, with its shape."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for index, widths in enumerate(self.blocks):
            for name, shape in self._block_tensors(widths):
                yield f"model.layers.{index}.{name}", shape
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def _block_tensors(self, widths: BlockWidths) -> Iterator[tuple[str, tuple[int, ...]]]:
        queries, keys = widths.heads * self.head_dim, widths.kv_heads * self.head_dim
        matrices: list[tuple[str, int, int, bool]] = []
        if widths.kv_heads:
            yield "input_layernorm.weight", (self.hidden,)
            matrices += [("self_attn.q_proj", queries, self.hidden, self.qkv_bias),
                         ("self_attn.k_proj", keys, self.hidden, self.qkv_bias),
                         ("self_attn.v_proj", keys, self.hidden, self.qkv_bias),
                         ("self_attn.o_proj", self.hidden, queries, self.output_bias)]
            if self.family.qk_norm:
                yield "self_attn.q_norm.weight", (self.head_dim,)
                yield "self_attn.k_norm.weight", (self.head_dim,)
        if widths.intermediate:
            yield "post_attention_layernorm.weight", (self.hidden,)
            matrices += [("mlp.gate_proj", widths.intermediate, self.hidden, self.ffn_bias),
                         ("mlp.up_proj", widths.intermediate, self.hidden, self.ffn_bias),
                         ("mlp.down_proj", self.hidden, widths.intermediate, self.down_bias)]
        for name, rows, columns, bias in matrices:
            yield f"{name}.weight", (rows, columns)
            if bias:
                yield f"{name}.bias", (rows,)

    def kv_bytes_per_token(self, blocks: Sequence[BlockWidths] | None = None,
                           bytes_per_value: int = 2) -> int:
        """Bytes of K and V that one token keeps in the cache, over all blocks."""
        return sum(2 * w.kv_heads * self.head_dim * bytes_per_value for w in blocks or self.blocks)


def size_figures(dense: Architecture, pruned: Architecture) -> dict[str, float]:
    """Parameters and bytes, dense and pruned. Bytes are those of 16-bit weights and cache."""
    whole, smaller = (sum(arch.block_parameters(i) for i in range(len(arch.blocks)))
                      for arch in (dense, pruned))
    return {**compared("parameters", dense.parameters(), pruned.parameters()),
            **compared("block_parameters", whole, smaller),
            **compared("weights_bytes", 2 * dense.parameters(), 2 * pruned.parameters()),
            **compared("kv_bytes_per_token", dense.kv_bytes_per_token(),
                       pruned.kv_bytes_per_token())}


# How weights may be quantised that can be read whole all the same; see `plain.py`.
DEQUANTIZED = ("fp8", "compressed-tensors")
# Sizes that are counted with, where they are stated.
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "intermediate_size", "vocab_size", "head_dim", "max_position_embeddings")


def _require_plain(config: Mapping[str, Any]) -> None:
    """Raise InputError for sizes that are no numbers, that do not fit, or that are quantised."""
    stated = config.get("quantization_config")
    if stated:
        method = stated.get("quant_method") if isinstance(stated, Mapping) else stated
        fix = ("set model.dequantize: true to prune them as bfloat16, or " if method in DEQUANTIZED
               else "")
        raise InputError(f"config.json: quantization_config: the weights are quantised ({method}), "
                         f"and whole ones are what is pruned; {fix}give the model that it was made "
                         "from")
    blocks = config.get("per_layer_config") or {}
    if not isinstance(blocks, Mapping):
        raise InputError(f"config.json: per_layer_config: {blocks!r} is no mapping of blocks")
    for own in (config, *blocks.values()):
        for name in _SIZES:
            value = own.get(name)
            if value is not None and (type(value) is not int or value <= 0):
                raise InputError(f"config.json: {name}: {value!r} is no whole number above 0; "
                                 "correct it")
        heads, kv = own.get("num_attention_heads"), own.get("num_key_value_heads")
        if heads and kv and heads % kv:
            raise InputError(f"config.json: {heads} query heads are no multiple of {kv} KV heads; "
                             "correct num_attention_heads or num_key_value_heads")


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read the sizes from a `config.json`, stock or per-block (`per_layer_config`).

    Raises InputError for an unknown model type or a missing size.
    """
    family = family_of(config)
    missing = [k for k in ("hidden_size", "num_hidden_layers", "num_attention_heads",
                           "intermediate_size", "vocab_size") if config.get(k) is None]
    if missing:
        raise InputError(f"config.json of a {family.model_type} model lacks {', '.join(missing)}")
    _require_plain(config)
    heads = config["num_attention_heads"]
    overrides = {int(i): v for i, v in (config.get("per_layer_config") or {}).items()}
    blocks = []
    for i in range(config["num_hidden_layers"]):
        own = {**config, **overrides.get(i, {})}
        skipped = own.get("skip") or ()
        queries = 0 if "attention" in skipped else own["num_attention_heads"]
        kv = 0 if "attention" in skipped else (
            own.get("num_key_value_heads") or family.kv_heads or queries)
        blocks.append(BlockWidths(queries, kv, 0 if "mlp" in skipped else own["intermediate_size"]))
    stated_bias = bool(config.get("attention_bias", False))
    added_bias = bool(config.get(OUTPUT_BIAS, False))
    return Architecture(
        family=family,
        hidden=config["hidden_size"],
        head_dim=config.get("head_dim") or family.head_dim or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family.attention_bias or stated_bias,
        output_bias=added_bias or (stated_bias and not family.attention_bias),
        ffn_bias=bool(config.get("mlp_bias", False)),
        down_bias=added_bias or bool(config.get("mlp_bias", False)),
        max_positions=int(config.get("max_position_embeddings") or 2048),
        blocks=tuple(blocks),
    )
