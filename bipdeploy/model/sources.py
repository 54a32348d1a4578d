"""Where a model comes from: shipped with the package, a local folder, or the hub.

Imports no torch; `fingerprint` lets a stage be reused without reading gigabytes again.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from bipdeploy.errors import InputError, did_you_mean
from bipdeploy.model import gguf, hub, plain
from bipdeploy.model.checkpoint import companions, read_config
from bipdeploy.recipe.model import ModelSection

BUILTIN_FOLDER = Path(__file__).parent.parent / "builtin"
BUILTIN_MODELS = ("pico",)
_WHOLE_HASH_BYTES = 64 << 20
# What is read of a folder, besides what is copied from it.
_READ = {".json", ".safetensors", ".py"}
_running_code: set[Path] = set()


def dense_folder(section: ModelSection) -> Path:
    """The local folder of a recipe's dense model. Raises as `model_folder`."""
    return model_folder(section.id, section.revision, code=section.trust_remote_code,
                        dequantize=section.dequantize)


def model_folder(model: str, revision: str | None = None, *, code: bool = False,
                 weights: bool = True, dequantize: bool = False) -> Path:
    """The local folder of a model, downloaded from the hub where needed; of a GGUF file and of what
    is no plain checkpoint, the one that it is written out as. `dequantize`: quantised ones too.

    `code`: what the recipe's `trust_remote_code` says. With it the checkpoint's Python files are
    fetched too, and `runs_code` is true of the folder until that is asked for without. Without
    `weights` only `config.json` is fetched.
    Raises InputError with one line that says what was looked for and what to do.
    """
    folder = _find(model, revision, code=code, weights=weights)
    if weights and not model.startswith("builtin:") and (folder / "config.json").is_file():
        folder = plain.written(folder, read_config(folder), partial(fingerprint, folder),
                               dequantize=dequantize)
    if weights:
        (_running_code.add if code else _running_code.discard)(folder.resolve())
    return folder


def runs_code(folder: Path) -> bool:
    """Whether the code in a model's folder may be run: whether the recipe that this process found
    the folder for says so. A text is cut into tokens far from where a recipe is known."""
    return folder.resolve() in _running_code


def _find(model: str, revision: str | None, *, code: bool, weights: bool) -> Path:
    if model.startswith("builtin:"):
        name = model.removeprefix("builtin:")
        if name not in BUILTIN_MODELS:
            raise InputError(f"model.id: no built-in model {model!r}"
                             f"{did_you_mean(name, BUILTIN_MODELS)}")
        return BUILTIN_FOLDER / name
    path = Path(model).expanduser()
    if path.is_dir():
        # What a prune or recover stage wrote has `model` inside, an export stage `transformers`.
        places = [path, path / "model", path / "transformers"]
        return next((p for p in places if (p / "config.json").exists()), path)
    if gguf.is_gguf(path):
        return gguf.converted(path)
    if path.exists():
        raise InputError(f"model.id: {model!r} is a file; give the folder that holds config.json, "
                         "or a .gguf file")
    if not is_hub_id(model):
        raise InputError(f"model.id: there is no folder {model!r}; give a model folder, a hub id "
                         "such as org/name, or builtin:pico")
    return hub.fetch(model, revision, code=code, weights=weights)


def is_local(model: str) -> bool:
    """Whether a model needs no hub."""
    return model.startswith("builtin:") or Path(model).expanduser().exists()


def config_of(section: ModelSection) -> tuple[dict[str, Any], Path | None]:
    """A model's config and folder, without its weights.

    Where the hub does not give the config, the recipe's `model.shape` stands in for it, and there
    is no folder. Raises InputError where there is no shape either.
    """
    path = Path(section.id).expanduser()
    if gguf.is_gguf(path):  # it is written out later
        return gguf.config(path), None
    try:
        folder = model_folder(section.id, section.revision, weights=False)
    except InputError:
        if section.shape is None or not is_hub_id(section.id) or path.exists():
            raise
        return section.shape.config, None
    config = read_config(folder)
    return (plain.plain_config(config) if section.dequantize and plain.method(config)
            else config), folder


def provenance(folder: Path) -> str | None:
    """What a model's folder was made from, in words, where it was written out of another form."""
    try:
        made = json.loads((folder / plain.SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if "gguf" in made:
        own = made["gguf"]
        return (f"the dense model is {own['file']}, quantised ({own['file_type']}, "
                f"{own['quantized_tensors']} tensors) and dequantised")
    if "dequantized" in made:
        return f"the dense model was quantised ({made['dequantized']['method']}) and is dequantised"
    return None


def is_hub_id(model: str) -> bool:
    """Whether a model is neither built in nor a path."""
    return not model.startswith(("builtin:", ".", "/", "~")) and model.count("/") == 1


def fingerprint(folder: Path) -> str:
    """A hash that changes when the model does: all that is read or copied, code and templates too.

    Small files are hashed whole; of a large one the name, size, time and first MiB (which
    holds the safetensors header) are.
    """
    digest = hashlib.sha256()
    read_config(folder)  # one clear line where this is no model folder
    top = {path for path in folder.iterdir() if path.suffix in _READ and path.is_file()}
    for path in sorted(top | set(companions(folder))):
        try:
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder).as_posix()}:{size}".encode())
            with path.open("rb") as file:
                if size > _WHOLE_HASH_BYTES:
                    digest.update(str(path.stat().st_mtime_ns).encode())
                    digest.update(file.read(1 << 20))
                else:
                    digest.update(file.read())
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}; correct its rights, or "
                             "remove it") from error
    return digest.hexdigest()
