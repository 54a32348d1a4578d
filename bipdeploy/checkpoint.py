"""Checkpoints on disk: a folder with `config.json`, safetensors shards and a tokenizer.

Weights are read tensor by tensor and written shard by shard, so a model larger than memory
passes through. Pickled checkpoints are refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bipdeploy.errors import InputError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 2 << 30

# What makes a checkpoint usable besides config and weights; copied where it exists.
COMPANIONS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
              "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja",
              "generation_config.json")


class Checkpoint:
    """A readable checkpoint folder. Opening it checks that every shard is there.

    Raises InputError naming the file that is missing or damaged.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self.files = self._weight_map()

    def _weight_map(self) -> dict[str, Path]:
        index = self.folder / INDEX
        if index.is_file():
            try:
                named = dict(json.loads(index.read_text())["weight_map"])
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise InputError(f"{index} is damaged ({type(error).__name__}: {error}); copy it "
                                 "again") from error
            missing = sorted({f for f in named.values() if not (self.folder / f).is_file()})
            if missing:
                raise InputError(f"{self.folder}: shard {missing[0]} is missing "
                                 f"({len(missing)} of {len(set(named.values()))}); copy it again")
            return {tensor: self.folder / file for tensor, file in named.items()}
        single = self.folder / SINGLE
        if not single.is_file():
            pickled = sorted(p.name for p in self.folder.glob("*.bin"))
            if pickled:
                raise InputError(f"{self.folder} has only pickled weights ({pickled[0]}), which "
                                 "are not opened; save the model as safetensors first")
            raise InputError(f"{self.folder} has no {SINGLE}")
        with opened(single) as file:
            return dict.fromkeys(file.keys(), single)

    def verify(self) -> None:
        """Open every shard, and find every tensor where the index places it.

        Reads the shards' headers only. Raises InputError naming the file that is cut off, or the
        tensor that is not there.
        """
        for path in sorted(set(self.files.values())):
            with opened(path) as file:
                _require(file, path, [name for name, at in self.files.items() if at == path])

    def tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Load tensors by name, to the CPU and as stored. Raises InputError for an absent one."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.files:
                raise InputError(f"{self.folder}: tensor {name} is missing")
            by_file.setdefault(self.files[name], []).append(name)
        loaded: dict[str, torch.Tensor] = {}
        for path, wanted in by_file.items():
            with opened(path) as file:
                _require(file, path, wanted)
                loaded |= {name: file.get_tensor(name) for name in wanted}
        return loaded

    def block(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of one transformer block, by their names within the block."""
        prefix = f"model.layers.{index}."
        # Older LLaMA checkpoints store the rotary frequencies, which are no weights.
        full = self.tensors(n for n in self.files
                            if n.startswith(prefix) and not n.endswith("rotary_emb.inv_freq"))
        return {name.removeprefix(prefix): tensor for name, tensor in full.items()}

    def outside_blocks(self) -> list[str]:
        """Names of the tensors that belong to no block: embeddings, final norm, head."""
        return [n for n in self.files if not n.startswith("model.layers.")]


def _require(file: Any, path: Path, names: Iterable[str]) -> None:
    """Raise InputError where an open shard lacks a tensor that the index places there."""
    absent = set(names) - set(file.keys())
    if absent:
        raise InputError(f"{path} lacks tensor {min(absent)}, which {INDEX} places there; copy it "
                         "again")


def require_finite(tensors: Mapping[str, torch.Tensor], folder: Path, prefix: str = "") -> None:
    """Raise InputError naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        low, high = tensor.aminmax()  # both NaN where one value is; much faster than every value
        if not (low.isfinite() and high.isfinite()):
            raise InputError(f"{folder}: tensor {prefix}{name} holds NaN or infinite values; the "
                             "checkpoint is damaged")


def opened(path: Path) -> Any:
    """An open safetensors file. Raises InputError where it is damaged or cut off."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or truncated ({error}); copy it again") from error


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint folder."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder} is not a model folder: it has no config.json") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} cannot be read: it holds no JSON object")
    return config


class CheckpointWriter:
    """Writes a checkpoint folder tensor by tensor; shards close at `SHARD_BYTES`.

    Use as a context manager: config, companions and the index are written on leaving.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], companions_from: Path):
        self.folder, self.config, self.source = folder, dict(config), companions_from
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def __enter__(self) -> CheckpointWriter:
        self.folder.mkdir(parents=True)
        return self

    def add(self, tensors: Mapping[str, torch.Tensor], prefix: str = "") -> None:
        """Add tensors under `prefix`. They are made contiguous and moved to the CPU."""
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size > SHARD_BYTES:
                self._flush()
            # A clone: views of one storage would each be written whole, or be refused.
            self._pending[prefix + name] = tensor.detach().cpu().contiguous().clone()
            self._pending_bytes += size

    def _flush(self) -> None:
        from safetensors.torch import save_file

        number = len(self._shards) + 1
        save_file(self._pending, self.folder / f"shard-{number:05d}.safetensors",
                  metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._total += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            return
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            final = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.folder / f"shard-{number:05d}.safetensors").rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=1))
        write_companions(self.source, self.folder)
        (self.folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")


def write_companions(source: Path, target: Path) -> None:
    """Copy tokenizer and generation settings from one checkpoint folder to another."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
