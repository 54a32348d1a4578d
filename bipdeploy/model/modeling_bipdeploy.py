"""Causal language models whose blocks differ in width. Needs torch and transformers only.

This file is shipped beside the weights of such a checkpoint, so it imports nothing else. The
widths are in the `per_layer_config` of `config.json`, which transformers reads itself; here are
the classes that build from it. Each block may have its own `num_attention_heads`,
`num_key_value_heads` and `intermediate_size`, or `skip` its "attention" or "mlp" altogether.
With `output_bias` every o_proj and down_proj has a bias, whatever the family's own have.
"""

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.models.llama import configuration_llama, modeling_llama
from transformers.models.mistral import configuration_mistral, modeling_mistral
from transformers.models.qwen2 import configuration_qwen2, modeling_qwen2
from transformers.models.qwen3 import configuration_qwen3, modeling_qwen3


class PerBlockLayer:
    """Mixin of a decoder layer: takes its widths from its own entry of `per_layer_config`."""

    def __init__(self, config, layer_idx):
        own = config.per_layer_config[layer_idx] if config.is_heterogeneous else config
        super().__init__(own, layer_idx)
        skipped = set(getattr(own, "skip", None) or ())
        self.layer_idx = layer_idx
        # The shared config: changing the attention implementation must reach every block.
        self.self_attn.config = config
        if config.output_bias:
            for part, name in ((self.self_attn, "o_proj"), (self.mlp, "down_proj")):
                stock = getattr(part, name)
                setattr(part, name, nn.Linear(stock.in_features, stock.out_features, bias=True))
        if "attention" in skipped:
            self.self_attn = self.input_layernorm = None
        if "mlp" in skipped:
            self.mlp = self.post_attention_layernorm = None

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None,
                use_cache=False, position_embeddings=None, **kwargs):
        if self.self_attn is not None:
            attended, _ = self.self_attn(
                hidden_states=self.input_layernorm(hidden_states), attention_mask=attention_mask,
                position_ids=position_ids, past_key_values=past_key_values, use_cache=use_cache,
                position_embeddings=position_embeddings, **kwargs)
            hidden_states = hidden_states + attended
        elif past_key_values is not None:
            # A cache tells its length by its first layer: keep one number per token there.
            token = hidden_states.new_zeros(*hidden_states.shape[:-1], 1).unsqueeze(1)
            past_key_values.update(token, token, self.layer_idx)
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


def _family(prefix, configs, models):
    """The four classes of a family: Bipdeploy<prefix>Config, DecoderLayer, Model, ForCausalLM.

    The families' own constructors name their layer class themselves, so what they do is done
    here again, with our layer, behind the constructor of their base class.
    """
    stock = {part: getattr(models, prefix + part) for part in
             ("PreTrainedModel", "DecoderLayer", "Model", "ForCausalLM", "RMSNorm",
              "RotaryEmbedding")}

    @strict
    class Config(getattr(configs, f"{prefix}Config")):
        model_type = f"bipdeploy_{prefix.lower()}"
        head_dim: int | None = None
        output_bias: bool = False

        def validate_architecture(self):
            """Heads need not divide the hidden size: `head_dim` is explicit."""

    class DecoderLayer(PerBlockLayer, stock["DecoderLayer"]):
        pass

    class Model(stock["Model"]):
        config_class = Config
        _no_split_modules = [f"Bipdeploy{prefix}DecoderLayer"]

        def __init__(self, config):
            stock["PreTrainedModel"].__init__(self, config)
            self.padding_idx = config.pad_token_id
            self.vocab_size = config.vocab_size
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size,
                                             self.padding_idx)
            self.layers = nn.ModuleList(
                [DecoderLayer(config, index) for index in range(config.num_hidden_layers)])
            self.norm = stock["RMSNorm"](config.hidden_size, eps=config.rms_norm_eps)
            self.rotary_emb = stock["RotaryEmbedding"](config=config)
            self.gradient_checkpointing = False
            self.has_sliding_layers = "sliding_attention" in (
                getattr(config, "layer_types", None) or ())
            self.post_init()

    class ForCausalLM(stock["ForCausalLM"]):
        config_class = Config
        _no_split_modules = [f"Bipdeploy{prefix}DecoderLayer"]

        def __init__(self, config):
            stock["PreTrainedModel"].__init__(self, config)
            self.model = Model(config)
            self.vocab_size = config.vocab_size
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

    made = (Config, DecoderLayer, Model, ForCausalLM)
    for class_ in made:  # under the names that config.json and pickle look for
        class_.__name__ = class_.__qualname__ = f"Bipdeploy{prefix}{class_.__name__}"
        globals()[class_.__name__] = class_
    return made


FAMILIES = {
    "llama": _family("Llama", configuration_llama, modeling_llama),
    "mistral": _family("Mistral", configuration_mistral, modeling_mistral),
    "qwen2": _family("Qwen2", configuration_qwen2, modeling_qwen2),
    "qwen3": _family("Qwen3", configuration_qwen3, modeling_qwen3),
}
