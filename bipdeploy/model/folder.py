"""What the export targets that write safetensors share: the files of the folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.model.formats import CODE_FILE


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
    shutil.copyfile(Path(__file__).with_name(CODE_FILE), out / CODE_FILE)
