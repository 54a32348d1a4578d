"""What the export targets that write safetensors share: the files of the folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from bipdeploy.checkpoint import Checkpoint
from bipdeploy.families import PER_BLOCK_PREFIX
from bipdeploy.modeling import modeling_bipdeploy
from bipdeploy.modeling.formats import CODE_FILE


def is_per_block(config: dict) -> bool:
    """Whether a `config.json` is of our own class, which the folder must then carry."""
    return str(config["model_type"]).startswith(PER_BLOCK_PREFIX)


def copy_checkpoint(source: Checkpoint, out: Path) -> None:
    """The same checkpoint in another folder. Weights are linked where the file system allows it:
    they are large and do not change."""
    out.mkdir(parents=True)
    for path in sorted(source.folder.iterdir()):
        if path.suffix == ".safetensors":
            try:
                os.link(path, out / path.name)
            except OSError:
                shutil.copyfile(path, out / path.name)
        elif path.is_file():
            shutil.copyfile(path, out / path.name)


def add_code(out: Path) -> None:
    """Put the per-block model class beside the weights."""
    shutil.copyfile(modeling_bipdeploy.__file__, out / CODE_FILE)


def onnx_folders(export: Path | None) -> dict[str, Path]:
    """The ONNX folders that an export stage wrote, by the prefix of their figures: `onnx`,
    `onnx.int4`…"""
    if export is None:
        return {}
    return {folder.name.replace("-", ".", 1): folder for folder in sorted(export.glob("onnx*"))
            if (folder / "model.onnx").is_file()}
