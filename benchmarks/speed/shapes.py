"""Sizes of models that are measured with random weights, dense and pruned. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bipdeploy.model.families import architecture
from bipdeploy.model.formats import pruned_config
from bipdeploy.pruning.allocation import uniform_widths
from bipdeploy.recipe.prune import PruneSection


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaMA. `positions` leaves room for what is generated behind a prompt."""

    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    channels: int
    vocabulary: int
    tied: bool = False
    positions: int = 4096
    rope_theta: float = 10000.0


SHAPES = {
    "13B": Shape(5120, 40, 40, 40, 13824, 32000),  # LLaMA-13B
    "8B": Shape(4096, 32, 32, 8, 14336, 128256, positions=8192, rope_theta=500000.0),  # Llama-3-8B
    "7B": Shape(4096, 32, 32, 32, 11008, 32000),  # LLaMA-7B
    "1B": Shape(2048, 22, 32, 4, 5632, 32000),  # TinyLlama
    "700M": Shape(1536, 22, 24, 8, 4096, 32000, tied=True),
    "120M": Shape(768, 12, 12, 4, 2048, 32000, tied=True),
    "100M": Shape(768, 12, 12, 12, 2048, 32000),
    "98M": Shape(768, 12, 12, 12, 2048, 16384, tied=True),
    "30M": Shape(512, 8, 8, 4, 1408, 4096, tied=True),
    "tiny": Shape(64, 3, 4, 2, 96, 4096),
}


def config_of(name: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """The `config.json` of a shape."""
    shape = SHAPES[name]
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "hidden_size": shape.hidden, "num_hidden_layers": shape.blocks,
            "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.hidden // shape.heads, "intermediate_size": shape.channels,
            "vocab_size": shape.vocabulary, "max_position_embeddings": shape.positions,
            "rms_norm_eps": 1e-5, "rope_theta": shape.rope_theta, "hidden_act": "silu",
            "tie_word_embeddings": shape.tied, "bos_token_id": 0, "eos_token_id": 0,
            "dtype": dtype}


def pruned_of(config: dict[str, Any], ratio: float, round_to: int) -> dict[str, Any]:
    """The `config.json` of a model that is pruned to uniform widths; itself at ratio 0."""
    if not ratio:
        return config
    arch = architecture(config)
    section = PruneSection(ratio=ratio, round_to=round_to)
    return pruned_config(config, arch, uniform_widths(arch, section))
