"""Bad input: one clear line, the right exit code, nothing half-written, earlier stages kept."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from bipdeploy.errors import StageError
from bipdeploy.model import checkpoint, sources
from bipdeploy.running import artifacts
from bipdeploy.stages.table import STAGES
from tests.running import SMOKE, bipdeploy, bipdeploy_here, leftovers, message, refused
from tests.test_checkpoint import rewrite
from tests.tiny import PICO, tiny_model


def run(runs: Path, *overrides: str, **options) -> subprocess.CompletedProcess[str]:
    """`bipdeploy run recipes/smoke.yaml --runs RUNS` with overrides, as a user runs it."""
    return bipdeploy("run", SMOKE, "--runs", runs, *settings(overrides), **options)


def run_here(runs: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, where torch is loaded already."""
    return bipdeploy_here("run", SMOKE, "--runs", runs, *settings(overrides))


def settings(overrides: tuple[str, ...]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def stages(runs: Path) -> list[str]:
    """The stages that have a folder in the smoke run; fails where one is half-written."""
    assert leftovers(runs) == []
    for folder in (runs / "smoke").iterdir() if (runs / "smoke").exists() else ():
        assert folder.name == "manifest.json" or (folder / "manifest.json").is_file(), folder
    return [name for name in STAGES if (runs / "smoke" / name).is_dir()]


@pytest.fixture
def words(tmp_path) -> Path:
    """A calibration text that is read in no time: 40 windows of 64 tokens."""
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"The value of item {n} is not a list." for n in range(400)))
    return path


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the built-in model, to be damaged."""
    return shutil.copytree(PICO, tmp_path / "model")


def edit_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# The model

def test_a_missing_model_folder(tmp_path):
    refused(run(tmp_path, "model.id=./nowhere"), 2, "model.id", "./nowhere", "no folder")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_built_in_model(tmp_path):
    refused(run_here(tmp_path, "model.id=builtin:pica"), 2, "model.id", "did you mean 'pico'?")


def test_a_model_that_is_a_file(tmp_path):
    refused(run_here(tmp_path, f"model.id={PICO / 'config.json'}"), 2, "model.id", "is a file")


def test_a_hub_model_without_the_hub(tmp_path):
    done = run(tmp_path, "model.id=org/name", env={"HF_HOME": str(tmp_path / "hub")})
    refused(done, 2, "model.id", "org/name", "hub cannot be reached", "builtin:pico")


def test_a_folder_that_is_no_model(tmp_path):
    refused(run_here(tmp_path / "runs", f"model.id={tmp_path}"), 2, str(tmp_path), "no config.json")


def test_a_config_that_is_not_json(tmp_path, model):
    (model / "config.json").write_text('{"model_type": "lla')
    refused(run_here(tmp_path / "runs", f"model.id={model}"), 2, "config.json cannot be read")


def test_a_model_type_without_a_family(tmp_path, model):
    edit_config(model, model_type="gpt2")
    refused(run(tmp_path / "runs", f"model.id={model}"), 2, "model_type 'gpt2' has no family",
            "llama", "qwen3")
    assert not (tmp_path / "runs" / "smoke" / "score").exists()


def test_a_model_type_that_is_almost_a_family(tmp_path, model):
    edit_config(model, model_type="qwen4")
    refused(run_here(tmp_path / "runs", f"model.id={model}"), 2, "did you mean 'qwen")


def test_a_config_without_a_size(tmp_path, model):
    edit_config(model, intermediate_size=None)
    refused(run_here(tmp_path / "runs", f"model.id={model}"), 2, "lacks intermediate_size")


def test_pickled_weights_are_not_opened(tmp_path, model, words):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(run_here(tmp_path / "runs", f"model.id={model}", f"calibration.data={words}"), 2,
            "only pickled weights (pytorch_model.bin)", "safetensors")


def test_no_weights(tmp_path, model, words):
    (model / "model.safetensors").unlink()
    refused(run_here(tmp_path / "runs", f"model.id={model}", f"calibration.data={words}"), 2,
            "has no model.safetensors")


@pytest.mark.slow
def test_nan_in_the_weights_and_a_cut_off_file_as_a_user_meets_them(tmp_path, model, words):
    path = model / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.6.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    overrides = (f"model.id={model}", f"calibration.data={words}")
    refused(run(tmp_path / "runs", *overrides), 2, "holds NaN")
    path.write_bytes(path.read_bytes()[:-1000])
    refused(run(tmp_path / "runs", *overrides), 2, "damaged or truncated")
    assert stages(tmp_path / "runs") == []


@pytest.mark.parametrize("size", [0, 5, 3000, 1_000_000])
def test_a_cut_off_safetensors_file(tmp_path, model, words, size):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(run_here(tmp_path / "runs", f"model.id={model}", f"calibration.data={words}"), 2,
            str(path), "damaged or truncated", "copy it again")
    assert stages(tmp_path / "runs") == []


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight",
                                    "model.layers.3.mlp.up_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_in_the_weights_that_is_not_finite(tmp_path, model, words, tensor, value):
    weights = load_file(model / "model.safetensors")
    weights[tensor][7, 11] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(run_here(tmp_path / "runs", f"model.id={model}", f"calibration.data={words}"), 2,
            f"tensor {tensor} holds NaN or infinite values")
    assert stages(tmp_path / "runs") == []


def test_a_tensor_that_is_missing(tmp_path, model, words):
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.2.self_attn.k_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(run_here(tmp_path / "runs", f"model.id={model}", f"calibration.data={words}"), 2,
            "model.layers.2.self_attn.k_proj.weight is missing")


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.norm.weight",
                                    "model.layers.2.mlp.up_proj.weight",
                                    "model.layers.6.self_attn.k_proj.weight"])
def test_a_tensor_of_another_shape(tmp_path, model, tensor):
    weights = load_file(model / "model.safetensors")
    weights[tensor] = weights[tensor][:-1].contiguous()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    for done in (run_here(tmp_path / "runs", f"model.id={model}"),
                 bipdeploy_here("check", SMOKE, "--set", f"model.id={model}"),
                 bipdeploy_here("score", model, "--out", tmp_path / "runs" / "scores")):
        line = [line for line in message(done) if "tensor" in line]
        assert done.returncode == 2
        assert len(line) == 1
        assert f"tensor {tensor} is {weights[tensor].shape[0]}" in line[0]
        assert "by config.json it is" in line[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["recover", "tune", "export", "evaluate", "bench"])
def test_a_pruned_model_whose_tensor_has_another_shape(tmp_path, model, stage):
    weights, tensor = load_file(model / "model.safetensors"), "model.layers.5.mlp.down_proj.weight"
    weights[tensor] = weights[tensor][:-1].contiguous()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    given = [model] if stage == "export" else ["builtin:pico", model]
    refused(bipdeploy_here(stage, *given, "--out", tmp_path / "out"), 2, str(model),
            f"tensor {tensor} is {len(weights[tensor])}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["gone", "cut off"])
def test_a_shard_of_the_hub_cache_that_is_not_whole(tmp_path, model, monkeypatch, damage):
    """As a download that was broken off leaves it: links to files that are not there, or short."""
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 1 << 20)
    hub, commit = tmp_path / "hub" / "models--org--name", "0" * 40
    snapshot, blobs = hub / "snapshots" / commit, hub / "blobs"
    rewrite(model, snapshot)
    blobs.mkdir()
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(commit)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert sources.model_folder("org/name") == snapshot
    shard = sorted(snapshot.glob("model-*.safetensors"))[1]
    if damage == "gone":
        shard.resolve().unlink()
    else:
        shard.resolve().write_bytes(shard.read_bytes()[:-1])
    refused(run_here(tmp_path / "runs", "model.id=org/name"), 2, shard.name,
            "is missing (1 of" if damage == "gone" else "damaged or truncated")
    assert not (tmp_path / "runs").exists()


def test_a_model_without_a_tokenizer(tmp_path, model, words):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    refused(run_here(tmp_path / "runs", f"model.id={model}", f"calibration.data={words}"), 2,
            "no tokenizer that can be loaded")


def test_a_gpu_that_is_not_there(tmp_path, words):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    refused(run_here(tmp_path, "model.device=cuda", f"calibration.data={words}"), 2,
            "model.device", "no CUDA GPU")


# The recipe

@pytest.mark.parametrize("ratio", ["0", "1", "-1", "1.5", "lots"])
def test_a_ratio_outside_0_to_1(tmp_path, ratio):
    done = run_here(tmp_path, f"prune.ratio={ratio}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    head, fault = message(done)
    assert head.endswith("smoke.yaml: 1 fault") and fault.startswith("  prune.ratio: ")


@pytest.mark.parametrize("layers", ["uniform", "global"])
def test_a_ratio_that_would_leave_a_width_of_zero(tmp_path, layers):
    done = run_here(tmp_path, "prune.ratio=0.999", f"prune.layers={layers}")
    refused(done, 2, "prune.ratio: 0.999", "can be removed")
    assert stages(tmp_path) == []


def test_a_rounding_unit_that_would_leave_a_width_of_zero(tmp_path):
    refused(run_here(tmp_path, "prune.round_to=4096", "prune.ratio=0.7"), 2, "prune.ratio", "4096")


def test_protecting_every_block(tmp_path):
    done = run_here(tmp_path, "prune.protect={first: 4, last: 3}")
    refused(done, 2, "prune.protect", "no block of 7")


def test_a_tensor_parallel_that_the_model_does_not_divide_by(tmp_path):
    line = refused(run_here(tmp_path, "hardware.tensor_parallel=3"), 2, "tensor_parallel: 3 ")
    assert line.endswith("does not divide this model (block 0: 4 query heads); use 1, 2 or 4")
    assert stages(tmp_path) == []


@pytest.mark.parametrize("override", ["calibration.tokens=512", "bench.torch.prompt_tokens=400",
                                      "evaluate.perplexity.windows=[128, 512]"])
def test_more_tokens_than_the_model_reads(tmp_path, override):
    done = run_here(tmp_path, override)
    refused(done, 2, override.rpartition(".")[0], "the model's maximum of 256")
    assert stages(tmp_path) == []


def test_a_recipe_that_is_not_yaml(tmp_path):
    (tmp_path / "r.yaml").write_text("name: x\nmodel: [id\n")
    done = bipdeploy("run", tmp_path / "r.yaml", "--runs", tmp_path / "runs")
    assert done.returncode == 2
    head, fault = message(done)
    assert head == f"error: {tmp_path / 'r.yaml'}: 1 fault"
    assert fault.startswith("  line 3: not YAML: ")
    assert not (tmp_path / "runs").exists()


def test_a_recipe_that_does_not_exist(tmp_path):
    refused(bipdeploy("run", tmp_path / "no.yaml"), 2, "no.yaml", "No such file")


def test_an_override_that_is_none(tmp_path):
    refused(run(tmp_path, "prune.ratio"), 2, "--set", "section.field=value")


# The text

def test_an_empty_calibration_text(tmp_path, words):
    words.write_text("")
    refused(run(tmp_path / "runs", f"calibration.data={words}"), 2, "calibration.data", "is empty")


def test_a_calibration_text_of_blanks(tmp_path, words):
    words.write_text(" \n\n ")
    done = run_here(tmp_path / "runs", f"calibration.data={words}")
    refused(done, 2, str(words), "holds no text")
    assert stages(tmp_path / "runs") == []


@pytest.mark.slow
def test_a_calibration_text_that_is_too_short(tmp_path, words):
    words.write_text("Only a few words. " * 20)
    refused(run(tmp_path / "runs", f"calibration.data={words}"), 2, "calibration.samples",
            "windows of 64, and 32 are asked for")
    assert stages(tmp_path / "runs") == []


def test_a_test_text_that_is_too_short_keeps_the_earlier_stages(tmp_path, smoke, words):
    words.write_text("Only a few words.")
    shutil.copytree(smoke.folder, tmp_path / "runs" / "smoke")
    before = list(STAGES)[:list(STAGES).index("evaluate")]
    for name in set(STAGES) - set(before):
        shutil.rmtree(tmp_path / "runs" / "smoke" / name)
    done = run_here(tmp_path / "runs", f"evaluate.perplexity.data={words}")
    refused(done, 2, "evaluate.perplexity", "fills no window of 128")
    assert stages(tmp_path / "runs") == before
    again = bipdeploy("run", SMOKE, "--runs", tmp_path / "runs", "--until", "export", "--json")
    assert json.loads(again.stdout)["ran"] == []


def test_an_empty_test_text_is_refused_before_the_first_stage(tmp_path, words):
    words.write_text("")
    refused(run_here(tmp_path / "runs", f"evaluate.perplexity.data={words}"), 2,
            "evaluate.perplexity.data", "is empty")
    assert stages(tmp_path / "runs") == []


@pytest.mark.parametrize("data", ["nowhere.txt", "wikitext3", "text.csv", "builtin:pydoc"])
def test_a_text_that_is_none_is_refused_before_the_first_stage(tmp_path, data):
    done = run_here(tmp_path, f"evaluate.perplexity.data={data}")
    refused(done, 2, "evaluate.perplexity.data", data)
    assert stages(tmp_path) == []


# The place

@pytest.mark.parametrize("place", ["file/runs", "file"])
def test_an_output_folder_below_a_file(tmp_path, place):
    (tmp_path / "file").write_text("")
    refused(run_here(tmp_path / place), 2, "cannot write to", "Not a directory", "--runs")


def test_an_output_folder_where_nothing_can_be_made():
    refused(run(Path("/proc/nothing/here")), 2, "cannot write to /proc/nothing/here", "--runs")


def test_a_read_only_output_folder(tmp_path):
    runs = mounted(tmp_path / "runs", "ro,size=1m")
    try:
        refused(run(runs), 2, f"cannot write to {runs}", "Read-only file system", "--runs")
    finally:
        subprocess.run(["umount", runs], check=True)


def test_a_stage_s_output_that_cannot_be_written(tmp_path, smoke):
    (tmp_path / "file").write_text("")
    done = bipdeploy("prune", "builtin:pico", smoke.folder / "score", "--ratio", "0.3",
                     "--out", tmp_path / "file" / "out")
    refused(done, 2, "cannot write to", "--out")


def test_a_full_disk_keeps_the_earlier_stages(tmp_path, words, monkeypatch):
    # Scores take 30 KB and each of the two smaller models 3.5 MB. Something else fills the disk
    # after its free space was looked at.
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    runs = mounted(tmp_path / "runs", "size=5m")
    try:
        data = f"calibration.data={words}"
        refused(run_here(runs, data), 1, "the disk is full while writing", "recover",
                "earlier stages are kept")
        assert stages(runs) == ["score", "curves", "prune"]
        subprocess.run(["mount", "-o", "remount,size=64m", runs], check=True)
        done = bipdeploy_here("run", SMOKE, "--runs", runs, "--set", data, "--until", "recover",
                              "--json")
        assert json.loads(done.stdout)["reused"] == ["score", "curves", "prune"]
        assert json.loads(done.stdout)["ran"] == ["recover"]
    finally:
        subprocess.run(["umount", runs], check=True)


@pytest.mark.parametrize("inodes", range(1, 8))
def test_a_disk_that_is_full_at_any_moment_of_a_stage(tmp_path, words, inodes):
    # The lock, the files of the first stage and the run's manifest take eight: at each count,
    # another fails.
    runs = mounted(tmp_path / "runs", f"size=5m,nr_inodes={inodes}")
    try:
        done = bipdeploy_here("run", SMOKE, "--runs", runs, "--until", "score", "--set",
                              f"calibration.data={words}")
        refused(done, 1, "the disk is full while writing", str(runs))
        assert stages(runs) == (["score"] if inodes == 7 else [])
    finally:
        subprocess.run(["umount", runs], check=True)


def test_a_json_file_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path):
    folder = mounted(tmp_path / "small", "size=64k")
    try:
        with pytest.raises(StageError, match="the disk is full while writing"):
            artifacts.write_json(folder / "a.json", "x" * 200_000)
        assert list(folder.iterdir()) == []
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_file_that_the_system_will_not_let_grow_keeps_the_earlier_stages(tmp_path, words):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = run(tmp_path / "runs", f"calibration.data={words}", preexec_fn=limited)
    refused(done, 1, "prune", "File too large")
    assert stages(tmp_path / "runs") == ["score", "curves"]


def mounted(folder: Path, options: str) -> Path:
    """A file system in memory; skips the test where this user may not mount one."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
                          capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    return folder


# Single stages

def test_scores_of_another_model(tmp_path, smoke, tiny):
    refused(bipdeploy_here("prune", tiny, smoke.folder / "score", "--ratio", "0.3", "--out",
                           tmp_path / "p", "--set", "prune.round_to=8"), 2,
            "are not of this model", "score the model again")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("command", "word"), [
    (("prune", "builtin:pico", "nowhere", "--ratio", "0.3"), "nowhere"),
    (("recover", "builtin:pico", "nowhere"), "nowhere"),
    (("export", "nowhere"), "nowhere"), (("evaluate", "builtin:pico", "nowhere"), "nowhere"),
    (("bench", "builtin:pico", "nowhere"), "nowhere"), (("gate", "nowhere"), "nowhere"),
    (("report", "nowhere"), "nowhere"), (("score", "./nowhere"), "nowhere")])
def test_an_input_of_a_stage_that_is_missing(tmp_path, monkeypatch, command, word):
    monkeypatch.chdir(tmp_path)
    refused(bipdeploy_here(*command, "--out", tmp_path / "out"), 2, word)
    assert list(tmp_path.iterdir()) == []


def test_a_stage_s_folder_where_a_run_s_is_wanted(tmp_path, smoke):
    refused(bipdeploy_here("report", smoke.folder / "score", "--out", tmp_path / "out"), 2,
            "is not a run's folder")


def test_a_run_s_manifest_that_this_version_does_not_accept(tmp_path):
    (tmp_path / "manifest.json").write_text('{"recipe": {"name": "old", "model": {"id": "x"}}}')
    done = bipdeploy_here("report", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert message(done)[-1] == "  prune: required, and missing"


def test_a_ratio_of_a_stage_outside_0_to_1(tmp_path, smoke):
    done = bipdeploy("prune", "builtin:pico", smoke.folder / "score", "--ratio", "1.5", "--out",
                     tmp_path / "p")
    assert done.returncode == 2 and "prune.ratio: 1.5 is not accepted" in message(done)[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("override", "words"), [
    ("calibration.data=wikitext3", ["calibration.data", "'wikitext2'"]),
    ("evaluate.perplexity.data=missing.txt", ["evaluate.perplexity.data", "missing.txt"]),
    ("prune.ratio=0.99", ["prune.ratio", "at most"]),
    ("calibration.tokens=512", ["calibration.tokens", "256"])])
def test_check_refuses_what_a_run_would_refuse_before_its_first_stage(override, words):
    refused(bipdeploy_here("check", SMOKE, "--set", override), 2, "smoke.yaml", *words)


def test_damaged_scores_are_named(tmp_path):
    scores = tmp_path / "scores"
    scores.mkdir()
    (scores / "scores.safetensors").write_bytes(b"not a tensor")
    refused(bipdeploy_here("prune", "builtin:pico", scores, "--ratio", "0.3", "--out",
                           tmp_path / "out"), 2, "scores.safetensors", "damaged")


def test_nan_outside_the_blocks_is_named_too(tmp_path):
    model = tiny_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    few = ["--set", "calibration.samples=8"]
    refused(bipdeploy_here("score", model, "--out", tmp_path / "scores", *few), 2,
            "model.norm.weight", "NaN")
