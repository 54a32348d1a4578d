"""vLLM's side of per-block checkpoints: the entry point `vllm.general_plugins` calls `register`.

vLLM calls it in every one of its processes, so it must be cheap and safe to repeat.
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM and transformers about the per-block models. The classes load when first used."""
    from vllm import ModelRegistry

    from bipdeploy.model import loading
    from bipdeploy.model.families import FAMILIES

    loading.register()
    known = set(ModelRegistry.get_supported_archs())
    for family in FAMILIES.values():
        name = f"Bipdeploy{family.class_prefix}ForCausalLM"
        if name not in known:
            ModelRegistry.register_model(name, f"bipdeploy.model.vllm_models:{name}")
