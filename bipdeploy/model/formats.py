"""From widths to a `config.json`: a stock one where a stock model can hold them.

Imports no torch, so a plan can name the format before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bipdeploy.model.families import OUTPUT_BIAS, PER_BLOCK_PREFIX, Architecture, BlockWidths

CODE_FILE = "modeling_bipdeploy.py"
ZERO_ATTENTION = "zero_attention"  # key of the blocks whose attention is there, and all zeros

# Keys of the source that describe the old widths or the old class.
_REPLACED = {"architectures", "auto_map", "per_layer_config", "model_type",
             "allow_global_per_layer_attribute_access", "num_attention_heads",
             "num_key_value_heads", "intermediate_size", "head_dim", ZERO_ATTENTION}


def is_per_block(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of our own class, which the folder must then carry."""
    return str(config["model_type"]).startswith(PER_BLOCK_PREFIX)


def pruned_config(source: Mapping[str, Any], arch: Architecture,
                  blocks: Sequence[BlockWidths]) -> dict[str, Any]:
    """The `config.json` of a model of `arch` whose blocks have the widths `blocks`.

    Equal widths give a stock configuration with an explicit `head_dim`. transformers refuses a
    LLaMA whose head count does not divide the hidden size; such a model is written as a Mistral
    without a sliding window, which is the same network under a configuration that allows it.
    Different widths, or removed parts, give the per-block format.
    """
    kept = {k: v for k, v in source.items() if k not in _REPLACED}
    kept |= {"head_dim": arch.head_dim, "max_position_embeddings": arch.max_positions}
    family = arch.family.model_type
    first = blocks[0]
    if len(set(blocks)) == 1 and first.heads and first.intermediate and not kept.get(OUTPUT_BIAS):
        widths = _sizes(first)
        if family != "llama" or arch.hidden % first.heads == 0:
            return {**kept, **widths, "model_type": family,
                    "architectures": [f"{arch.family.class_prefix}ForCausalLM"]}
        if not (arch.qkv_bias or arch.ffn_bias):  # which Mistral does not have
            return {**kept, **widths, "model_type": "mistral", "sliding_window": None,
                    "architectures": ["MistralForCausalLM"]}
    return {**kept, **_per_block(blocks), **_class_names(arch)}


def biased_config(source: Mapping[str, Any], arch: Architecture) -> dict[str, Any]:
    """The `config.json` of the same model with a bias on every o_proj and down_proj.

    A stock LLaMA stays one: it has switches for biases of all its projections, and the other
    projections then have them too. Every other model gets the per-block format, which has a key
    for these two alone.
    """
    if arch.output_bias and arch.down_bias:
        return dict(source)
    if source["model_type"] == "llama":
        return {**source, "attention_bias": True, "mlp_bias": True}
    kept = {k: v for k, v in source.items() if k not in _REPLACED}
    return {**kept, "head_dim": arch.head_dim, OUTPUT_BIAS: True, **_per_block(arch.blocks),
            **_class_names(arch)}


def vllm_config(config: Mapping[str, Any], arch: Architecture,
                tensor_parallel: int = 1) -> dict[str, Any]:
    """The `config.json` under which vLLM serves a pruned checkpoint; often the same.

    Blocks without attention get one KV head and `tensor_parallel` query heads, and are listed
    under `ZERO_ATTENTION`. What vLLM's stock class would misread gets ours.
    """
    removed = [i for i, widths in enumerate(arch.blocks) if not widths.heads]
    blocks = [BlockWidths(w.heads or tensor_parallel, w.kv_heads or 1, w.intermediate)
              for w in arch.blocks]
    if not (removed or misread(config, arch)):
        return dict(config)
    kept = {k: v for k, v in config.items() if k not in _REPLACED}
    kept |= {"head_dim": arch.head_dim, **_per_block(blocks), **_class_names(arch)}
    return {**kept, ZERO_ATTENTION: removed} if removed else kept


def misread(config: Mapping[str, Any], arch: Architecture) -> bool:
    """Whether vLLM's stock class takes a stock configuration for another model: a Qwen2's head
    size is the hidden size by the number of heads there, whatever `head_dim` says."""
    return config["model_type"] == "qwen2" and arch.blocks[0].heads * arch.head_dim != arch.hidden


def _class_names(arch: Architecture) -> dict[str, Any]:
    stem = f"Bipdeploy{arch.family.class_prefix}"
    module = CODE_FILE.removesuffix(".py")
    return {"model_type": PER_BLOCK_PREFIX + arch.family.model_type,
            "architectures": [f"{stem}ForCausalLM"],
            "auto_map": {"AutoConfig": f"{module}.{stem}Config",
                         "AutoModel": f"{module}.{stem}Model",
                         "AutoModelForCausalLM": f"{module}.{stem}ForCausalLM"}}


def _sizes(widths: BlockWidths) -> dict[str, int]:
    return {"num_attention_heads": widths.heads, "num_key_value_heads": widths.kv_heads,
            "intermediate_size": widths.intermediate}


def _per_block(blocks: Sequence[BlockWidths]) -> dict[str, Any]:
    """The widest whole block as the global widths, and what differs from it by block."""
    whole = [b for b in blocks if b.heads and b.intermediate]
    common = max(whole, key=lambda b: (b.heads, b.intermediate)) if whole else BlockWidths(1, 1, 1)
    overrides: dict[str, Any] = {}
    for index, widths in enumerate(blocks):
        own: dict[str, Any] = {k: v for k, v in _sizes(widths).items()
                               if v and v != _sizes(common)[k]}
        skip = [part for part, size in (("attention", widths.heads), ("mlp", widths.intermediate))
                if not size]
        if skip:
            own["skip"] = skip
        if own:
            overrides[str(index)] = own
    # Code that reads a global width warns and goes on; it would raise otherwise.
    return {**_sizes(common), "per_layer_config": overrides,
            "allow_global_per_layer_attribute_access": True}
