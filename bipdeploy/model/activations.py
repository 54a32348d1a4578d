"""Where hidden states are kept between blocks: in memory, or in files that are read by batch.

A walk keeps batches of activations and replaces them by what a block makes of them. `Keep` takes
them in as they come: `list` itself, or one whose batches lie in a file.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from bipdeploy.errors import StageError
from bipdeploy.model.tensor_file import as_bytes


class Batches(Protocol):
    """Batches of activations that can be read and replaced; a list is one."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[torch.Tensor]: ...
    def __getitem__(self, index: int, /) -> torch.Tensor: ...
    def __setitem__(self, index: int, batch: torch.Tensor, /) -> None: ...


Keep = Callable[[Iterable[torch.Tensor]], Batches]


@contextmanager
def keeping(folder: Path, spill: bool, needed: int) -> Iterator[Keep]:
    """How a stage keeps its activations; `spill`: in files below `folder`, gone at the end.

    `needed` is how many bytes will be kept at once. Raises StageError where the disk has less.
    """
    if not spill:
        yield list
        return
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StageError(f"calibration.spill: {needed / 1e9:.3g} GB of activations are to be "
                         f"kept in {folder}, where {free / 1e9:.3g} GB are free; lower "
                         "calibration.samples, or give another folder with --runs or --out")
    with tempfile.TemporaryDirectory(prefix="activations-", dir=folder) as scratch:
        yield lambda batches: Spilled(Path(scratch), batches)


def replace(batches: Batches, *functions: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put what a function makes of each batch in its place, without gradients.

    With several functions each takes its turn, as `turn` says, in a thread of its own: they are
    the same for different devices.
    """
    count = len(functions)

    def take_turns(own: int) -> None:
        with torch.no_grad():  # which holds for one thread only
            for number in range(len(batches)):
                if turn(number, count) == own:
                    batches[number] = functions[own](batches[number])

    if count == 1:
        take_turns(0)
        return
    with ThreadPoolExecutor(count, thread_name_prefix="device") as devices:
        list(devices.map(take_turns, range(count)))


def turn(batch: int, devices: int) -> int:
    """Which of some devices a batch is for."""
    return batch % devices


class Spilled:
    """Batches in a file, exact and in their own types; they come back on the device they had.

    The file is gone once nothing refers to them any more.
    """

    def __init__(self, folder: Path, batches: Iterable[torch.Tensor]):
        # Open only while it is read or written: there can be as many as a search has variants.
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            self._path = Path(file.name)
            weakref.finalize(self, self._path.unlink, missing_ok=True)
            self._places: list[tuple[int, torch.Size, torch.dtype, torch.device]] = []
            for batch in batches:
                self._places.append((file.tell(), batch.shape, batch.dtype, batch.device))
                file.write(as_bytes(batch))

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, index: int) -> torch.Tensor:
        start, shape, dtype, device = self._places[index]
        batch = torch.empty(shape, dtype=dtype)
        with self._path.open("rb") as file:
            file.seek(start)
            read = file.readinto(as_bytes(batch))
        assert read == batch.numel() * batch.element_size()
        return batch.to(device)

    def __setitem__(self, index: int, batch: torch.Tensor) -> None:
        start, shape, dtype, _ = self._places[index]
        assert (batch.shape, batch.dtype) == (shape, dtype)
        with self._path.open("r+b") as file:
            file.seek(start)
            file.write(as_bytes(batch))
