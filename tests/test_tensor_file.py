"""Safetensors files as we read and write them are the library's own, and a damaged one is named."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bipdeploy.errors import InputError
from bipdeploy.model import tensor_file
from bipdeploy.model.tensor_file import HEADER_BYTES, TYPES, TensorFile, entries

DTYPES = [getattr(torch, name) for name, _ in TYPES.values()]


def drawn(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    values = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(len(shape)))
    return values.to(dtype)


def examples() -> dict[str, torch.Tensor]:
    """Every type with a scalar, an empty tensor, a matrix; wide types first, so that all align."""
    return {f"{dtype}.{len(shape)}": drawn(dtype, *shape)
            for dtype in sorted(DTYPES, key=lambda dtype: -dtype.itemsize)
            for shape in ((), (0,), (3, 4), (2, 1, 5))}


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    file = TensorFile(path)
    for name, tensor in tensors.items():
        assert file.room(name, tensor)
        file.add(name, tensor)
    file.close()
    return path


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].double(), tensor.double()), name


def test_the_library_reads_what_is_written(tmp_path):
    assert_same(load_file(write(tmp_path / "a", examples())), examples())


def test_what_the_library_wrote_is_read(tmp_path):
    save_file(examples(), tmp_path / "a", {"format": "pt"})
    assert_same({name: e.read() for name, e in entries(tmp_path / "a").items()}, examples())


def test_views_and_other_strides_are_written_by_value(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    views = {"rows": whole[1:3], "columns": whole[:, ::2], "turned": whole.T}
    assert_same(load_file(write(tmp_path / "a", views)), views)


def test_a_tensor_that_would_not_be_aligned_and_one_name_too_many_go_to_the_next_file(tmp_path):
    file = TensorFile(tmp_path / "a")
    file.add("one", torch.zeros(3, dtype=torch.bfloat16))
    assert not file.room("two", torch.zeros(1))
    assert file.room("two", torch.zeros(1, dtype=torch.float16))
    file.abandon()
    file, count = TensorFile(tmp_path / "b"), 0
    while file.room(f"model.layers.{count}.weight", torch.zeros(1)):
        file.add(f"model.layers.{count}.weight", torch.zeros(1))
        count += 1
    file.close()
    assert count > 500
    assert len(load_file(tmp_path / "b")) == count
    assert (tmp_path / "b").stat().st_size == HEADER_BYTES + 4 * count


def test_nothing_of_a_file_stays_mapped(tmp_path):
    path = write(tmp_path / "weights-of-a-model", {"a": torch.ones(1 << 20)})
    tensor = entries(path)["a"].read()
    assert tensor.sum() == 1 << 20
    assert path.name not in Path("/proc/self/maps").read_text()


def damage(header: dict, data: int = 8, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def place(dtype: str = "F32", shape: tuple = (2,), offsets: tuple = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("content", [
    b"", b"\0" * 8, b"\xff" * 40, damage({"a": place()})[:-1], damage({"a": place()}) + b"\0",
    damage({"a": place()}, length=10 ** 6),
    damage({"a": place(shape=(3,))}), damage({"a": place(shape=(-2,))}),
    damage({"a": place(offsets=(4, 12))}, 12), damage({"a": place(), "b": place()}),
    damage({"a": place(offsets=(0,))}), damage({"a": 3}), damage({"a": {**place(), "more": 1}}),
    struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 4) + b"nil}"])
def test_a_file_that_is_not_whole_is_named(tmp_path, content):
    assert entries(write(tmp_path / "good", {"a": torch.ones(2)}))
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(InputError, match=r"bad is damaged or truncated"):
        entries(tmp_path / "bad")


def test_a_type_that_is_not_read_is_named(tmp_path):
    (tmp_path / "a").write_bytes(damage({"a": place(dtype="F4")}))
    with pytest.raises(InputError, match=r"a has tensors of type F4, which are not read"):
        entries(tmp_path / "a")


def test_a_file_that_is_cut_off_after_its_header_was_read_is_named(tmp_path):
    path = write(tmp_path / "a", {"a": torch.ones(1000)})
    found = entries(path)["a"]
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(InputError, match="damaged or truncated"):
        found.read()


def test_the_table_of_types_is_pytorchs():
    assert all(getattr(torch, name).itemsize == size for name, size in tensor_file.TYPES.values())
