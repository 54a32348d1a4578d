"""Per-block models for vLLM: its own layers, each built from its own `per_layer_config` entry.

Imported by vLLM only, through `vllm_plugin`. Weights load with vLLM's stock loaders, and a block
without attention keeps no KV cache.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.qwen2 import Qwen2Model
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import extract_layer_index

from bipdeploy.model.families import OUTPUT_BIAS
from bipdeploy.model.formats import ZERO_ATTENTION


class PerBlockLayer:
    """Mixin of a decoder layer: its own widths, and parts that may be absent."""

    self_attn: Any
    mlp: Any

    def _adapt(self, config: Any, own: Any, prefix: str) -> None:
        """Remove the parts that are skipped, and give the others their output biases."""
        if getattr(config, OUTPUT_BIAS, False):
            for projection in (self.self_attn.o_proj, self.mlp.down_proj):
                if projection.bias is None:
                    weight = projection.weight
                    projection.bias = torch.nn.Parameter(
                        weight.new_zeros(projection.output_size), requires_grad=False)
        skipped = set(getattr(own, "skip", None) or ())
        if "attention" in skipped or extract_layer_index(prefix) in _zero_attention(config):
            # Building the attention registered a KV cache for it.
            context = get_current_vllm_config().compilation_config.static_forward_context
            context.pop(f"{prefix}.self_attn.attn")
            self.self_attn = self.input_layernorm = None
        if "mlp" in skipped:
            self.mlp = self.post_attention_layernorm = None

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor,
                residual: torch.Tensor | None, **_: Any) -> tuple[torch.Tensor, Any]:
        if self.self_attn is not None:
            hidden_states, residual = _add_and_norm(self.input_layernorm, hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        if self.mlp is not None:
            hidden_states, residual = _add_and_norm(self.post_attention_layernorm, hidden_states,
                                                    residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


def _add_and_norm(norm: Any, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> Any:
    """vLLM's fused residual addition and RMSNorm; before the first one there is no residual."""
    if residual is None:
        return norm(hidden_states), hidden_states
    return norm(hidden_states, residual)


def _zero_attention(config: Any) -> list[int]:
    """Blocks whose attention is written as zeros, for engines that cannot do without one."""
    return getattr(config, ZERO_ATTENTION, None) or []


def _own(config: Any, prefix: str) -> Any:
    index = extract_layer_index(prefix)
    return config.per_layer_config[index] if config.is_heterogeneous else config


class PerBlockLlamaLayer(PerBlockLayer, LlamaDecoderLayer):
    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None):
        config = config or vllm_config.model_config.hf_config
        own = _own(config, prefix)
        LlamaDecoderLayer.__init__(self, vllm_config, prefix, own)
        self._adapt(config, own, prefix)


class PerBlockQwen2Layer(PerBlockLlamaLayer):
    """A LLaMA layer with biases on q, k and v: vLLM's own Qwen2 layer takes the head size from the
    hidden size and the number of heads, which no longer agree once heads are pruned."""

    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None):
        biased = copy.copy(config or vllm_config.model_config.hf_config)
        biased.qkv_bias = True
        super().__init__(vllm_config, prefix, biased)


class PerBlockQwen3Layer(PerBlockLayer, Qwen3DecoderLayer):
    def __init__(self, config: Any, cache_config: Any = None, quant_config: Any = None,
                 prefix: str = ""):
        own = _own(config, prefix)
        Qwen3DecoderLayer.__init__(self, own, cache_config, quant_config, prefix)
        self._adapt(config, own, prefix)


class PerBlockForCausalLM(LlamaForCausalLM):
    """vLLM's LLaMA, which leaves out the weights of attentions that are not built."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        absent = tuple(f"model.layers.{index}.{part}." for index in _zero_attention(self.config)
                       for part in ("self_attn", "input_layernorm"))
        return super().load_weights((name, tensor) for name, tensor in weights
                                    if not name.startswith(absent))


class BipdeployLlamaForCausalLM(PerBlockForCausalLM):
    def _init_model(self, vllm_config: Any, prefix: str = "", layer_type: Any = None) -> Any:
        return LlamaModel(vllm_config=vllm_config, prefix=prefix, layer_type=PerBlockLlamaLayer)


class BipdeployMistralForCausalLM(BipdeployLlamaForCausalLM):
    """The same layers; vLLM takes the sliding window from the cache configuration."""


class BipdeployQwen2ForCausalLM(PerBlockForCausalLM):
    def _init_model(self, vllm_config: Any, prefix: str = "", layer_type: Any = None) -> Any:
        return LlamaModel(vllm_config=vllm_config, prefix=prefix, layer_type=PerBlockQwen2Layer)


class BipdeployQwen3ForCausalLM(PerBlockForCausalLM):
    def _init_model(self, vllm_config: Any, prefix: str = "", layer_type: Any = None) -> Any:
        return Qwen2Model(vllm_config=vllm_config, prefix=prefix,
                          decoder_layer_type=PerBlockQwen3Layer)
