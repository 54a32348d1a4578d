"""Safetensors files, read and written one tensor at a time.

The library maps a file into memory, where the pages that were read count as this process's own
until the file is closed, and writes a file whole. Here a tensor is read into memory of its own,
and written as it comes. The format: 8 bytes with the header's length, the header (JSON with every
tensor's type, shape and place, padded with blanks), then the tensors without a gap.
"""

from __future__ import annotations

import json
import math
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bipdeploy.errors import InputError

if TYPE_CHECKING:
    import torch

# The format's names for types, PyTorch's, and bytes per value.
TYPES = {"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2),
         "BF16": ("bfloat16", 2), "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
         "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
         "U8": ("uint8", 1), "BOOL": ("bool", 1)}
_NAMES = {name: code for code, (name, _) in TYPES.items()}
_LENGTH = 8
_LONGEST_HEADER = 100_000_000  # the library's own limit

# Kept free for the header of a file that is written: some 500 tensors have room in it.
HEADER_BYTES = 64 << 10


@dataclass(frozen=True)
class Entry:
    """Where a tensor is: its type in the format's words, its shape, its first byte and size."""

    path: Path
    type: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, TYPES[self.type][0])

    def read(self, *, pinned: bool = False) -> torch.Tensor:
        """The tensor, on the CPU; `pinned`: in memory that a GPU copies from by itself.

        Raises InputError where the file has been cut off.
        """
        import torch

        tensor = torch.empty(self.shape, dtype=self.dtype, pin_memory=pinned)
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                count = file.readinto(as_bytes(tensor))
        except OSError as error:
            raise damaged(self.path, error) from error
        if count != self.size:
            raise damaged(self.path, "it ends too soon")
        return tensor


def entries(path: Path) -> dict[str, Entry]:
    """All tensors of a file, from its header. Raises InputError where the file is not whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            if not 0 < length <= min(size - _LENGTH, _LONGEST_HEADER):
                raise damaged(path, f"no header in its {size} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {name: _entry(path, _LENGTH + length, **place) for name, place in header.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise damaged(path, error) from error
    end = _LENGTH + length
    for entry in sorted(found.values(), key=lambda entry: (entry.start, entry.size)):
        if entry.start != end:
            raise damaged(path, "its tensors leave gaps or overlap")
        end += entry.size
    if end != size:
        raise damaged(path, f"it has {size} bytes, and its header says {end}")
    return found


def _entry(path: Path, origin: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Entry:
    begin, end = data_offsets
    if dtype not in TYPES:
        raise InputError(f"{path} has tensors of type {dtype}, which are not read; store the "
                         "model in bfloat16, float16 or float32")
    size = math.prod(shape) * TYPES[dtype][1]
    if end - begin != size or min(shape, default=0) < 0:
        raise ValueError("a tensor's shape and place do not agree")
    return Entry(path, dtype, tuple(shape), origin + begin, size)


def damaged(path: Path, why: object) -> InputError:
    return InputError(f"{path} is damaged or truncated ({why}); copy it again")


class TensorFile:
    """A file that is being written: `add` tensors while there is `room`, then `close`.

    The header is written last, into space that is kept free for it.
    """

    def __init__(self, path: Path):
        self.names: list[str] = []
        self.size = 0
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._header_bytes = len(json.dumps(self._header))
        self._file = path.open("wb")
        self._file.seek(HEADER_BYTES)

    def room(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether the header can name one more tensor, which would begin at a multiple of its
        values' size, as readers expect."""
        described = self._header_bytes + len(json.dumps(self._described(name, tensor)))
        return described <= HEADER_BYTES - _LENGTH and not self.size % tensor.element_size()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, from any device and with any strides."""
        described = self._described(name, tensor)
        self._file.write(as_bytes(tensor))
        self._header |= described
        self._header_bytes += len(json.dumps(described))
        self.names.append(name)
        self.size = described[name]["data_offsets"][1]

    def _described(self, name: str, tensor: torch.Tensor) -> dict[str, Any]:
        end = self.size + tensor.numel() * tensor.element_size()
        return {name: {"dtype": _NAMES[str(tensor.dtype).removeprefix("torch.")],
                       "shape": list(tensor.shape), "data_offsets": [self.size, end]}}

    def close(self) -> None:
        """Write the header. Without it the file is none."""
        with self._file:
            length = HEADER_BYTES - _LENGTH
            self._file.seek(0)
            self._file.write(struct.pack("<Q", length))
            self._file.write(json.dumps(self._header).encode().ljust(length))

    def abandon(self) -> None:
        """Leave it unfinished, whatever the disk says to that."""
        with suppress(OSError):
            self._file.close()


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's values as bytes: its own memory where it is contiguous and on the CPU."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
