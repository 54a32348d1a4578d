"""Where a model comes from: shipped with the package, a local folder, or the hub.

Imports no torch; `fingerprint` lets a stage be reused without reading gigabytes again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from bipdeploy.errors import InputError, did_you_mean
from bipdeploy.model.checkpoint import read_config
from bipdeploy.recipe.model import ModelSection

BUILTIN_FOLDER = Path(__file__).parent.parent / "builtin"
BUILTIN_MODELS = ("pico",)
_WHOLE_HASH_BYTES = 64 << 20
_DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def model_folder(model: str, revision: str | None = None, *, code: bool = False,
                 weights: bool = True) -> Path:
    """The local folder of a model, downloaded from the hub where needed.

    `code`: fetch the checkpoint's Python files too (only with `trust_remote_code`). Without
    `weights` only `config.json` is fetched.
    Raises InputError with one line that says what was looked for and what to do.
    """
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
    if path.exists():
        raise InputError(f"model.id: {model!r} is a file; give the folder that holds config.json")
    if not is_hub_id(model):
        raise InputError(f"model.id: there is no folder {model!r}; give a model folder, a hub id "
                         "such as org/name, or builtin:pico")
    patterns = [*_DOWNLOADED, "*.py"] if code else _DOWNLOADED
    return _download(model, revision, patterns if weights else ["config.json"])


def is_local(model: str) -> bool:
    """Whether a model needs no hub."""
    return model.startswith("builtin:") or Path(model).expanduser().exists()


def config_of(section: ModelSection) -> tuple[dict[str, Any], Path | None]:
    """A model's config and folder, without its weights.

    Where the hub does not give the config, the recipe's `model.shape` stands in for it, and there
    is no folder. Raises InputError where there is no shape either.
    """
    try:
        folder = model_folder(section.id, section.revision, weights=False)
    except InputError:
        if section.shape is None or not is_hub_id(section.id):
            raise
        return section.shape.config, None
    return read_config(folder), folder


def is_hub_id(model: str) -> bool:
    """Whether a model is neither built in nor a path."""
    return not model.startswith(("builtin:", ".", "/", "~")) and model.count("/") == 1


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise InputError(f"model.id: {model} asks for its licence to be accepted on the hub; do "
                         "that, then log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise InputError(f"model.revision: {model} has no revision {revision!r}") from error
    except LocalEntryNotFoundError as error:
        raise InputError(f"model.id: {model} is neither a local folder nor in the hub cache, and "
                         "the hub cannot be reached; use a local folder or builtin:pico") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"model.id: the hub has no model {model}, or it is private; check the id "
                         "or log in with `hf auth login`") from error
    except (HfHubHTTPError, OSError) as error:
        line = str(error).strip().splitlines()[0]
        raise InputError(f"model.id: {model} could not be downloaded: {line}") from error
    if "*.safetensors" in patterns and not any(folder.glob("*.safetensors")):
        raise InputError(f"model.id: {model} has no safetensors here: its repository has none, or "
                         "only its config.json is in the hub cache and the hub cannot be reached; "
                         "go online once, or give a folder that holds them")
    return folder


def fingerprint(folder: Path) -> str:
    """A hash that changes when the model does.

    Small files are hashed whole; of a large one the name, size, time and first MiB (which
    holds the safetensors header) are.
    """
    digest = hashlib.sha256()
    read_config(folder)  # one clear line where this is no model folder
    for path in sorted(p for p in folder.iterdir() if p.suffix in {".json", ".safetensors"}):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            if size > _WHOLE_HASH_BYTES:
                digest.update(str(path.stat().st_mtime_ns).encode())
                digest.update(file.read(1 << 20))
            else:
                digest.update(file.read())
    return digest.hexdigest()
