"""Tiny models with random weights, one per family and head layout, made by transformers itself."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bipdeploy.model.sources import BUILTIN_FOLDER

PICO = BUILTIN_FOLDER / "pico"
VOCABULARY = 4096  # that of the built-in tokenizer, so that tiny models can be evaluated


def tiny_model(folder: Path, family: str = "llama", *, heads: int = 4, kv_heads: int = 2,
               blocks: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0,
               **settings: object) -> Path:
    """Write a random model of a family with the built-in tokenizer; returns its folder.

    Biases and norms are random too, so that a test sees it when one is sliced wrongly.
    """
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, intermediate_size=96, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=None,
        **{"hidden_size": 64, "head_dim": 32, "sliding_window": None,
           "tie_word_embeddings": False, **settings})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "embed" in name:
                parameter.normal_(0, 1.0)
            else:
                parameter.normal_(0, 0.2)
    model.to(dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((PICO / name).read_bytes())
    return folder


# family, head layout and settings: MHA and GQA, with and without biases and q/k norms.
VARIANTS: dict[str, dict] = {
    "llama-mha": {"family": "llama", "kv_heads": 4},
    "llama-gqa": {"family": "llama", "kv_heads": 2},
    "llama-biases": {"family": "llama", "kv_heads": 2, "attention_bias": True, "mlp_bias": True},
    "mistral-gqa": {"family": "mistral", "kv_heads": 2},
    "mistral-window": {"family": "mistral", "kv_heads": 2, "sliding_window": 8},
    "qwen2-mha": {"family": "qwen2", "kv_heads": 4},
    "qwen2-gqa": {"family": "qwen2", "kv_heads": 2},
    "qwen3-gqa": {"family": "qwen3", "kv_heads": 2},
    "qwen3-mha": {"family": "qwen3", "kv_heads": 4},
}
