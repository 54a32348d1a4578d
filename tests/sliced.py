"""Slicing a tiny model by a choice of groups, and the masked dense model that it must equal."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bipdeploy.model.checkpoint import Checkpoint, CheckpointWriter
from bipdeploy.model.families import Architecture, BlockWidths, architecture
from bipdeploy.model.formats import biased_config, pruned_config
from bipdeploy.model.loading import load_model
from bipdeploy.pruning.kept import Kept
from bipdeploy.pruning.slicing import add_biases, mask_block, slice_block
from bipdeploy.running.artifacts import file_hashes
from tests.tiny import VOCABULARY

CPU = torch.device("cpu")


def architecture_of(folder: Path) -> Architecture:
    return architecture(Checkpoint(folder).config)


def token_windows(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, tokens), generator=generator)


def draw_kept(arch: Architecture, widths: Sequence[tuple[int, ...]], seed: int = 0) -> list[Kept]:
    """A random choice with the given (KV groups, channels) per block, or (KV groups, channels,
    query heads of each group)."""
    draw = random.Random(seed)

    def chosen(count: int, size: int) -> tuple[int, ...]:
        return tuple(sorted(draw.sample(range(count), size)))

    return [Kept(chosen(dense.kv_heads, groups), chosen(dense.intermediate, channels),
                 tuple(chosen(dense.group, own) for own in queries * groups))
            for dense, (groups, channels, *queries) in zip(arch.blocks, widths, strict=True)]


def widths_of(arch: Architecture, kept: list[Kept]) -> list[BlockWidths]:
    return [BlockWidths(len(k.query_heads(dense.group)), len(k.groups), len(k.channels))
            for dense, k in zip(arch.blocks, kept, strict=True)]


def write_sliced(source: Path, folder: Path, kept: list[Kept]) -> Path:
    """The checkpoint of `source` with only the kept groups, as the prune stage writes it."""
    dense, arch = Checkpoint(source), architecture_of(source)
    config = pruned_config(dense.config, arch, widths_of(arch, kept))
    with CheckpointWriter(folder, config, source) as writer:
        writer.add(dense.tensors(dense.outside_blocks()))
        for index, choice in enumerate(kept):
            writer.add(slice_block(dense.block(index), arch, index, choice),
                       f"model.layers.{index}.")
    return folder


def write_biased(source: Path, folder: Path) -> Path:
    """The checkpoint of `source` with random biases where the repair by biases adds them."""
    sliced = Checkpoint(source)
    config = biased_config(sliced.config, architecture(sliced.config))
    arch, draw = architecture(config), torch.Generator().manual_seed(0)
    with CheckpointWriter(folder, config, source) as writer:
        writer.add(sliced.tensors(sliced.outside_blocks()))
        for index in range(len(arch.blocks)):
            added = {name: torch.randn(arch.hidden, generator=draw)
                     for name in ("self_attn.o_proj.bias", "mlp.down_proj.bias")}
            writer.add(add_biases(sliced.block(index), arch, added), f"model.layers.{index}.")
    return folder


def masked_model(source: Path, kept: list[Kept]) -> Any:
    """The dense model with the groups that leave masked: the definition of pruning."""
    dense, arch = Checkpoint(source), architecture_of(source)
    model = load_model(source, torch.float32, CPU)
    for index, choice in enumerate(kept):
        layer = model.model.layers[index]
        layer.load_state_dict(mask_block(dense.block(index), arch, index, choice))
    return model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def short_calibration(folder: Path) -> list[str]:
    """Settings that calibrate on 16 windows of 64 tokens of a small text, written to `folder`."""
    words = "the model reads a block of tokens and writes what it made from them into one file"
    draw = random.Random(0)
    text = folder / "words.txt"
    text.write_text(" ".join(draw.choice(words.split()) + str(draw.randrange(100))
                             for _ in range(1500)))
    return [f"calibration.data={text}", "calibration.samples=16", "calibration.tokens=64",
            "calibration.batch=8", "model.device=cpu"]


def results(folder: Path) -> dict[str, str]:
    """Hashes of a stage's files, without the manifest that holds times."""
    return {name: sha256 for name, sha256 in file_hashes(folder).items()
            if name != "manifest.json"}


def loaded(folder: Path) -> Any:
    return load_model(folder, torch.float32, CPU)
