"""Tiny models written as GGUF files, as llama.cpp's own converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from bipdeploy.errors import InputError
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.model.gguf import converted
from tests.running import leftovers
from tests.tiny import PICO

CONTROL, NORMAL = 3, 1
_INNER = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
          "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
          "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
          "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm",
          "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def theirs(name: str) -> str:
    """llama.cpp's name of a checkpoint's tensor."""
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    block, _, inner = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{block}.{_INNER[inner]}.{kind}"


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k, or a bias of theirs, as `LlamaModel.permute` of llama.cpp orders them."""
    return (weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
            .swapaxes(1, 2).reshape(weights.shape))


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """A checkpoint's tensors under llama.cpp's names and in its order, in float32."""
    source = Checkpoint(folder)
    found = {}
    for name, tensor in source.tensors(source.entries).items():
        values = tensor.float().numpy()
        if source.config["model_type"] in ("llama", "mistral"):
            for part, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
                if f".{part}." in name:
                    values = permuted(values, source.config[key])
        found[theirs(name)] = values
    return found


def quantized(values: np.ndarray, kind: str) -> tuple[np.ndarray, Any]:
    """A tensor's bytes and type: vectors stay in float32, as llama.cpp keeps them."""
    type_ = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
    return gguf.quants.quantize(values, type_), type_


def write(folder: Path, path: Path, kind: str = "F32", *, tensors: dict[str, Any] | None = None,
          without: tuple[str, ...] = (), **changed: Any) -> Path:
    """Write a checkpoint as a GGUF file.

    `changed`: metadata by key, with `__` for a dot and `ARCH` for the architecture; None leaves a
    key out. `tensors`: arrays that are added or stand in for its own; `without`: those left out.
    """
    config = Checkpoint(folder).config
    arch = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    head_dim = config["head_dim"]
    metadata: dict[str, Any] = {
        "general.architecture": arch, "general.type": "model", "general.name": "tiny",
        "general.file_type": int(gguf.LlamaFileType[
            ("ALL_" if kind == "F32" else "MOSTLY_") + kind]),
        "general.quantization_version": 2,
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.rope.freq_base": config["rope_parameters"]["rope_theta"],
        f"{arch}.rope.dimension_count": head_dim,
        f"{arch}.vocab_size": config["vocab_size"],
        **vocabulary(PICO, "gpt-2" if arch == "llama" else "qwen2")}
    metadata |= {key.replace("ARCH", arch).replace("__", "."): value
                 for key, value in changed.items()}
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        if value is not None:
            _add(writer, key, value)
    for name, values in (arrays(folder) | (tensors or {})).items():
        if name not in without:
            data, type_ = quantized(values, kind)
            writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary(folder: Path, cut: str) -> dict[str, Any]:
    """The metadata of a byte-level BPE that cuts text as the model of this name does."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": cut,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [CONTROL, *[NORMAL] * (len(tokens) - 1)],
            "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
            "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0,
            "tokenizer.ggml.add_bos_token": False}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def logits(model: Any, seed: int = 0) -> torch.Tensor:
    """Logits of a model on 2 × 40 random tokens."""
    torch.manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (2, 40))
    with torch.inference_mode():
        return model(ids).logits.float()


def refused(path: Path, *words: str) -> None:
    """A file is refused in one line that holds all of `words`, and nothing is left."""
    with pytest.raises(InputError) as error:
        converted(path)
    line = str(error.value)
    assert "\n" not in line
    for word in (str(path), *words):
        assert word in line, (word, line)
    assert not leftovers(path.parent)
