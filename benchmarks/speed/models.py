"""Random-weight models: on a device, or as checkpoints that never are in memory as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import bipdeploy
from bipdeploy.model.checkpoint import CheckpointWriter
from bipdeploy.model.families import architecture

TOKENIZER = Path(bipdeploy.__file__).parent / "builtin" / "pico"
# As LLaMA's own initialisation: hidden states then stay far within the range of every 16-bit type.
DEVIATION = 0.02


def random_model(config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """A random model of a configuration, made on the device, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {k: v for k, v in config.items() if k not in ("architectures", "dtype")}
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**settings, initializer_range=DEVIATION), dtype=dtype,
            attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def random_checkpoint(folder: Path, config: dict[str, Any],
                      device: torch.device | str = "cpu") -> Path:
    """A random checkpoint of a configuration, with the built-in tokenizer; drawn on `device`, one
    tensor of it in memory at a time."""
    dtype = getattr(torch, config["dtype"])
    generator = torch.Generator(device).manual_seed(0)
    with CheckpointWriter(folder, config, TOKENIZER) as writer:
        for name, shape in architecture(config).tensors():
            tensor = torch.empty(shape, dtype=dtype, device=device)
            if len(shape) == 1:  # a norm
                tensor.fill_(1)
            else:
                tensor.normal_(0, DEVIATION, generator=generator)
            writer.add({name: tensor})
    return folder
