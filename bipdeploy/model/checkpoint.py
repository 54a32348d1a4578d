"""Checkpoints on disk: a folder with `config.json`, safetensors shards and a tokenizer.

Weights are read and written tensor by tensor, so a model larger than memory passes through.
Pickled checkpoints are refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bipdeploy.errors import InputError
from bipdeploy.model import weights
from bipdeploy.model.families import Architecture, architecture
from bipdeploy.model.tensor_file import Entry, TensorFile
from bipdeploy.model.weights import INDEX, SINGLE

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2 << 30

# What makes a checkpoint usable besides config and weights, and what must go with it: patterns of
# names, copied where they exist. A licence is spelled in many ways.
_LEGAL = tuple(form(f"*{word}*") for word in ("license", "licence", "notice",
                                               "use_policy", "copying")
               for form in (str.lower, str.title, str.upper))
COMPANIONS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
              "vocab.txt", "special_tokens_map.json", "added_tokens.json", "merges.txt",
              "tekken.json", "*.model", "*.model.v[0-9]*", "*.tiktoken", "chat_template.jinja",
              "chat_template.json", "additional_chat_templates/*.jinja", "generation_config.json",
              "LICENSES/*", *_LEGAL)


class Checkpoint:
    """A readable checkpoint folder. Opening it reads the header of every shard.

    Raises InputError naming the file that is missing or damaged, or the tensor that is not there.
    """

    def __init__(self, folder: Path | str, config: Mapping[str, Any] | None = None):
        """`config`: what its config.json says, where that was read before."""
        self.folder = Path(folder)
        self.config = dict(config) if config is not None else read_config(self.folder)
        self.entries = weights.entries(self.folder, self.config)

    @cached_property
    def architecture(self) -> Architecture:
        """The sizes that its config states. Raises InputError as `families.architecture`."""
        return architecture(self.config)

    def verify(self) -> None:
        """Compare every tensor with what `config.json` asks for. Reads no weights.

        Raises InputError naming the tensor that is missing, of another shape, or quantised.
        """
        for name, shape in self.architecture.tensors():
            if fault := weights.fault(name, self.entry(name), shape):
                raise InputError(fault)

    def entry(self, name: str) -> Entry:
        """Where a tensor is. Raises InputError for an absent one."""
        if name not in self.entries:
            raise InputError(f"{self.folder}: tensor {name} is missing")
        return self.entries[name]

    def tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Load tensors by name, to the CPU and as stored. Raises InputError for an absent one."""
        return {name: self.entry(name).read() for name in names}

    def block_names(self, index: int) -> list[str]:
        """Full names of the tensors of one transformer block."""
        prefix = f"model.layers.{index}."
        # Older LLaMA checkpoints store the rotary frequencies, which are no weights.
        return [n for n in self.entries
                if n.startswith(prefix) and not n.endswith("rotary_emb.inv_freq")]

    def block(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of one transformer block, by their names within the block."""
        return {name.removeprefix(f"model.layers.{index}."): tensor
                for name, tensor in self.tensors(self.block_names(index)).items()}

    def outside_blocks(self) -> list[str]:
        """Names of the tensors that belong to no block: embeddings, final norm, head."""
        return [n for n in self.entries if not n.startswith("model.layers.")]


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
    """Writes a checkpoint folder, each tensor as it comes; shards close at `SHARD_BYTES`.

    Use as a context manager: config, companions and the index are written on leaving.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], companions_from: Path):
        self.folder, self.config, self.source = folder, dict(config), companions_from
        self._shards: list[TensorFile] = []

    def __enter__(self) -> CheckpointWriter:
        self.folder.mkdir(parents=True)
        return self

    def add(self, tensors: Mapping[str, torch.Tensor], prefix: str = "") -> None:
        """Write tensors under `prefix`, from any device."""
        for name, tensor in tensors.items():
            self._shard_for(prefix + name, tensor).add(prefix + name, tensor)

    def add_outside_blocks(self, source: Checkpoint, *, finite: bool = False) -> None:
        """Write what belongs to no block as it is in `source`, one tensor at a time.

        `finite`: raise InputError where one holds NaN or infinity.
        """
        for name in source.outside_blocks():
            tensors = source.tensors([name])
            if finite:
                require_finite(tensors, source.folder)
            self.add(tensors)

    def _shard_for(self, name: str, tensor: torch.Tensor) -> TensorFile:
        """The open shard, or the next where this tensor would make it too large."""
        if self._shards:
            shard = self._shards[-1]
            size = shard.size + tensor.numel() * tensor.element_size()
            if size <= SHARD_BYTES and shard.room(name, tensor):
                return shard
            shard.close()
        self._shards.append(TensorFile(self._path(len(self._shards) + 1)))
        return self._shards[-1]

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            if self._shards:
                self._shards[-1].abandon()
            return
        if self._shards:
            self._shards[-1].close()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, 1):
            final = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._path(number).rename(self.folder / final)
            weight_map |= dict.fromkeys(shard.names, final)
        if count > 1:
            index = {"metadata": {"total_size": sum(shard.size for shard in self._shards)},
                     "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=1))
        write_companions(self.source, self.folder)
        (self.folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")


def companions(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that `COMPANIONS` names, and the code of its tokenizer."""
    patterns = [*COMPANIONS, *(["*.py"] if tokenizer_code(folder) else [])]
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern))
             if path.is_file() and not path.name.startswith("modeling_")]
    return list(dict.fromkeys(found))


def tokenizer_code(folder: Path) -> str | None:
    """The class that a folder's tokenizer is of where that is code of its own, such as
    `tokenization_x.XTokenizer`; None where it is one of the library's."""
    try:
        stated = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        named = stated.get("auto_map")
    except (OSError, ValueError, AttributeError):
        return None  # what is wrong with it is said where the tokenizer is loaded
    classes = named.get("AutoTokenizer") if isinstance(named, dict) else named
    listed = classes if isinstance(classes, list) else [classes]
    return next((str(name) for name in listed if name), None)


def write_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation settings and licence from one checkpoint folder to another."""
    for path in companions(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
