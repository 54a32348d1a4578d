"""Reading a GGUF file: its sizes as a `config.json`, its tensors in a checkpoint's order.

Whatever the file says that has no place in a checkpoint is refused: a key or a tensor that is
passed over may change what the model computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bipdeploy.errors import InputError
from bipdeploy.model.families import FAMILIES, Architecture, architecture
from bipdeploy.model.formats import is_per_block, pruned_config

if TYPE_CHECKING:
    import torch

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # a Mistral is a llama here

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CHUNK = 16 << 20  # values that are dequantised at once

# A checkpoint's names of tensors, without `.weight` and `.bias` and the block's number → GGUF's.
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
          "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
          "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
          "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
          "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm",
          "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_EMBEDDINGS, _HEAD = "token_embd.weight", "output.weight"
_ROPE = "rope_freqs.weight"  # by what each frequency is divided; not stated in any other way

# Keys below the architecture's name: those that are read, and those that change nothing, or
# nothing where they have this value.
_READ = ("block_count", "context_length", "embedding_length", "feed_forward_length",
         "attention.head_count", "attention.head_count_kv", "attention.key_length",
         "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.sliding_window",
         "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type",
         "rope.scaling.factor", "rope.scaling.original_context_length",
         "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow")
_WITHOUT_EFFECT = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
_USUAL = {"attention.causal": True, "expert_count": 0, "expert_used_count": 0, "pooling_type": 0,
          "use_parallel_residual": False, "rope.scaling.attn_factor": 1.0,
          "rope.scaling.yarn_attn_factor": 1.0, "rope.scaling.yarn_ext_factor": 1.0}


class GgufFile:
    """An open GGUF file. All that may be wrong with it is raised on opening, but for values that
    are not finite: InputError with one line."""

    def __init__(self, path: Path):
        self.path = path
        reader, self.metadata = _opened(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.family = self._family()
        self.config = self._config()
        self._check()

    def refused(self, why: str) -> InputError:
        return InputError(f"{self.path}: {why}; give the model's original checkpoint")

    @cached_property
    def arch(self) -> Architecture:
        return architecture(self.config)

    @property
    def file_type(self) -> str:
        """How it was quantised, in llama.cpp's words: `Q4_K_M`, `F16`."""
        import gguf

        try:
            kind = gguf.LlamaFileType(self.metadata.get("general.file_type", -1)).name
        except ValueError:
            return "unknown"
        return kind.removeprefix("MOSTLY_").removeprefix("ALL_")

    @property
    def quantized(self) -> int:
        """How many of its tensors are quantised."""
        return sum(_type(tensor) not in _FLOATS for tensor in self._tensors.values())

    # What the header says

    def _family(self) -> str:
        family, kind = (self.metadata.get(f"general.{key}") for key in ("architecture", "type"))
        parts = self.metadata.get("split.count", 0)
        if kind not in (None, "model"):
            raise self.refused(f"it is no model but of the kind {kind!r}")
        if parts > 1:
            raise InputError(f"{self.path} is one of {parts} parts of a model; join them with "
                             "`llama-gguf-split --merge` and give the whole")
        if family not in ARCHITECTURES:
            raise self.refused(f"its architecture is {family!r}, and {', '.join(ARCHITECTURES)} "
                               "are read")
        for key, value in self.metadata.items():
            short = key.removeprefix(f"{family}.")
            usual = short in _USUAL and value == _USUAL[short]
            if short != key and not usual and short not in (*_READ, *_WITHOUT_EFFECT):
                raise self.refused(f"its {key} is {value!r}, which is not read")
        return str(family)

    def _own(self, key: str, default: Any = None, *, kind: type = int) -> Any:
        """A value below the architecture's name: of all blocks, where each has its own."""
        value = self.metadata.get(f"{self.family}.{key}")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise self.refused(f"its {self.family}.{key} differs by block, which is not read")
            value = value[0]
        if value is None:
            if default is None:
                raise self.refused(f"it has no {self.family}.{key}")
            return default
        if kind is float and isinstance(value, int | float) and math.isfinite(value):
            return _short(value)
        if isinstance(value, kind) and value != 0:
            return value
        raise self.refused(f"its {self.family}.{key} is {value!r}")

    def _config(self) -> dict[str, Any]:
        if _EMBEDDINGS not in self._tensors:
            raise self.refused(f"tensor {_EMBEDDINGS} is missing")
        hidden, heads = self._own("embedding_length"), self._own("attention.head_count")
        blocks = self._own("block_count")
        if blocks > len(self._tensors):
            raise self.refused(f"it has {len(self._tensors)} tensors, too few for {blocks} blocks")
        head_dim = self._own("attention.key_length", hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._own(key, head_dim) != head_dim:
                raise self.refused(f"its {self.family}.{key} is {self._own(key)}, and its heads "
                                   f"have {head_dim} values")
        longest = self._own("context_length")
        window = self._own("attention.sliding_window", longest)
        model_type = self.family
        if window < longest:
            if self.family != "llama":
                raise self.refused(f"its {self.family}.attention.sliding_window is {window}, "
                                   "which is read for llama alone")
            model_type = "mistral"
        ids = {ours: self.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
               for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
        config = {
            "model_type": model_type,
            "architectures": [f"{FAMILIES[model_type].class_prefix}ForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": self._own("feed_forward_length"),
            "num_hidden_layers": blocks,
            "num_attention_heads": heads,
            "num_key_value_heads": self._own("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": longest,
            "rms_norm_eps": self._own("attention.layer_norm_rms_epsilon", kind=float),
            "rope_parameters": self._rope(head_dim, longest),
            "vocab_size": self._shape(_EMBEDDINGS)[0],
            "tie_word_embeddings": self._tied(),
            "dtype": self._stored_type(),
            **{f"{name}_token_id": value for name, value in ids.items()}}
        if model_type in ("llama", "qwen3"):
            config["attention_bias"] = "blk.0.attn_q.bias" in self._tensors
        if model_type == "llama":
            config["mlp_bias"] = "blk.0.ffn_gate.bias" in self._tensors
        if model_type == "mistral":
            config["sliding_window"] = window
        arch = architecture(config)
        # A number of heads that LLaMA's configuration does not allow is allowed in Mistral's.
        config = pruned_config(config, arch, arch.blocks)
        if is_per_block(config):
            raise self.refused(f"its {heads} heads do not divide {hidden}, and it has biases")
        return config

    def _rope(self, head_dim: int, longest: int) -> dict[str, Any]:
        """`rope_parameters`. llama.cpp takes a factor without a type for a linear scaling."""
        theta = self._own("rope.freq_base", 10000.0, kind=float)
        kind = self._own("rope.scaling.type", "linear", kind=str)
        factor = (self._own("rope.scaling.factor", 0.0, kind=float)
                  or self._own("rope.scale_linear", 0.0, kind=float) or 1.0)
        scaled = kind != "none" and factor != 1.0
        found: dict[str, Any] = {"rope_type": "default"}
        if _ROPE in self._tensors:
            divisors = [float(v) for chunk in self._chunks(_ROPE) for v in chunk]
            if any(d != 1.0 for d in divisors):
                found = _llama3(divisors, theta, head_dim) or {}
            if not found or (scaled and found["rope_type"] != "default"):
                raise self.refused(f"its tensor {_ROPE} stretches positions, and not as Llama 3 "
                                   "does")
        if scaled and kind == "linear":
            found = {"rope_type": "linear", "factor": factor}
        elif scaled and kind == "yarn":
            original = self._own("rope.scaling.original_context_length", longest)
            betas = {name: beta for name in ("beta_fast", "beta_slow") if
                     (beta := self._own(f"rope.scaling.yarn_{name}", 0.0, kind=float))}
            found = {"rope_type": "yarn", "factor": factor,
                     "original_max_position_embeddings": original, **betas}
        elif scaled:
            raise self.refused(f"its {self.family}.rope.scaling.type is {kind!r}, and none, "
                               "linear and yarn are read")
        return {**found, "rope_theta": theta}

    # Tensors

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def _stored_type(self) -> str:
        """One type for the whole checkpoint; see `gguf.py`."""
        types = {_type(t) for t in self._tensors.values() if len(t.shape) > 1}
        if types - _FLOATS.keys():
            return "bfloat16"
        return _FLOATS[types.pop()] if len(types) == 1 else "float32"

    def _tied(self) -> bool:
        """Whether the head is the embeddings: not there, or there as the same values."""
        if _HEAD not in self._tensors:
            return True
        if self._shape(_HEAD) != self._shape(_EMBEDDINGS):
            return False
        return all((a == b).all() for a, b in zip(self._chunks(_HEAD), self._chunks(_EMBEDDINGS),
                                                  strict=True))

    def _check(self) -> None:
        """Whether the tensors are those that the sizes ask for, in types that can be read."""
        expected = {_gguf_name(name): shape for name, shape in self.arch.tensors()}
        if missing := expected.keys() - self._tensors.keys():
            raise self.refused(f"tensor {min(missing)} is missing")
        if unknown := self._tensors.keys() - expected.keys() - {_ROPE, _HEAD}:
            raise self.refused(f"it has a tensor {min(unknown)}, which {self.family} has not")
        for name, shape in expected.items():
            if self._shape(name) != shape:
                raise self.refused(f"tensor {name} is {_times(self._shape(name))}, and by the "
                                   f"file's sizes it is {_times(shape)}")
        tokens = len(self.metadata.get("tokenizer.ggml.tokens") or ())
        if tokens > self.arch.vocabulary:
            raise self.refused(f"it has {tokens} tokens, and embeddings of {self.arch.vocabulary}")
        for name in {_type(self._tensors[name]): name for name in expected}.values():
            self._dequantized(name, slice(0, 1))

    def read(self, name: str) -> torch.Tensor:
        """A tensor by its name in the checkpoint, in the checkpoint's type and order.

        Raises InputError where its values are not finite in that type.
        """
        import torch

        theirs = _gguf_name(name)
        shape = self._shape(theirs)
        tensor = torch.empty(shape, dtype=getattr(torch, self.config["dtype"]))
        row = 0
        for values in self._chunks(theirs):
            tensor[row:row + len(values)] = torch.from_numpy(values)
            row += len(values)
        low, high = tensor.aminmax()  # both NaN where one value is
        if not (low.isfinite() and high.isfinite()):
            raise self.refused(f"tensor {theirs} holds NaN, or values that are infinite in "
                               f"{self.config['dtype']}")
        turned = self.family == "llama" and (".attn_q." in theirs or ".attn_k." in theirs)
        return _halves(tensor, self.config["head_dim"]) if turned else tensor

    def _chunks(self, name: str) -> Iterator[Any]:
        """A tensor's values in float32: some rows of a matrix at a time, a vector at once."""
        rows, *columns = self._shape(name)
        step = max(1, _CHUNK // math.prod(columns)) if columns else rows
        for start in range(0, rows, step):
            yield self._dequantized(name, slice(start, start + step))

    def _dequantized(self, name: str, rows: slice) -> Any:
        import gguf
        import numpy as np

        tensor = self._tensors[name]
        data = tensor.data[rows] if len(tensor.shape) > 1 else tensor.data
        try:
            values = gguf.quants.dequantize(data, tensor.tensor_type)
        except NotImplementedError as error:
            raise self.refused(f"tensor {name} is of the type {_type(tensor)}, which the package "
                               "gguf does not read") from error
        return np.array(values, dtype=np.float32)  # a copy: the file's own memory is read-only


def _opened(path: Path) -> tuple[Any, dict[str, Any]]:
    """A reader of the file and all that its header says. Raises InputError where it is damaged."""
    try:
        import gguf
    except ImportError as error:
        raise InputError(f"{path} is a GGUF file, and the package that reads them is not "
                         "installed; `pip install 'bipdeploy[gguf]'`") from error
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the package checks little, and fails in as many ways
        raise InputError(f"{path} is damaged, truncated or no GGUF file "
                         f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
                         "copy it again") from error
    if reader.endianess != gguf.GGUFEndian.LITTLE:
        raise InputError(f"{path} is big-endian; turn it with `gguf-convert-endian {path} little`")
    return reader, metadata


def _type(tensor: Any) -> str:
    return str(tensor.tensor_type.name)


def _gguf_name(name: str) -> str:
    """GGUF's name of a checkpoint's tensor."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.{kind}"
    _, _, block, inner = stem.split(".", 3)
    return f"blk.{block}.{_NAMES[inner]}.{kind}"


def _halves(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k (or values of their biases) in transformers' order: llama.cpp rotates
    neighbouring values of a head, transformers the two halves of it."""
    rows = tensor.view(-1, head_dim // 2, 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape)


def _llama3(divisors: Sequence[float], theta: float, head_dim: int) -> dict[str, Any] | None:
    """Llama 3's scaling whose divisors of the frequencies these are; None where there is none."""
    settings = {"factor": round(max(divisors), 3), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}  # of every Llama 3
    factor, low, high, original = settings.values()
    for i, divisor in enumerate(divisors):
        turns = original / (2 * math.pi * theta ** (2 * i / head_dim))
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        if not math.isclose(divisor, 1 / ((1 - share) / factor + share), rel_tol=1e-4):
            return None
    return {"rope_type": "llama3", **settings} if len(divisors) == head_dim // 2 else None


def _short(value: float) -> float:
    """A number as it was before it was stored in float32: 1e-05 for 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def _times(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))
