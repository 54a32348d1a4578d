"""Low-rank adapters on a model: put on by peft, and merged into the checkpoint that they adapt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bipdeploy.errors import InputError
from bipdeploy.model import loading
from bipdeploy.model.checkpoint import Checkpoint, CheckpointWriter
from bipdeploy.recipe.tune import TuneSection
from bipdeploy.tuning.data import derived_seed

_WRAPPED = "base_model.model."  # what peft puts before the names of a model's own modules


def adapted(folder: Path, section: TuneSection, dtype: torch.dtype, device: torch.device,
            seed: int, *, trust_remote_code: bool = False) -> Any:
    """A frozen model with new adapters, a `peft.PeftModel`: A is drawn by `seed`, B is zero."""
    from peft import LoraConfig, get_peft_model

    model = loading.load_model(folder, dtype, device, trust_remote_code=trust_remote_code)
    found = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if not found & set(section.target_modules):
        raise InputError(f"tune.target_modules: {folder} has none of "
                         f"{', '.join(section.target_modules)} left; name others")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derived_seed(seed, "adapters"))
        return get_peft_model(model, LoraConfig(
            task_type="CAUSAL_LM", r=section.rank, lora_alpha=section.alpha,  # type: ignore[arg-type]
            lora_dropout=section.dropout, target_modules=list(section.target_modules)))


def merge(source: Checkpoint, model: Any, out: Path,
          advance: Callable[[], None] = lambda: None) -> None:
    """Write `source` to the folder `out` with the adapters of `model` added to its weights.

    Block by block; sums are in float32 and rounded to the stored type.
    """
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {
        name.removeprefix(_WRAPPED): module for name, module in model.named_modules()
        if isinstance(module, LoraLayer)}
    with CheckpointWriter(out, source.config, source.folder) as writer, torch.no_grad():
        writer.add_outside_blocks(source)
        for index in range(source.config["num_hidden_layers"]):
            prefix, stored = f"model.layers.{index}.", source.block(index)
            for name, layer in layers.items():
                if name.startswith(prefix):
                    key = f"{name.removeprefix(prefix)}.weight"
                    delta = layer.get_delta_weight("default").float().cpu()
                    stored[key] = (stored[key].float() + delta).to(stored[key].dtype)
            writer.add(stored, prefix)
            advance()
