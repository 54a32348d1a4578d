"""The model that is trained, by method: with adapters, or all of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bipdeploy.model import loading
from bipdeploy.model.checkpoint import Checkpoint, CheckpointWriter
from bipdeploy.recipe.tune import TuneSection, slice_tokens
from bipdeploy.tuning import adapters, losses


def student(folder: Path, section: TuneSection, dtype: torch.dtype, device: torch.device,
            seed: int, *, trust_remote_code: bool = False) -> Any:
    """The model in `folder` with what is trained of it in float32: adapters on weights of `dtype`,
    or all weights."""
    if section.method == "lora":
        return adapters.adapted(folder, section, dtype, device, seed,
                                trust_remote_code=trust_remote_code)
    return loading.load_model(folder, torch.float32, device, trust_remote_code=trust_remote_code)


def parameters(model: Any) -> dict[str, nn.Parameter]:
    """What is trained, by name. Tied weights come once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def load(model: Any, values: Mapping[str, torch.Tensor]) -> None:
    """Give what is trained these values. Raises KeyError where one is missing."""
    with torch.no_grad():
        for name, parameter in parameters(model).items():
            parameter.copy_(values[name])


def write(source: Checkpoint, model: Any, section: TuneSection, out: Path) -> None:
    """Write `source` to the folder `out` as `model` was trained, in the types that are stored."""
    if section.method == "lora":
        adapters.merge(source, model, out)
        return
    values = model.state_dict()
    blocks = range(source.config["num_hidden_layers"])
    with CheckpointWriter(out, source.config, source.folder) as writer:
        for name in [*source.outside_blocks(), *(n for i in blocks for n in source.block_names(i))]:
            stored = source.tensors([name])[name]
            writer.add({name: values[name].to(stored.dtype)})


def plain(model: Any) -> Any:
    """The transformers model, without peft's wrapping."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def blocks(model: Any) -> Any:
    """The transformer blocks, in order."""
    return plain(model).base_model.layers


class Objective(nn.Module):
    """What a step minimises, as a module, so that what wraps models for several processes wraps
    all that touches their weights."""

    def __init__(self, model: Any, teacher: Any | None, section: TuneSection):
        super().__init__()
        self.model = model
        self.section = section
        self._teacher = (teacher,)  # in a tuple it is no part of this module, and stays as it is

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, judging: bool = False
                ) -> torch.Tensor:
        """The loss summed over the tokens that count; cross-entropy alone for `judging`.

        ids, labels: [B, T].
        """
        own, distillation = plain(self.model), self.section.distillation
        head = own.get_output_embeddings()
        targets, size = losses.predicted(labels), slice_tokens(own.config.vocab_size)
        dense = None if judging else self._teacher[0]
        blocks = dense is not None and distillation.hidden > 0
        made = own.base_model(input_ids=ids, use_cache=False, output_hidden_states=blocks)
        states = losses.predicting(made.last_hidden_state, labels)
        if dense is None:
            return losses.in_slices(states, head, targets, size)
        with torch.no_grad():
            wanted = dense.base_model(input_ids=ids, use_cache=False, output_hidden_states=blocks)
        loss = losses.in_slices(
            states, head, targets, size, weight=self.section.kl,
            temperature=distillation.temperature,
            teacher=(losses.predicting(wanted.last_hidden_state, labels),
                     dense.get_output_embeddings()))
        if blocks:  # the first is what the embeddings give
            loss = loss + distillation.hidden * losses.hidden_error(
                made.hidden_states[1:], wanted.hidden_states[1:], labels)
        return loss
