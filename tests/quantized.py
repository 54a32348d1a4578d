"""Tiny quantised checkpoints, and the whole weights that they stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BLOCK = 32


def _store(source: Path, folder: Path, tensors: dict[str, torch.Tensor],
           quantization: dict[str, Any]) -> None:
    shutil.copytree(source, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(
        {**config, "quantization_config": quantization}))


def fp8_blocks(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Float8 with a scale for every block of 32 x 32, as DeepSeek and Qwen publish theirs."""
    tensors, whole = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        tensors[name] = whole[name] = weight
        if name.endswith("proj.weight"):
            rows, columns = weight.shape
            blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448
            stored = (blocks / scale).to(torch.float8_e4m3fn)
            tensors[name] = stored.view(rows, columns)
            tensors[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
            whole[name] = (stored.float() * scale).view(rows, columns)
    _store(source, folder, tensors, {
        "quant_method": "fp8", "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": ["lm_head"]})
    return whole


def packed_int4(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Four bits with a scale for every group of 32 inputs, packed as compressed-tensors does."""
    from compressed_tensors.compressors import pack_to_int32

    tensors, whole = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        tensors[name] = whole[name] = weight
        if name.endswith("proj.weight"):
            groups = weight.view(len(weight), -1, BLOCK)
            scale = groups.abs().amax(-1, keepdim=True) / 7
            stored = (groups / scale).round().clamp(-8, 7).to(torch.int8)
            del tensors[name]
            base = name.removesuffix("weight")
            tensors[f"{base}weight_packed"] = pack_to_int32(stored.view_as(weight), 4)
            tensors[f"{base}weight_scale"] = scale[..., 0].contiguous()
            tensors[f"{base}weight_shape"] = torch.tensor(weight.shape)
            whole[name] = (stored.float() * scale).view_as(weight)
    _store(source, folder, tensors, {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "ignore": ["lm_head"], "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": {
                "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                "group_size": BLOCK, "dynamic": False}}}})
    return whole


def int8_channels(source: Path, folder: Path) -> None:
    """Eight bits with a scale for every row, in a layout that transformers does not decompress."""
    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        tensors[name] = weight
        if name.endswith("proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale
    _store(source, folder, tensors, {
        "quant_method": "compressed-tensors", "format": "int-quantized",
        "quantization_status": "compressed", "ignore": ["lm_head"], "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel",
                "dynamic": False}}}})
