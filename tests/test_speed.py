"""The speed benchmarks: cases and ideals, records and resuming, and a whole run on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import random_model
from bipdeploy.errors import InputError
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.model.checkpoint import read_config
from bipdeploy.model.families import architecture
from bipdeploy.pruning.slicing import slice_block
from bipdeploy.recipe.model import ModelSection, ShapeSection
from bipdeploy.recipe.score import ScoreSection
from bipdeploy.stages.score import score_together
from speed import command, decoding, hardware, models, torch_cases
from speed.cases import Case, Grid, Sizes, chosen
from speed.results import Results
from speed.shapes import config_of
from tests.running import ENVIRONMENT, ROOT, python
from tests.sliced import loaded

CPU = torch.device("cpu")
GRID, SIZES = command.TINY
SIZES = replace(SIZES, dtype="float32")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`python benchmarks/gpu.py ARGUMENTS`, as in a checkout."""
    return subprocess.run([sys.executable, "benchmarks/gpu.py", *map(str, arguments)],
                          capture_output=True, text=True, check=False, cwd=ROOT,
                          env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)})


def test_the_most_telling_cases_come_first():
    names = [str(case) for case in Grid(("7B", "13B")).cases]
    assert len(names) == len(set(names))
    assert names[:7] == ["7B/score", "7B/decode/b1/c2048/30%", "7B/decode/b1/c2048/50%",
                         "7B/decode/b1/c128/30%", "7B/decode/b1/c128/50%",
                         "7B/prefill/b1/c2048/30%", "7B/prefill/b1/c2048/50%"]


def test_only():
    cases = Grid(("7B",)).cases
    assert list(map(str, chosen(cases, ["7B/decode/b1/c2048/30%", "7B/sc*"]))) == [
        "7B/score", "7B/decode/b1/c2048/30%"]
    assert chosen(cases, []) == cases
    with pytest.raises(InputError, match=r"--only 8B/\*"):
        chosen(cases, ["8B/*"])


def test_the_memory_of_a_large_batch_says_that_it_does_not_fit():
    sizes, gib = Sizes(), 2**30
    assert 12.55 + 8.8 < Case("7B", "decode", 1, 128, 30).memory(sizes) / gib < 24
    cache = 64 * 2112 / 2 / 1024  # GiB, at half a MiB per token
    assert Case("7B", "decode", 64, 2048, 30).memory(sizes) / gib > 12.55 + cache > 78
    assert Case("13B", "decode", 1, 2048, 30).memory(sizes) / gib < 60


def test_costs_are_those_of_the_models():
    sizes = replace(SIZES, new=2)
    for removed, number in ((0, 0), (50, 1)):
        model = models.random_model(Case("tiny", "onnx").config(removed, sizes), torch.float32, CPU)
        weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
        cache = decoding.static_cache(model, 7)
        with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
            model(torch.zeros(2, 7, dtype=torch.long), past_key_values=cache, use_cache=True,
                  logits_to_keep=1)
        cached = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
        costs = Case("tiny", "onnx", 2, 6, 50).costs(sizes)
        assert costs["decode"][number] == 4 * (weights + cached)
        flops = Case("tiny", "prefill", 2, 7, 50).costs(sizes)["prefill"][number]
        # Angles of the rotary embedding are a product in some versions.
        assert counted.get_total_flops() - flops in (0, 2 * 7 * 8)


def test_the_walker_scores_as_the_pipeline_does(tmp_path):
    folder = models.random_checkpoint(tmp_path / "model", config_of("tiny", "float32"))
    walker = BlockWalker(folder, ModelSection(id="tiny", device="cpu"))
    windows = [torch.randint(4096, (2, 16), generator=torch.Generator().manual_seed(1))]
    loaded = models.random_model(config_of("tiny"), torch.float32, CPU)
    loaded.load_state_dict(walker.checkpoint.tensors(walker.checkpoint.entries))
    own = torch_cases.Walker(loaded)
    wanted, found = (score_together(w, windows, [ScoreSection()], 0)[0].scores
                     for w in (walker, own))
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(a.heads, b.heads, rtol=1e-5, atol=0)
        torch.testing.assert_close(a.ffn, b.ffn, rtol=1e-5, atol=0)


def test_slices_are_those_of_the_pruned_model():
    case = Case("tiny", "slice", removed=50)
    dense, pruned = (models.random_model(case.config(removed, SIZES), torch.float32, CPU)
                     for removed in (0, 50))
    kept = torch_cases._kept(case, SIZES)
    tensors = torch_cases.sliced(dense, kept)
    for layer, own in zip(pruned.model.layers, tensors, strict=True):
        layer.load_state_dict(own)
    block = {name: p.data for name, p in dense.model.layers[1].named_parameters()}
    again = slice_block(block, architecture(dense.config.to_dict()), 1, kept[1])
    assert all(torch.equal(tensors[1][name], again[name]) for name in again)


@torch.no_grad()
def test_decoding_through_the_static_cache_says_the_same_tokens():
    case, sizes = Case("tiny", "decode", 2, 24, 50), SIZES
    measuring = torch_cases.Torch(CPU, sizes, eager=True)
    model, ids = measuring.model(case, 50), measuring._ids(case, 2, 24)
    decoder = decoding.Decoder(model, case, sizes, eager=True)
    cache = decoding.static_cache(model, 24 + sizes.new)
    first = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    for own, filled in zip(decoder.cache.layers, cache.layers, strict=True):
        own.keys.copy_(filled.keys)
        own.values.copy_(filled.values)
    said = torch.cat([ids, first], 1)
    for _ in range(sizes.new):
        said = torch.cat([said, model(said, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    for _ in range(2):  # the second round, rewound, says what the first said
        decoder.rewind()
        decoder.token.copy_(first)
        found = []
        for _ in range(sizes.new):
            decoder.run(1)
            found.append(decoder.token.clone())
        assert torch.equal(torch.cat(found, 1), said[:, 25:])


def test_records_count_for_their_own_setup(tmp_path):
    path = tmp_path / "results.json"
    first = Results(path, {"gpu": "A"}, "one")
    first.add("7B/score", {"figures": {}, "seconds": 10.0, "work": 7})
    first.add("7B/vllm/c128/30%", {"not_run": "vLLM is not installed"})
    again, other = Results(path, {"gpu": "A"}, "one"), Results(path, {"gpu": "B"}, "two")
    assert again.done("7B/score") and not again.done("7B/vllm/c128/30%")
    assert not other.done("7B/score")
    other.add("13B/score", {"figures": {}, "seconds": 30.0, "work": 13})
    written = json.loads(path.read_text())
    assert {name: written["setups"][record["setup"]]["gpu"]
            for name, record in written["records"].items()} == {
                "7B/score": "A", "7B/vllm/c128/30%": "A", "13B/score": "B"}
    assert again.expected_seconds("7B/score", 6) == pytest.approx(12)
    assert again.expected_seconds("13B/score", 14) == pytest.approx(24)
    assert other.expected_seconds("7B/score", 7) == pytest.approx(36)
    assert again.expected_seconds("7B/refit/30%", 7) > 100


def test_the_results_say_where_gpu_figures_stand():
    measured = list((ROOT / "benchmarks" / "results").glob("gpu-*.json"))
    pages = (ROOT / "docs" / "pages" / "results.md").read_text()
    said = "GPU figures are still to be measured" in pages
    assert said is not bool(measured)


def measure(path: Path, *arguments: str, monkeypatch) -> int:
    """`gpu.py` in this process."""
    words = ["gpu.py", "--device", "cpu", "--shape", "tiny", "--out", str(path), *arguments]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        command.main("", Grid(("7B",)), Sizes(), "cuda")
    return int(ended.value.code)


def test_what_does_not_fit_is_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hardware, "free_memory", lambda _: 2**29)
    assert measure(tmp_path / "r.json", "--only", "tiny/score", monkeypatch=monkeypatch) == 0
    record = json.loads((tmp_path / "r.json").read_text())["records"]["tiny/score"]
    assert record["not_run"].startswith("needs 1.") and "0.5 are free" in record["not_run"]
    assert "tiny/score | not run: needs" in capsys.readouterr().out


def test_a_budget_that_is_over_starts_nothing(tmp_path, monkeypatch, capsys):
    assert measure(tmp_path / "r.json", "--budget-minutes", "0", monkeypatch=monkeypatch) == 0
    assert not (tmp_path / "r.json").exists()
    assert "left for another run of the same command: 15" in capsys.readouterr().err


def test_a_failed_case_leaves_the_others_alone(tmp_path, monkeypatch):
    def broken(*_: object) -> dict:
        raise ValueError("no such kernel")

    monkeypatch.setattr(torch_cases.Torch, "slice", broken)
    patterns = ("--only", "tiny/slice/50%", "--only", "tiny/score")
    assert measure(tmp_path / "r.json", *patterns, monkeypatch=monkeypatch) == 1
    records = json.loads((tmp_path / "r.json").read_text())["records"]
    assert records["tiny/slice/50%"]["failed"] == "ValueError: no such kernel"
    assert "figures" in records["tiny/score"]


def test_what_failed_before_comes_last(tmp_path, monkeypatch, capsys):
    """It may fail again, and end the device for those behind it."""
    def broken(*_: object) -> dict:
        raise ValueError("no such kernel")

    monkeypatch.setattr(torch_cases.Torch, "score", broken)
    monkeypatch.setattr(command, "_alive", lambda _: False)
    patterns = ("--only", "tiny/slice/50%", "--only", "tiny/score")
    assert measure(tmp_path / "r.json", *patterns, monkeypatch=monkeypatch) == 1
    assert "tiny/slice/50%" not in json.loads((tmp_path / "r.json").read_text())["records"]
    assert measure(tmp_path / "r.json", *patterns, monkeypatch=monkeypatch) == 1
    records = json.loads((tmp_path / "r.json").read_text())["records"]
    assert "figures" in records["tiny/slice/50%"] and "failed" in records["tiny/score"]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--table", "--out", str(tmp_path / "r.json")])
    with pytest.raises(SystemExit) as ended:
        command.main("", Grid(("7B",)), Sizes(), "cuda")
    assert ended.value.code == 0 and "failed: ValueError" in capsys.readouterr().out


def test_results_that_cannot_be_written_are_refused_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert measure(tmp_path / "file" / "r.json", monkeypatch=monkeypatch) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.slow
def test_dry_run_needs_no_gpu_and_no_torch():
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("7B/score ")
    assert "7B/decode/b64/c2048/30%        133.9 GiB  decode at most 1.45 times" in done.stdout
    assert done.stdout.endswith("165 cases\n")
    loaded = python("""
import atexit, runpy, sys
sys.argv = ["gpu.py", "--dry-run"]
sys.path.insert(0, "benchmarks")
atexit.register(lambda: print("torch" in sys.modules))
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
""")
    assert loaded.stdout.endswith("False\n")


def test_a_tiny_run_is_no_result(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--shape", "tiny"])
    with pytest.raises(SystemExit) as ended:
        command.main("", Grid(("7B",)), Sizes(), "cuda")
    assert ended.value.code == 2 and "--out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = run()
    assert done.returncode == 2
    assert done.stderr == ("error: --device cuda: PyTorch finds no CUDA GPU here; --dry-run lists "
                           "the cases\n")


@pytest.mark.slow
def test_a_whole_run_on_a_cpu_and_going_on(tmp_path):
    path = tmp_path / "gpu-test.json"
    arguments = ("--device", "cpu", "--shape", "tiny", "--out", path, "--rounds", 2)
    first = run(*arguments, "--only", "tiny/score", "--only", "tiny/decode/b1/*")
    assert first.returncode == 0, first.stderr
    before = json.loads(path.read_text())["records"]
    assert set(before) == {"tiny/score", "tiny/decode/b1/c24/50%", "tiny/decode/b1/c8/50%"}
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    records = written["records"]
    assert len(records) == 15 and len(written["setups"]) == 1
    assert {name: records[name] for name in before} == before  # not measured again
    for name, record in records.items():
        if "/vllm/" in name:
            assert "not_run" in record  # none here, or none that takes this shape
            continue
        assert "figures" in record, (name, record)
        assert record["state"]["after"]["load_average"] >= 0
    assert records["tiny/score"]["figures"]["score_over_forward"]["median"] > 0
    assert records["tiny/prefill/b2/c24/50%"]["figures"]["ideal_speedup"] > 1.5
    assert "| tiny/decode/b1/c24/50% |" in done.stdout


def test_a_random_model_has_the_sizes_of_the_recipe_and_runs(tmp_path, monkeypatch, capsys):
    shape = {"model_type": "llama", "hidden": 32, "intermediate": 64, "blocks": 2, "heads": 4,
             "kv_heads": 2, "head_dim": 8, "vocabulary": 4096, "max_positions": 64,
             "dtype": "float16"}
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({
        "name": "r", "model": {"id": "random/tiny", "shape": shape},
        "calibration": {"data": "builtin:pydocs"}, "prune": {"ratio": 0.3}}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    folder = random_model.made(path, ["model.device=cpu"])
    assert architecture(read_config(folder)) == architecture(ShapeSection(**shape).config)
    model = loaded(folder)
    assert torch.isfinite(model(torch.zeros(1, 4, dtype=torch.long)).logits).all()
    with pytest.raises(InputError, match="random/tiny is there already"):
        random_model.made(path, [])
