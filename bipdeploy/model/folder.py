"""What the export targets that write safetensors share: the files of the folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bipdeploy.errors import InputError
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


def require_own_code(config: Mapping[str, Any], *, trusted: bool) -> None:
    """Raise InputError where a config names code that is not ours, unless the recipe trusts it: an
    export is tried by running what it carries."""
    named = config.get("auto_map")
    classes = named.values() if isinstance(named, Mapping) else [named] if named else []
    foreign = [str(name) for name in classes
               if not str(name).startswith(f"{CODE_FILE.removesuffix('.py')}.")]
    if foreign and not trusted:
        raise InputError(f"config.json: auto_map names code of its own ({foreign[0]}), which the "
                         "export would run; set model.trust_remote_code: true if you trust it, or "
                         "take auto_map out")


def add_code(out: Path) -> None:
    """Put the per-block model class beside the weights."""
    shutil.copyfile(Path(__file__).with_name(CODE_FILE), out / CODE_FILE)
