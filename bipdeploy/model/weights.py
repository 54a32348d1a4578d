"""Which weights of a folder count: those that transformers would load, under the names it knows.

What would load otherwise there is refused, so that the model that is pruned is the one that is
measured as dense. Reads headers only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bipdeploy.errors import InputError
from bipdeploy.model import tensor_file
from bipdeploy.model.tensor_file import Entry

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What torch.compile, data parallelism, and wrappers of models put before every name; transformers
# knows none of these, and would start such tensors at random.
WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "base_model.model.")
FLOATS = ("F64", "F32", "F16", "BF16")


def entries(folder: Path, config: Mapping[str, Any]) -> dict[str, Entry]:
    """Where every tensor of a checkpoint folder is, by transformers' name.

    Like transformers, `model.safetensors` goes before an index beside it, and the names of a base
    model (saved without its head) get their `model.` back. Raises InputError where there are no
    weights, where a file is missing or damaged, or where transformers would read something else.
    """
    require_own(folder, config)
    return _renamed(stored(folder), folder)


def require_own(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise InputError where transformers would load other weights than the folder's usual ones."""
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder} has an adapter_config.json, so transformers would load another "
                         "model and put adapters on it; merge them first (merge_and_unload), and "
                         "give the folder that is saved then")
    if config.get("transformers_weights"):
        raise InputError(f"{folder}/config.json: transformers_weights names other weights than "
                         f"{SINGLE}, which are not read; save the model again without it")


def wrapper(folder: Path) -> str | None:
    """What a wrapper has put before every name of a folder's tensors; None where nothing is, or
    only some have it. Raises InputError as `entries`."""
    if not ((folder / SINGLE).is_file() or (folder / INDEX).is_file()):
        return None
    names = list(stored(folder))
    return next((own for own in WRAPPERS if all(name.startswith(own) for name in names)), None)


def stored(folder: Path) -> dict[str, Entry]:
    """Where every tensor is, by the name that is stored. Raises InputError as `entries`."""
    if (folder / SINGLE).is_file():
        return tensor_file.entries(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _sharded(folder)
    raise InputError(_without_weights(folder))


def _sharded(folder: Path) -> dict[str, Entry]:
    index = folder / INDEX
    try:
        named = {str(k): str(v) for k, v in
                 dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"]).items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{index} is damaged ({type(error).__name__}: {error}); copy it "
                         "again") from error
    files = sorted(set(named.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise InputError(f"{folder}: shard {missing[0]} is missing "
                         f"({len(missing)} of {len(files)}); copy it again")
    shards = {file: tensor_file.entries(folder / file) for file in files}
    for tensor, file in named.items():
        if tensor not in shards[file]:
            raise InputError(f"{folder / file} lacks tensor {tensor}, which {INDEX} "
                             "places there; copy it again")
    found: dict[str, Entry] = {}
    for file, own in shards.items():  # all that stands in them, as transformers reads them
        for tensor, entry in own.items():
            if tensor in found:
                raise InputError(f"{folder}: tensor {tensor} stands in {found[tensor].path.name} "
                                 f"and in {file}, and which of them counts is not said; the shards "
                                 "are of different models, copy all of them again")
            found[tensor] = entry
    return found


def _without_weights(folder: Path) -> str:
    pickled = sorted(p.name for p in folder.glob("*.bin"))
    if pickled:
        return (f"{folder} has only pickled weights ({pickled[0]}), which are not opened; save the "
                "model as safetensors first")
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    return f"{folder} has no {SINGLE}" + (
        f", and no index that names {others[0]}; rename it, or copy {INDEX} too" if others else "")


def _renamed(found: dict[str, Entry], folder: Path) -> dict[str, Entry]:
    """The same under transformers' names. Raises InputError for a wrapper's."""
    for wrapper in WRAPPERS:
        if any(name.startswith(wrapper) for name in found):
            raise InputError(f"{folder}: tensor {next(n for n in found if n.startswith(wrapper))}: "
                             f"names begin with {wrapper!r}, not all of them or in a model that is "
                             f"not read from there; save the model inside ({_inside(wrapper)})")
    if "model.embed_tokens.weight" in found or "embed_tokens.weight" not in found:
        return found
    return {name if name.startswith(("lm_head.", "model.")) else f"model.{name}": entry
            for name, entry in found.items()}


def _inside(wrapper: str) -> str:
    return {"_orig_mod.": "model._orig_mod", "module.": "model.module"}.get(
        wrapper, "unwrapped, or merged")


def fault(name: str, entry: Entry, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a tensor that should have a shape; None where nothing is."""
    if entry.shape != shape:
        if 0 in entry.shape:
            return (f"{entry.path}: tensor {name} is empty: the model was saved under DeepSpeed "
                    "ZeRO-3 without its weights being gathered; save it with "
                    "stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py")
        return (f"{entry.path}: tensor {name} is {_times(entry.shape)}, and by config.json it is "
                f"{_times(shape)}; they belong to different models, copy both again")
    if entry.type not in FLOATS:
        return (f"{entry.path}: tensor {name} is stored as {entry.type}: quantised weights are not "
                "read; give the model in bfloat16, float16 or float32")
    return None


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
