"""What the export targets that write safetensors share: the files of the folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from bipdeploy.model.checkpoint import Checkpoint, write_companions
from bipdeploy.model.formats import CODE_FILE
from bipdeploy.running.artifacts import link_or_copy


def copy_checkpoint(source: Checkpoint, out: Path) -> None:
    """The same checkpoint in another folder. Weights are linked where the file system allows it:
    they are large and do not change."""
    out.mkdir(parents=True)
    for path in sorted(source.folder.iterdir()):
        if path.suffix == ".safetensors":
            link_or_copy(path, out / path.name)
        elif path.is_file():
            shutil.copyfile(path, out / path.name)
    write_companions(source.folder, out)  # those in folders of their own


def add_code(out: Path) -> None:
    """Put the per-block model class beside the weights."""
    shutil.copyfile(Path(__file__).with_name(CODE_FILE), out / CODE_FILE)
