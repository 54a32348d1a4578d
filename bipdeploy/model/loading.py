"""Building whole models and single blocks from checkpoints, stock or per-block."""

from __future__ import annotations

import importlib
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bipdeploy.errors import InputError
from bipdeploy.model.families import PER_BLOCK_PREFIX, Family

if TYPE_CHECKING:
    import torch


@lru_cache(maxsize=1)
def register() -> None:
    """Tell transformers' Auto classes about the per-block models. Safe to call again."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from bipdeploy.model.modeling_bipdeploy import FAMILIES

    for config, _, model, causal in FAMILIES.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a checkpoint folder."""
    from transformers import AutoConfig

    register()
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}/config.json is not accepted by transformers: "
                         f"{str(error).splitlines()[0]}") from error


def load_model(folder: Path, dtype: torch.dtype, device: torch.device, *,
               trust_remote_code: bool = False) -> Any:
    """A whole model in evaluation mode, as `AutoModelForCausalLM` gives it."""
    from transformers import AutoModelForCausalLM

    config = load_config(folder, trust_remote_code=trust_remote_code)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype,
                                                 trust_remote_code=trust_remote_code)
    return model.to(device).eval()


def open_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A model as `load_model` gives it, whose blocks stay on the disk: transformers reads each
    when it comes to it, and lets go of it again. For a forward pass or two."""
    from transformers import AutoModelForCausalLM

    outside = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(outside, str(device)), "model.layers": "disk"}
    with TemporaryDirectory() as unused:  # safetensors are read where they are
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=load_config(folder), dtype=dtype, device_map=places,
            offload_folder=unused)
    return model.eval()


def layer_class(family: Family, config: Any) -> type:
    """The decoder-layer class for a configuration of this family."""
    if config.model_type.startswith(PER_BLOCK_PREFIX):
        from bipdeploy.model.modeling_bipdeploy import FAMILIES

        return FAMILIES[family.model_type][1]
    return getattr(family_module(family), f"{family.class_prefix}DecoderLayer")


def family_module(family: Family) -> Any:
    """transformers' modeling module of a family."""
    name = family.model_type
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")
