"""Nothing is lost and nothing is mixed: where stages write, one at a time, on any file system."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bipdeploy import api
from bipdeploy.errors import StageError
from bipdeploy.model import sources
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.model.folder import copy_checkpoint
from bipdeploy.running import artifacts, places
from bipdeploy.stages.table import STAGES
from tests.running import ENVIRONMENT, SCRIPT, SMOKE, bipdeploy, bipdeploy_here, refused
from tests.tiny import PICO


@pytest.fixture
def model(tmp_path) -> Path:
    return shutil.copytree(PICO, tmp_path / "models" / "pico")


@pytest.fixture
def few(tmp_path) -> list[str]:
    """Options that score in no time."""
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"The value of item {n} is not a list." for n in range(400)))
    return [word for setting in (f"calibration.data={text}", "calibration.samples=2",
                                 "calibration.tokens=32", "score.criterion=magnitude")
            for word in ("--set", setting)]


def tree(folder: Path) -> dict[str, str]:
    return artifacts.file_hashes(folder)


# Never an input, what holds one, or where somebody lives

@pytest.mark.parametrize(("out", "word"), [
    (".", "is"), ("..", "holds"), ("scores", "lies in"), ("../pico", "is")])
def test_a_stage_never_writes_over_into_or_around_what_it_reads(model, few, out, word):
    before = tree(model.parent)
    done = bipdeploy_here("score", model, "--out", model / out, "--force", *few)
    refused(done, 2, "--out", word, str(model), "which is read")
    assert tree(model.parent) == before


def test_a_run_never_writes_over_what_it_reads(tmp_path, model):
    inside = shutil.copytree(model, tmp_path / "runs" / "smoke" / "prune" / "model")
    before = tree(tmp_path / "runs")
    done = bipdeploy_here("run", SMOKE, "--runs", tmp_path / "runs", "--set", f"model.id={inside}")
    refused(done, 2, "--runs", "holds", str(inside))
    assert tree(tmp_path / "runs") == before


def test_a_calibration_text_is_an_input_too(tmp_path, few):
    (tmp_path / "out").mkdir()
    text = (tmp_path / "words.txt").rename(tmp_path / "out" / "words.txt")
    options = [option.replace("/words.txt", "/out/words.txt") for option in few]
    refused(bipdeploy_here("score", "builtin:pico", "--out", tmp_path / "out", "--force", *options),
            2, "holds", "words.txt")
    assert text.is_file()


@pytest.mark.parametrize("out", [".", "..", "~"])
def test_a_home_and_the_folder_one_stands_in_are_never_replaced(tmp_path, few, out):
    home = tmp_path / "home"
    (home / "work").mkdir(parents=True)
    (home / "work" / "thesis.tex").write_text("years")
    where = Path(out).expanduser() if out != "~" else home
    refused(bipdeploy("score", "builtin:pico", "--out", where, "--force", *few,
                      cwd=home / "work", env={"HOME": str(home)}), 2, "--out",
            "give another folder")
    assert (home / "work" / "thesis.tex").read_text() == "years"


# Only what is new, empty, or was written by the same stage

def test_nobody_s_home_is_no_error(tmp_path, monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    assert places.require_place(tmp_path / "out", "score", []) is None


def test_an_empty_folder_and_an_earlier_result_are_written_to(tmp_path, few):
    out = tmp_path / "out"
    out.mkdir()
    for _ in range(2):
        assert bipdeploy_here("score", "builtin:pico", "--out", out, *few).returncode == 0
        assert (out / "scores.json").is_file()
    assert not any(p.name.startswith(".") for p in tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["own files", "another stage", "a file added", "a file"])
def test_what_bipdeploy_did_not_write_stays(tmp_path, smoke, few, kind):
    out = tmp_path / "out"
    if kind == "own files":
        out.mkdir()
        (out / "notes.md").write_text("mine")
    elif kind == "a file":
        out.write_text("mine")
    else:
        shutil.copytree(smoke.folder / ("prune" if kind == "another stage" else "score"), out)
    if kind == "a file added":
        (out / "notes.md").write_text("mine")
    before = out.read_text() if out.is_file() else tree(out)
    said = refused(bipdeploy_here("score", "builtin:pico", "--out", out, *few), 2, str(out),
                   "another folder with --out")
    word = {"own files": "notes.md", "another stage": "the stage prune", "a file added": "notes.md",
            "a file": "it is a file"}[kind]
    assert word in said and ("--force" in said) == (kind != "a file")
    assert (out.read_text() if out.is_file() else tree(out)) == before


def test_force_says_what_it_removes(tmp_path, few):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.md").write_text("mine")
    done = bipdeploy("score", "builtin:pico", "--out", out, "--force", *few)
    assert done.returncode == 0, done.stderr
    assert f"--force removes {out}: 1 files and folders, 4 bytes" in done.stderr.replace("\n", "")
    assert not (out / "notes.md").exists() and (out / "scores.json").is_file()


def test_what_file_managers_and_python_leave_does_not_count(tmp_path, smoke):
    out = shutil.copytree(smoke.folder / "score", tmp_path / "out")
    (out / ".DS_Store").write_text("x")
    (out / ".cache").mkdir()
    (out / ".cache" / "x").write_text("x")
    (out / "__pycache__").mkdir()
    (out / "__pycache__" / "x.pyc").write_text("x")
    assert places.require_place(out, "score", []) is None


def test_a_run_keeps_folders_and_manifests_that_no_run_wrote(tmp_path):
    for name in ("export/thesis.tex", "manifest.json"):
        runs = tmp_path / name.replace("/", "-")
        mine = runs / "smoke" / name
        mine.parent.mkdir(parents=True)
        mine.write_text('{"short_name": "my web app"}')
        refused(bipdeploy_here("run", SMOKE, "--runs", runs, "--force"), 2, str(mine.parent),
                "--runs")
        assert [p for p in (runs / "smoke").rglob("*") if p.is_file()] == [mine]


# One at a time

HOLD = ("import sys, time\nfrom pathlib import Path\nfrom bipdeploy.running import places\n"
        "Path(sys.argv[1]).mkdir(parents=True)\n"
        "with places.alone(Path(sys.argv[1]), inside=True):\n"
        "    print('held', flush=True)\n    time.sleep(600)")


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of the smoke run's folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "runs" / "smoke")],
                               stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT})
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_second_run_names_the_process_that_writes(tmp_path, holder):
    done = bipdeploy_here("run", SMOKE, "--runs", tmp_path / "runs")
    refused(done, 2, "is being written by", f"process {holder.pid}", "--runs")
    assert [p.name for p in (tmp_path / "runs" / "smoke").iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_single_stage_waits_for_no_run_either(tmp_path, smoke, holder, few):
    shutil.copyfile(smoke.folder / "manifest.json", tmp_path / "runs" / "smoke" / "manifest.json")
    done = bipdeploy_here("score", "builtin:pico", "--out", tmp_path / "runs" / "smoke" / "score",
                          *few)
    refused(done, 2, "is being written by", f"process {holder.pid}")


@pytest.mark.slow
def test_the_lock_of_a_process_that_died_is_taken_over(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    done = bipdeploy_here("run", SMOKE, "--runs", tmp_path / "runs", "--until", "score")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_of_two_runs_at_once_one_is_whole_and_the_other_is_refused(tmp_path):
    ratios = ("0.3", "0.5")
    started = []
    for ratio in ratios:
        started.append(subprocess.Popen(
            [SCRIPT, "run", str(SMOKE), "--runs", str(tmp_path / "runs"), "--json", "--set",
             f"prune.ratio={ratio}", "--set", "gates={}"], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, **ENVIRONMENT}))
        while not (tmp_path / "runs" / "smoke" / ".lock").exists():
            assert started[0].poll() is None
            time.sleep(0.05)
    said = [process.communicate(timeout=280) for process in started]
    codes = [process.returncode for process in started]
    assert sorted(codes) == [0, 2], said
    won = codes.index(0)
    assert f"process {started[won].pid}" in said[1 - won][1]
    figures = json.loads(said[won][0])["figures"]
    assert figures["block_parameters.ratio"] == pytest.approx(1 - float(ratios[won]), abs=0.02)


# Figures are those of the run that shows them

def test_figures_of_a_stage_that_was_replaced_are_refused(tmp_path, smoke):
    runs = shutil.copytree(smoke.folder.parent, tmp_path / "runs")
    result = api.run(SMOKE, runs=runs)
    assert result.figures == smoke.figures
    api.run(SMOKE, ["prune.ratio=0.5", "gates={}"], runs=runs, until="prune")
    with pytest.raises(StageError, match=r"prune was replaced meanwhile"):
        _ = result.figures
    with pytest.raises(StageError, match=r"replaced meanwhile"):
        _ = result.folders


def test_gates_say_whose_figures_they_judged(smoke):
    gates = artifacts.read_json(smoke.folder / "gate" / "gates.json")
    for name in STAGES["gate"].needs:
        manifest = artifacts.read_json(smoke.folder / name / "manifest.json")
        assert gates["keys"][name] == manifest["key"]


def test_a_stage_whose_inputs_change_while_it_runs_is_not_kept(tmp_path, smoke, monkeypatch):
    runs = shutil.copytree(smoke.folder.parent, tmp_path / "runs")

    def meanwhile(job):
        path = job.inputs["evaluate"] / "manifest.json"
        artifacts.write_json(path, {**artifacts.read_json(path), "key": "other"})

    monkeypatch.setattr(type(STAGES["gate"]), "load", lambda _: meanwhile)
    with pytest.raises(StageError, match="evaluate was replaced meanwhile"):
        api.run(SMOKE, runs=runs, start="gate", until="gate")
    assert (runs / "smoke" / "gate" / "gates.json").read_bytes() == (
        smoke.folder / "gate" / "gates.json").read_bytes()


# Any file system

def written(final: Path, text: str) -> None:
    with artifacts.writing(final) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a").write_text(text)


@pytest.fixture
def overlay(tmp_path):
    """A mounted overlay whose lower layer, as that of a container image, holds `stage/sub/a`."""
    for name in ("low", "up", "work", "whole"):
        (tmp_path / name).mkdir()
    written(tmp_path / "low" / "stage", "first")
    options = ",".join(f"{key}dir={tmp_path / name}"
                       for key, name in (("lower", "low"), ("upper", "up"), ("work", "work")))
    try:
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, tmp_path / "whole"],
                       check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting an overlay is not allowed here: {error}")
    yield tmp_path / "whole"
    subprocess.run(["umount", tmp_path / "whole"], check=True)


def test_a_stage_in_a_lower_image_layer_is_replaced(overlay):
    written(overlay / "stage", "second")
    assert (overlay / "stage" / "sub" / "a").read_text() == "second"
    assert [p.name for p in overlay.iterdir()] == ["stage"]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EBUSY])
def test_a_folder_that_cannot_be_renamed_gets_new_contents(tmp_path, monkeypatch, code):
    final = tmp_path / "stage"
    written(final, "first")
    (final / "gone").write_text("x")
    original = Path.rename

    def rename(self, target):
        if self == final:
            raise OSError(code, os.strerror(code))
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    written(final, "second")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == [
        "stage", "stage/sub", "stage/sub/a"]
    assert (final / "sub" / "a").read_text() == "second"


def test_new_contents_that_do_not_arrive_leave_the_old_ones(tmp_path, monkeypatch):
    final = tmp_path / "stage"
    written(final, "first")
    original, moved = shutil.move, []

    def rename(self, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def move(source, target):
        moved.append(source)
        if len(moved) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(source, target)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(shutil, "move", move)
    with pytest.raises(StageError, match="the disk is full"):
        written(final, "second")
    assert (final / "sub" / "a").read_text() == "first"


def test_a_stop_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    final = tmp_path / "stage"
    written(final, "first")
    original = Path.rename

    def rename(self, target):
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return original(self, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", rename)
        written(final, "second")
    assert (final / "sub" / "a").read_text() == "first"
    final.rename(tmp_path / ".stage.old")  # where the process was killed there
    with pytest.raises(ZeroDivisionError), artifacts.writing(final):
        raise ZeroDivisionError
    assert (final / "sub" / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [final]


def test_a_kill_while_contents_are_exchanged_loses_nothing(tmp_path, monkeypatch):
    final = tmp_path / "stage"
    written(final, "first")
    shutil.copytree(final, tmp_path / ".stage.old")  # what such a kill leaves
    (tmp_path / ".stage.filling").touch()
    shutil.rmtree(final / "sub")
    (final / "new").write_text("half")
    with pytest.raises(ZeroDivisionError), artifacts.writing(final):
        raise ZeroDivisionError
    assert tree(final) and (final / "sub" / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [final]


def test_a_link_to_a_folder_is_replaced_and_the_folder_stays(tmp_path):
    written(tmp_path / "elsewhere", "first")
    (tmp_path / "stage").symlink_to(tmp_path / "elsewhere")
    written(tmp_path / "stage", "second")
    assert (tmp_path / "stage" / "sub" / "a").read_text() == "second"
    assert (tmp_path / "elsewhere" / "sub" / "a").read_text() == "first"
    assert not (tmp_path / ".stage.old").is_symlink()


@pytest.fixture
def snapshot(tmp_path) -> Path:
    """The built-in model as the hub's cache holds models: links to blobs."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(PICO.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_an_export_of_a_hub_s_cache_holds_files_and_no_links(tmp_path, snapshot):
    copy_checkpoint(Checkpoint(snapshot), tmp_path / "out")
    shutil.rmtree(tmp_path / "hub")
    assert tree(tmp_path / "out") == tree(PICO)
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    Checkpoint(tmp_path / "out").verify()


# What is read or copied is hashed

@pytest.mark.parametrize("name", [
    "chat_template.jinja", "tokenizer.model", "merges.txt", "modeling_own.py", "tekken.json",
    "LICENSE", "additional_chat_templates/tools.jinja"])
def test_a_changed_companion_is_seen(model, name):
    path = model / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("first")
    before = sources.fingerprint(model)
    path.write_text("other")
    assert sources.fingerprint(model) != before


@pytest.mark.parametrize("name", ["pytorch_model.bin", ".cache/x.json", "original/params.json",
                                  "model.gguf", "__pycache__/x.pyc", "notes.md",
                                  "checkpoint-10/model.safetensors", "runs/events.log"])
def test_what_nobody_reads_reruns_nothing(model, name):
    before = sources.fingerprint(model)
    path = model / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("first")
    assert sources.fingerprint(model) == before


@pytest.mark.slow
def test_a_corrected_chat_template_is_exported(tmp_path, model):
    template = model / "chat_template.jinja"
    template.write_text("wrong")
    settings = [f"model.id={model}", "bench.torch.enabled=false", "gates={}",
                "evaluate.perplexity.enabled=false"]
    first = api.run(SMOKE, settings, runs=tmp_path / "runs", until="export")
    template.write_text("right")
    second = api.run(SMOKE, settings, runs=tmp_path / "runs", until="export")
    assert first.ran == second.ran and second.reused == []
    assert (second.folder / "export/transformers/chat_template.jinja").read_text() == "right"


@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_comparisons_and_sweeps_are_not_written_into_what_they_read(model, command):
    before = tree(model)
    done = bipdeploy_here(command, SMOKE, "--out", model / "out", "--ratios", "0.2,0.3", "--set",
                          f"model.id={model}")
    refused(done, 2, "--out", "lies in", str(model), "which is read")
    assert tree(model) == before
