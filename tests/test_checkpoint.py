"""Checkpoints: what is written is read back, and what is damaged is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bipdeploy import api
from bipdeploy.errors import InputError
from bipdeploy.model import checkpoint
from bipdeploy.model.checkpoint import INDEX, SINGLE, Checkpoint, CheckpointWriter, read_config
from bipdeploy.model.tensor_file import HEADER_BYTES
from tests.sliced import (
    architecture_of,
    draw_kept,
    loaded,
    logits,
    short_calibration,
    token_windows,
    write_sliced,
)
from tests.tiny import tiny_model


def rewrite(source: Path, folder: Path) -> Path:
    """Copy a checkpoint through the reader and the writer, block by block."""
    dense = Checkpoint(source)
    with CheckpointWriter(folder, dense.config, source) as writer:
        writer.add(dense.tensors(dense.outside_blocks()))
        for index in range(dense.config["num_hidden_layers"]):
            writer.add(dense.block(index), f"model.layers.{index}.")
    return folder


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = Checkpoint(a), Checkpoint(b)
    assert first.entries.keys() == second.entries.keys()
    for name, tensor in first.tensors(first.entries).items():
        other = second.tensors([name])[name]
        assert other.dtype == tensor.dtype
        assert torch.equal(other, tensor)


@pytest.fixture
def sharded(tiny, tmp_path, monkeypatch) -> Path:
    """The tiny model in several files."""
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 200_000)
    return rewrite(tiny, tmp_path / "sharded")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_a_rewritten_model_has_the_same_tensors(variant, tmp_path):
    folder = rewrite(variant, tmp_path / "copy")
    assert_same_tensors(variant, folder)
    assert [p.name for p in folder.glob("*.safetensors")] == [SINGLE]
    assert not (folder / INDEX).exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_types_are_kept(tmp_path, dtype):
    source = tiny_model(tmp_path / "model", dtype=dtype)
    folder = rewrite(source, tmp_path / "copy")
    assert_same_tensors(source, folder)
    assert {t.dtype for t in load_file(folder / SINGLE).values()} == {dtype}


def test_shards_read_back_identical(tiny, sharded):
    assert len(shards(sharded)) > 3
    assert_same_tensors(tiny, sharded)
    for index in range(3):
        dense, copied = Checkpoint(tiny).block(index), Checkpoint(sharded).block(index)
        assert all(torch.equal(dense[name], copied[name]) for name in dense)


def test_transformers_loads_shards(tiny, sharded):
    ids = token_windows(1, 16)
    model = AutoModelForCausalLM.from_pretrained(sharded)
    assert torch.equal(logits(model.eval(), ids), logits(loaded(tiny), ids))


def test_the_index_names_every_tensor_and_the_whole_size(tiny, sharded):
    index = json.loads((sharded / INDEX).read_text())
    by_file = {path.name: load_file(path) for path in shards(sharded)}
    assert index["weight_map"] == {name: file for file, tensors in by_file.items()
                                   for name in tensors}
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for tensors in by_file.values() for t in tensors.values())
    assert {path.name for path in shards(sharded)} == {
        f"model-{n:05d}-of-{len(by_file):05d}.safetensors" for n in range(1, len(by_file) + 1)}
    assert not list(sharded.glob("shard-*"))


def test_shards_close_at_their_size_unless_one_tensor_is_larger(sharded):
    for path in shards(sharded):
        tensors = load_file(path)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert size <= 200_000 or len(tensors) == 1


def test_a_sharded_per_block_model_loads(tiny, tmp_path, monkeypatch):
    kept = draw_kept(architecture_of(tiny), [(0, 48), (1, 96), (2, 33)])
    single = write_sliced(tiny, tmp_path / "single", kept)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 50_000)
    several = write_sliced(tiny, tmp_path / "several", kept)
    assert len(shards(several)) > 3
    ids = token_windows(1, 16)
    assert torch.equal(logits(loaded(several), ids), logits(loaded(single), ids))


def test_a_sharded_model_goes_through_the_stages(tiny, sharded, tmp_path):
    settings = short_calibration(tmp_path)
    found = []
    for source in (tiny, sharded):
        scores = api.score(str(source), tmp_path / f"{source.name}-score", settings)
        pruned = api.prune(str(source), scores, tmp_path / f"{source.name}-prune", 0.3,
                           ["prune.round_to=8"])
        found.append(pruned / "model")
    assert_same_tensors(*found)
    assert len(shards(found[1])) > 3


def test_views_of_one_storage_are_written_on_their_own(tiny, tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    with CheckpointWriter(tmp_path / "views", read_config(tiny), tiny) as writer:
        writer.add({"rows": whole[:1], "columns": whole[:, 1], "turned": whole.T})
    read = load_file(tmp_path / "views" / SINGLE)
    assert torch.equal(read["rows"], whole[:1])
    assert torch.equal(read["columns"], whole[:, 1])
    assert torch.equal(read["turned"], whole.T)
    assert (tmp_path / "views" / SINGLE).stat().st_size == HEADER_BYTES + 4 * (4 + 3 + 12)


def test_the_tokenizer_and_generation_settings_come_along(tiny, sharded):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (sharded / name).read_bytes() == (tiny / name).read_bytes()


def test_a_writer_that_fails_writes_no_config(tiny, tmp_path):
    with pytest.raises(RuntimeError, match="stop"), \
            CheckpointWriter(tmp_path / "half", read_config(tiny), tiny) as writer:
        writer.add({"a": torch.zeros(2)})
        raise RuntimeError("stop")
    assert not (tmp_path / "half" / "config.json").exists()


def test_rotary_frequencies_of_old_checkpoints_are_no_weights(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "old")
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(folder / SINGLE), name: torch.ones(16)}, folder / SINGLE,
              {"format": "pt"})
    assert Checkpoint(folder).block(1).keys() == Checkpoint(tiny).block(1).keys()
    assert name not in Checkpoint(folder).outside_blocks()


def test_a_missing_shard_is_named(sharded):
    gone = shards(sharded)[2]
    gone.unlink()
    with pytest.raises(InputError, match=rf"{gone.name} is missing \(1 of "):
        Checkpoint(sharded)


@pytest.mark.parametrize("left", [0, 6, 1000, -1])
def test_a_truncated_shard_is_named(sharded, left):
    cut = shards(sharded)[1]
    cut.write_bytes(cut.read_bytes()[:left])
    with pytest.raises(InputError, match=rf"{cut.name} is damaged or truncated"):
        whole = Checkpoint(sharded)
        whole.tensors(whole.entries)


@pytest.mark.parametrize("left", [0, 6, 1000, -1])
def test_a_truncated_single_file_is_named(tiny, tmp_path, left):
    folder = shutil.copytree(tiny, tmp_path / "cut")
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:left])
    with pytest.raises(InputError, match=rf"{SINGLE} is damaged or truncated"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(InputError, match=INDEX):
        Checkpoint(sharded)


def test_a_tensor_that_a_shard_lacks_is_named(sharded):
    path = shards(sharded)[1]
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    with pytest.raises(InputError, match=name):
        Checkpoint(sharded).tensors([name])


def test_a_tensor_that_does_not_exist_is_named(tiny):
    with pytest.raises(InputError, match=r"tensor model\.layers\.9\.x is missing"):
        Checkpoint(tiny).tensors(["model.layers.9.x"])


def test_pickled_weights_are_refused_and_not_opened(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "pickled")
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"would fail where it is opened")
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*safetensors"):
        Checkpoint(folder)


def test_a_folder_without_weights_or_config_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "empty")
    (folder / SINGLE).unlink()
    with pytest.raises(InputError, match=SINGLE):
        Checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_a_damaged_config_is_named(tiny, tmp_path, text):
    folder = shutil.copytree(tiny, tmp_path / "damaged")
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        Checkpoint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight",
                                  "model.layers.1.self_attn.k_proj.weight",
                                  "model.layers.2.mlp.down_proj.weight",
                                  "model.layers.0.input_layernorm.weight"])
def test_values_that_are_not_finite_are_named(tiny, tmp_path, name, value):
    folder = shutil.copytree(tiny, tmp_path / "damaged")
    tensors = load_file(folder / SINGLE)
    tensors[name].view(-1)[5] = value
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    with pytest.raises(InputError, match=f"tensor {name} holds NaN or infinite"):
        api.score(str(folder), tmp_path / "scores", short_calibration(tmp_path))
    assert not (tmp_path / "scores").exists()
