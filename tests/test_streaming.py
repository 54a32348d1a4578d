"""Walking a model block by block in little memory gives, bit for bit, what a whole model gives."""

from __future__ import annotations

import gc
import json
import runpy
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bipdeploy import api
from bipdeploy.errors import InputError, StageError
from bipdeploy.model import checkpoint
from bipdeploy.model.activations import Spilled, keeping, replace
from bipdeploy.model.blocks import BlockWalker, devices_of
from bipdeploy.model.checkpoint import SINGLE, Checkpoint
from bipdeploy.pruning.criteria.statistics import Statistics
from bipdeploy.pruning.criteria.table import CRITERIA
from bipdeploy.recipe.model import ModelSection
from bipdeploy.running import machine
from bipdeploy.stages.score import score_blocks
from tests.running import ROOT
from tests.sliced import loaded, results, short_calibration
from tests.test_checkpoint import rewrite
from tests.test_criteria import recipe, walk, windows
from tests.tiny import tiny_model

SEARCHED = ["prune.layers=searched", "prune.search.points=3", "prune.search.windows=4"]


# The walk beside the whole model

def whole_statistics(folder: Path, needs: frozenset[str]) -> list[Statistics]:
    """Statistics of every block, taken by hooks on transformers' own forward passes."""
    model = loaded(folder)
    layers, caught = model.model.layers, {}
    for index, layer in enumerate(layers):
        for name, module in {"x": layer, "z": layer.self_attn.o_proj,
                             "u": layer.post_attention_layernorm}.items():
            module.register_forward_pre_hook(
                lambda _, args, kwargs, key=(index, name): caught.__setitem__(
                    key, (args or (kwargs.get("hidden_states"),))[0]), with_kwargs=True)
        for name, module in {"gate": layer.mlp.act_fn, "up": layer.mlp.up_proj, "y": layer}.items():
            module.register_forward_hook(
                lambda _, __, output, key=(index, name): caught.__setitem__(key, output))
    config = model.config
    found = [Statistics(config.num_key_value_heads, needs, config.rms_norm_eps) for _ in layers]
    for batch in windows():
        with torch.no_grad():
            model.model(batch, use_cache=False)
        for index, statistics in enumerate(found):
            x, z, u, gate, up, y = (caught[index, name] for name in ("x", "z", "u", "gate", "up",
                                                                     "y"))
            statistics.see_attention(z, u)
            statistics.see_ffn(gate, up, gate * up)
            statistics.see_output(y)
            statistics.see_flow(x, u, y)
    return found


@pytest.mark.parametrize("criterion", ["llm_bip", "flap"])
def test_statistics_are_those_of_the_whole_model_in_memory(variant, criterion, monkeypatch):
    taken: list[Statistics] = []
    influence = Statistics.influence
    monkeypatch.setattr(Statistics, "influence", lambda self: (taken.append(self),
                                                               influence(self))[1])
    score_blocks(walk(variant), windows(), recipe(variant, criterion))
    whole = whole_statistics(variant, CRITERIA[criterion].needs)
    assert len(taken) == len(whole) == 3
    for streamed, other in zip(taken, whole, strict=True):
        assert streamed.tokens == other.tokens
        assert streamed.sums.keys() == other.sums.keys()
        for name, value in other.sums.items():
            assert torch.equal(streamed.sums[name], value), name


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> Path:
    """Every stage that walks a model, in memory and in one shard."""
    out = tmp_path_factory.mktemp("memory")
    return run_all(tiny, out, short_calibration(out))


def run_all(model: Path, out: Path, settings: list[str]) -> Path:
    settings = [*settings, "prune.round_to=8"]
    for criterion in ("llm_bip", "flap", "taylor"):
        api.score(str(model), out / criterion, [*settings, f"score.criterion={criterion}"])
    api.prune(str(model), out / "llm_bip", out / "prune", 0.3, settings)
    api.prune(str(model), out / "llm_bip", out / "searched", 0.3, [*settings, *SEARCHED])
    for name, repair in (("refit", []), ("auto", ["recover.refit.ridge=auto"]),
                         ("bias", ["recover.method=bias"])):
        api.recover(str(model), out / "prune", out / name, [*settings, *repair])
    return out


@pytest.mark.parametrize("more", [["calibration.spill=true"], []], ids=["spilled", "in memory"])
def test_spilling_and_small_shards_change_no_bit(tiny, made, tmp_path, monkeypatch, more):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100_000)
    again = run_all(rewrite(tiny, tmp_path / "model"), tmp_path,
                    [*short_calibration(made), *more])
    for name in ("llm_bip", "flap", "taylor"):
        assert results(again / name) == results(made / name)
    for name in ("prune", "searched", "refit", "auto", "bias"):
        one, several = Checkpoint(made / name / "model"), Checkpoint(again / name / "model")
        assert len({entry.path for entry in several.entries.values()}) > 3
        wanted, found = (whole.tensors(sorted(whole.entries)) for whole in (one, several))
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
        for record in (made / name).glob("*.json"):
            if record.name != "manifest.json":
                assert (again / name / record.name).read_bytes() == record.read_bytes()
    assert not list(tmp_path.rglob("activations-*"))


# Several devices

@pytest.mark.parametrize("criterion", ["llm_bip", "flap", "taylor"])
def test_windows_shared_out_to_devices_give_the_statistics_of_one(tiny, tmp_path, criterion):
    one, several = walk(tiny), walk(tiny)
    several.devices = [several.device] * 2
    asked, batches = recipe(tiny, criterion), list(torch.cat(windows()).split(1))
    assert len(windows()) == 2 < len(batches)
    exact = [score_blocks(walker, windows(), asked) for walker in (one, several)]
    for a, b in zip(*(walked.scores for walked in exact), strict=True):
        assert torch.equal(a.heads, b.heads) and torch.equal(a.ffn, b.ffn)
    with keeping(tmp_path, True, 0) as keep:  # with more batches sums are in another order
        rounded = [score_blocks(walker, batches, asked, keep=keep) for walker in (one, several)]
    for found in zip(*(walked.influence for walked in rounded), strict=True):
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)
    for a, b in zip(*(walked.scores for walked in rounded), strict=True):
        torch.testing.assert_close(a.heads, b.heads, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.ffn, b.ffn, rtol=1e-5, atol=1e-6)


def test_other_gpus_are_left_alone_unless_the_recipe_asks_for_them(monkeypatch):
    def given(**settings) -> list[str]:
        return list(map(str, devices_of(ModelSection(id="m", **settings))))

    assert given(device="cpu") == ["cpu"]
    with pytest.raises(InputError, match=r"model\.devices: 2 .* runs on the CPU"):
        given(device="cpu", devices=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert given() == ["cuda:0"] and given(devices=3) == ["cuda:0", "cuda:1", "cuda:2"]
    with pytest.raises(InputError, match=r"model\.devices: 5 .* CUDA shows 4"):
        given(devices=5)


# What is held at once

def test_at_most_two_blocks_are_alive(tmp_path, monkeypatch):
    """The next one is read while one is used, and only once the one before has been let go."""
    model = tiny_model(tmp_path / "model", blocks=5)
    settings = short_calibration(tmp_path)
    alive: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
    original, counts, threads = BlockWalker.block, [], set()

    def block(self: BlockWalker, index: int, tokens: int):
        deadline = time.monotonic() + 5  # the walk's user lets go a moment after it asked
        while len(alive) > 1 and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.001)
        counts.append(len(alive))
        threads.add(threading.current_thread().name)
        made = original(self, index, tokens)
        alive.add(made.layer)
        return made

    monkeypatch.setattr(BlockWalker, "block", block)
    for criterion in ("llm_bip", "taylor"):
        scores = api.score(str(model), tmp_path / criterion,
                           [*settings, f"score.criterion={criterion}"])
    pruned = api.prune(str(model), scores, tmp_path / "prune", 0.3, ["prune.round_to=8"])
    api.prune(str(model), scores, tmp_path / "searched", 0.3,
              [*settings, *SEARCHED, "prune.round_to=8"])
    for method in ("refit", "bias"):
        api.recover(str(model), pruned, tmp_path / method, [*settings, f"recover.method={method}"])
    assert max(counts) == 1
    assert any(name.startswith("next-block") for name in threads)


def test_an_error_of_the_reading_thread_is_the_walks(tiny, tmp_path):
    folder = rewrite(tiny, tmp_path / "model")
    tensors = load_file(folder / SINGLE)
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    settings = [*short_calibration(tmp_path), "calibration.spill=true"]
    with pytest.raises(InputError, match=r"model\.layers\.2\.mlp\.up_proj\.weight holds NaN"):
        api.score(str(folder), tmp_path / "out" / "scores", settings)
    assert list((tmp_path / "out").iterdir()) == []


# Activations in files

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_spilled_batches_come_back_exactly_and_can_be_replaced(tmp_path, dtype):
    batches = [torch.randn(n, 5, 7).to(dtype) for n in (4, 4, 1)]
    spilled = Spilled(tmp_path, iter(batches))
    assert len(spilled) == 3
    assert all(torch.equal(a, b) for a, b in zip(spilled, batches, strict=True))
    replace(spilled, torch.neg)
    assert all(torch.equal(a, -b) for a, b in zip(spilled, batches, strict=True))
    assert torch.equal(spilled[0], -batches[0])
    spilled[1] = batches[0].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(spilled[1], batches[0])
    assert len(list(tmp_path.iterdir())) == 1
    del spilled
    assert list(tmp_path.iterdir()) == []


def test_the_scratch_folder_goes_with_an_error(tmp_path):
    def failing() -> Iterator[torch.Tensor]:
        yield torch.zeros(3)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), keeping(tmp_path, True, 0) as keep:
        kept = keep([torch.ones(2)])
        assert torch.equal(kept[0], torch.ones(2))
        assert len(list(tmp_path.iterdir())) == 1
        keep(failing())
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_said_before_anything_is_kept(tmp_path):
    with pytest.raises(StageError, match=r"calibration\.spill: 1\.13e\+06 GB .* GB are free"), \
            keeping(tmp_path, True, 1 << 50):
        raise AssertionError("it was kept")
    with keeping(tmp_path, False, 1 << 50) as keep:
        assert keep is list
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_benchmark_measures_every_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [
        "streaming.py", "--shape", "tiny", "--out", str(tmp_path / "out.json"), "--work",
        str(tmp_path / "work"), "--stages", "score", "prune", "--overhead", "--rounds", "2"])
    monkeypatch.setattr(machine, "quiet_libraries", lambda: None)
    runpy.run_path(str(ROOT / "benchmarks/streaming.py"), run_name="__main__")
    found = json.loads((tmp_path / "out.json").read_text())
    for stage in ("score", "prune"):
        figures = found["stages"][stage]
        assert 0 < figures["peak_anonymous_bytes"] < figures["peak_bytes"] < 8 << 30
        assert figures["read_bytes"] > 0
    for measure in ("seconds", "cpu_seconds"):
        assert found["overhead"][measure]["score_over"].keys() == {"forward", "walk"}
    assert "| prune |" in capsys.readouterr().out
    assert list((tmp_path / "work").iterdir()) == []
