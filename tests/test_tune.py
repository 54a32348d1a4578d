"""Stage `tune` in whole runs and on plain paths: what it writes, refuses, and survives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from bipdeploy import api
from bipdeploy.data.text import Text
from bipdeploy.data.windows import tokenizer
from bipdeploy.errors import InputError, StageError
from bipdeploy.pipeline import pipeline
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.running import artifacts
from bipdeploy.running.reporter import Silent
from bipdeploy.serving import generation
from bipdeploy.stages.evaluate import check_overlap
from bipdeploy.stages.tune import read_windows
from bipdeploy.tuning import launch
from bipdeploy.tuning.data import IGNORED, Windows
from tests.chats import CHATML, CONVERSATIONS, with_template
from tests.running import ENVIRONMENT, SCRIPT, SMOKE, bipdeploy_here, leftovers, refused
from tests.sliced import loaded, logits, results, token_windows

# Training that is over in seconds. Every evaluation reads four windows.
SHORT = ["tune.enabled=true", "tune.steps=4", "tune.batch=4", "tune.accumulation=1",
         "tune.tokens=64", "tune.learning_rate=0.003", "tune.validation.windows=4",
         "tune.validation.every=2"]
PLAIN = [*SHORT, "model.device=cpu"]
FULL = ["tune.method=full", "tune.learning_rate=0.0005"]


@pytest.fixture
def again(smoke, tmp_path):
    """Run the smoke recipe anew over a copy of the finished run, with short training."""
    shutil.copytree(smoke.folder, tmp_path / "smoke")
    return lambda *overrides, **options: api.run(SMOKE, [*SHORT, *overrides], tmp_path, **options)


@pytest.fixture
def sliced(smoke) -> Path:
    return smoke.folder / "prune" / "model"


def hashes(folder: Path) -> dict[str, str]:
    return {n: h for n, h in artifacts.file_hashes(folder).items() if n.endswith(".safetensors")}


# Whole runs

def test_without_the_section_the_stage_says_so_and_nothing_else(smoke):
    assert artifacts.read_json(smoke.folder / "tune" / "tune.json") == {"enabled": False}
    assert {p.name for p in (smoke.folder / "tune").iterdir()} == {"tune.json", "manifest.json"}
    assert "LoRA" not in (smoke.folder / "report" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "refit", "bias"])
def test_a_run_trains_what_the_repair_left_and_exports_it(again, method):
    result = again(f"recover.method={method}", "gates.tune.loss.after.max=9", until="report")
    folder, figures = result.folder, result.figures
    assert figures["tune.loss.after"] < figures["tune.loss.before"]
    assert 0 <= figures["tune.merge.max_logit_difference"] < 1
    assert hashes(folder / "tune/model") == hashes(folder / "export/transformers")
    base = "prune" if method == "none" else "recover"
    assert hashes(folder / "tune/model") != hashes(folder / base / "model")
    record = artifacts.read_json(folder / "tune" / "tune.json")
    assert [entry["step"] for entry in record["history"]] == [0, 2, 4]
    assert (record["steps"], record["tokens"], record["stopped_early"]) == (4, 4 * 4 * 63, False)
    assert result.failed_gates == [] and leftovers(folder) == []
    assert not artifacts.checkpoint_folder(folder / "tune").exists()
    assert "LoRA: 4 steps" in (folder / "report" / "report.md").read_text()
    assert "LoRA: 4 steps" in (folder / "report" / "report.html").read_text()
    assert "adapters (rank 8)" in (folder / "export/transformers/README.md").read_text()
    assert again(f"recover.method={method}", "gates.tune.loss.after.max=9").ran == []


@pytest.mark.slow
def test_another_step_count_reruns_from_training_on(again):
    first = again(until="tune")
    assert first.ran == ["tune"]
    assert again("tune.steps=2", until="tune").ran == ["tune"]
    assert again("tune.steps=2", until="tune").ran == []
    assert api.run(SMOKE, [], first.folder.parent, until="tune").ran == ["tune"]
    assert not (first.folder / "tune" / "model").exists()


def test_a_gate_on_training_that_is_off_is_refused():
    done = bipdeploy_here("check", SMOKE, "--set", "gates.tune.loss.after.max=3")
    assert done.returncode == 2 and "no enabled stage measures 'tune.loss.after'" in done.stderr


def test_a_model_that_an_earlier_version_trained_is_not_passed_over(tmp_path):
    artifacts.write_json(tmp_path / artifacts.MANIFEST, {"recipe": {}})
    for stage in ("recover", "lora"):
        (tmp_path / stage / "model").mkdir(parents=True)
    with pytest.raises(InputError, match="whose stage lora is tune now; run its recipe again"):
        generation.artefact(str(tmp_path))
    (tmp_path / "tune").mkdir()
    assert generation.artefact(str(tmp_path)) == tmp_path / "recover/model"


# On plain paths

def test_instructions_are_trained_on_and_the_adapter_is_kept(tmp_path, sliced):
    rows = [{"instruction": f"Add {n} and {n + 1}.", "input": "" if n % 2 else "as a number",
             "output": str(2 * n + 1)} for n in range(30)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    out = api.tune("builtin:pico", sliced, tmp_path / "out", [
        *PLAIN, f"tune.data={file}", "tune.format=alpaca", "tune.packing=false",
        "tune.tokens=128", "tune.steps=2", "tune.keep_adapter=true",
        "tune.distillation.weight=0.5"])
    record = artifacts.read_json(out / "tune.json")
    assert record["data"]["windows"] == [30, 128] and record["data"]["format"] == "alpaca"
    assert record["tokens"] < 2 * 4 * 12  # a response is some digits and the end
    ids = token_windows(2, 24)
    kept = PeftModel.from_pretrained(loaded(sliced), out / "adapter").eval()
    # The built-in model's weights are bfloat16, so the merged ones were rounded.
    assert (logits(kept, ids) - logits(loaded(out / "model"), ids)).abs().max() < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("loss_on", "packing"), [("response", "true"), ("all", "false")])
def test_conversations_are_trained_on(tmp_path, sliced, loss_on, packing):
    dense = with_template(tmp_path / "dense", CHATML, model=True)
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in CONVERSATIONS * 30))
    out = api.tune(str(dense), sliced, tmp_path / "out", [
        *PLAIN, f"tune.data={file}", "tune.field=messages", f"tune.loss_on={loss_on}",
        f"tune.packing={packing}", "tune.steps=2"])
    record = artifacts.read_json(out / "tune.json")
    assert record["data"]["format"] == "conversations"
    assert (record["data"]["documents"], record["data"]["documents_lost"]) == (60, 0)
    assert record["data"]["tokenised"]["way"] == "all of the text"
    assert 0 < record["tokens"] <= 2 * 4 * 63
    assert (record["tokens"] == 2 * 4 * 63) == (loss_on == "all")


def test_only_the_answers_of_a_conversation_count(tmp_path):
    dense = with_template(tmp_path / "dense", CHATML)
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in CONVERSATIONS * 9))
    section = {"enabled": True, "data": str(file), "field": "messages", "packing": False,
               "tokens": 256, "batch": 4, "accumulation": 1, "validation": {"windows": 4}}
    tokens = tokenizer(dense)

    def read(**settings: object) -> tuple[Windows, list[str]]:
        recipe = Recipe.model_validate({
            "name": "x", "model": {"id": str(dense)}, "prune": {"ratio": 0.3},
            "tune": {**section, **settings}})
        windows, _ = read_windows(recipe, dense)
        return windows, [tokens.decode(labels[labels != IGNORED]) for labels in windows.labels]

    windows, counted = read()
    assert counted[:2] == ["A sequence that can be changed.<|im_end|>\n",
                           "Seven.<|im_end|>\nNine, which is three times three.<|im_end|>\n"]
    written = [tokens.apply_chat_template(row, tokenize=False) for row in CONVERSATIONS]
    assert [tokens.decode(ids[:len(tokens(text).input_ids)])
            for ids, text in zip(windows.ids, written, strict=False)] == written
    assert read(loss_on="all")[1][:2] == written


@pytest.mark.parametrize(("packing", "words"), [
    ("false", ["gives 2 windows", "38 of 40 documents (95%)",
               "raise tune.tokens (the longest prompt has", "or set tune.packing: true"]),
    ("true", ["gives 39 windows", "71% of all windows hold prompts alone", "1 of 40 documents (2%)",
              "raise tune.tokens, so that windows reach the responses, and give more rows"])])
def test_prompts_that_fill_the_window_ask_for_a_larger_one(tmp_path, sliced, packing, words):
    rows = [{"instruction": "Add one. " * (2 if n < 2 else 60), "input": "", "output": str(n)}
            for n in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    arguments = [part for s in [*PLAIN, f"tune.data={file}", "tune.format=alpaca",
                                f"tune.packing={packing}", "tune.batch=40"]
                 for part in ("--set", s)]
    done = bipdeploy_here("tune", "builtin:pico", sliced, "--out", tmp_path / "out", *arguments)
    assert "lower tune.tokens" not in refused(done, 2, "tune.data", "4 + 40", *words)


@pytest.mark.slow
def test_documents_that_are_not_trained_on_are_said(tmp_path, sliced):
    rows = [{"instruction": "Add one. " * (2 if n < 20 else 60), "input": "", "output": str(n)}
            for n in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    reporter = Silent()
    out = api.tune("builtin:pico", sliced, tmp_path / "out", [
        *PLAIN, f"tune.data={file}", "tune.format=alpaca", "tune.packing=false", "tune.steps=1"],
        reporter)
    assert artifacts.read_json(out / "tune.json")["data"]["documents_lost"] == 20
    assert any("20 of 40 documents (50%)" in note and "raise tune.tokens" in note
               for note in reporter.notes)


@pytest.mark.parametrize(("settings", "words"), [
    (["tune.target_modules=[q_porj]"], ["tune.target_modules", "'q_porj'", "'q_proj'"]),
    (["tune.batch=6", "tune.accumulation=4"], ["batch 6", "does not divide", "4 x 1"]),
    (["tune.batch=4", "tune.processes=3"], ["batch 4", "does not divide", "1 x 3"]),
    (["tune.distillation.weight=1.5"], ["tune.distillation.weight", "1.5"]),
    (["tune.distillation.hidden=-1"], ["tune.distillation.hidden", "-1"]),
    (["tune.method=fulll"], ["tune.method", "fulll", "'lora' or 'full'"]),
    (["tune.method=full", "tune.keep_adapter=true"], ["keep_adapter: true", "method: lora"]),
    (["tune.schedule=step"], ["tune.schedule", "step"])])
def test_a_section_that_cannot_be_is_refused_when_it_is_read(settings, words):
    arguments = [part for s in [*PLAIN, *settings] for part in ("--set", s)]
    done = bipdeploy_here("check", SMOKE, *arguments)
    assert done.returncode == 2
    assert all(word in done.stderr for word in words), done.stderr


def test_windows_beyond_the_model_s_maximum_are_refused_before_the_first_stage():
    arguments = [part for s in [*SHORT, "tune.tokens=512"] for part in ("--set", s)]
    refused(bipdeploy_here("check", SMOKE, *arguments), 2, "tune.tokens", "512", "256")


def test_instructions_from_running_text_are_refused_before_the_first_stage():
    arguments = [part for s in [*SHORT, "tune.format=alpaca"] for part in ("--set", s)]
    refused(bipdeploy_here("check", SMOKE, *arguments), 2, "tune.data", "no columns")


@pytest.mark.parametrize(("content", "settings", "words"), [
    ("A few words.", ["tune.data=T.txt"], ["tune.data", "0 windows", "4 + 4"]),
    ("A few words. " * 100, ["tune.data=T.txt", "tune.packing=false"], ["1 windows", "4 + 4"]),
    ("Words", ["tune.data=T.txt", "tune.format=alpaca"], ["no columns", "instruction"]),
    ('{"instruction": "a", "output": "b"}', ["tune.data=T.jsonl", "tune.format=alpaca"],
     ["no column 'input'", "instruction, output"]),
    ('{"output": "b"}', ["tune.data=T.jsonl"], ["no column 'text'"]),
    ('{"instruction": "a", "input": 7, "output": "b"}',
     ["tune.data=T.jsonl", "tune.format=alpaca"], ["tune.data", "column 'input'", "int"]),
    ('{"messages": [{"role": "user", "content": "a"}]}',
     ["tune.data=T.jsonl"], ["tune.field", "set tune.field: messages"]),
    ('{"messages": [{"role": "user", "content": "a"}]}', ["tune.data=T.jsonl",
     "tune.format=alpaca"], ["set tune.format: text and tune.field: messages"]),
    ('{"messages": [{"role": "user", "content": "a"}]}', ["tune.data=T.jsonl",
     "tune.field=messages"], ["no chat template"]),
    ("", ["tune.data=T.jsonl", "tune.format=alpaca"], ["is empty"]),
    ("\n", ["tune.data=T.jsonl", "tune.format=alpaca"], ["T.jsonl"]),
    ("Words " * 2000, ["tune.data=T.txt", "tune.tokens=300"], ["tune.tokens", "256"])])
def test_a_text_that_cannot_be_trained_on(tmp_path, monkeypatch, sliced, content, settings, words):
    monkeypatch.chdir(tmp_path)
    file = Path(settings[0].partition("=")[2])
    file.write_text(content)
    arguments = [part for s in [*PLAIN, *settings] for part in ("--set", s)]
    done = bipdeploy_here("tune", "builtin:pico", sliced, "--out", "out", *arguments)
    refused(done, 2, *words)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_a_text_that_cannot_be_trained_on_is_refused_before_the_first_stage(tmp_path):
    arguments = [part for s in [*SHORT, "tune.tokens=256", "tune.validation.windows=9999999"]
                 for part in ("--set", s)]
    refused(bipdeploy_here("run", SMOKE, "--runs", tmp_path, *arguments), 2, "tune.data",
            "9999999 + 4")
    assert list((tmp_path / "smoke").iterdir()) == []


def test_being_started_once_for_every_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(bipdeploy_here("run", SMOKE, "--runs", tmp_path), 2, "WORLD_SIZE is 2",
            "tune.processes")
    assert list(tmp_path.iterdir()) == []


def test_more_processes_than_gpus_are_refused():
    count = torch.cuda.device_count()
    with pytest.raises(InputError, match=f"tune.processes: {count + 1} were asked for"):
        launch.require_devices(count + 1, torch.device("cuda"))
    launch.require_devices(count + 1, torch.device("cpu"))


# Kills and processes

@pytest.mark.slow
@pytest.mark.parametrize("how", [["tune.dropout=0.1"], FULL])
def test_a_run_that_was_killed_while_training_goes_on_to_the_same_weights(tmp_path, sliced, how):
    settings = [*PLAIN, "tune.steps=24", "tune.checkpoint_every=2", *how]
    whole = api.tune("builtin:pico", sliced, tmp_path / "whole", settings)
    out = tmp_path / "killed"
    state = artifacts.checkpoint_folder(out) / "state.json"
    arguments = [part for s in settings for part in ("--set", s)]
    with subprocess.Popen([SCRIPT, "tune", "builtin:pico", sliced, "--out", out, *arguments],
                          env={**os.environ, **ENVIRONMENT}, stderr=subprocess.DEVNULL) as process:
        while not state.is_file():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    step = artifacts.read_json(state)["step"]
    assert 0 < step < 24 and not out.exists()

    reporter = Silent()
    api.tune("builtin:pico", sliced, out, settings, reporter)
    assert reporter.notes == [f"goes on from step {step} of a run that was interrupted"]
    assert hashes(out / "model") == hashes(whole / "model")
    assert artifacts.read_json(out / "figures.json") == artifacts.read_json(whole / "figures.json")
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "killed"}


@pytest.mark.slow
def test_a_checkpoint_of_another_recipe_is_not_used(tmp_path, sliced):
    folder = artifacts.checkpoint_folder(tmp_path / "out")
    folder.mkdir()
    (folder / "state.json").write_text('{"identity": "another", "tensors": "none"}')
    reporter = Silent()
    out = api.tune("builtin:pico", sliced, tmp_path / "out", PLAIN, reporter)
    assert reporter.notes == ["the checkpoint of an earlier run is not used: it is of another "
                              "recipe, model, text or version"]
    assert artifacts.read_json(out / "tune.json")["steps"] == 4 and not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], FULL])
def test_two_processes_train_what_one_does(tmp_path, sliced, how):
    # An odd number of windows to judge by: one process has a window less.
    settings = [*PLAIN, *how, "tune.validation.windows=5"]
    one = api.tune("builtin:pico", sliced, tmp_path / "one", settings)
    two = api.tune("builtin:pico", sliced, tmp_path / "two", [*settings, "tune.processes=2"])
    before, first, second = (
        torch.cat([p.flatten() for p in loaded(folder).parameters()])
        for folder in (sliced, one / "model", two / "model"))
    # Sums in another order, rounded to bfloat16 where they are merged.
    assert (second - first).norm() < 0.05 * (first - before).norm()
    records = [artifacts.read_json(folder / "tune.json") for folder in (one, two)]
    for a, b in zip(records[0]["history"], records[1]["history"], strict=True):
        assert a["step"] == b["step"] and b["loss"] == pytest.approx(a["loss"], abs=1e-4)
    assert records[1]["tokens"] == records[0]["tokens"]
    assert results(two).keys() == results(one).keys()


@pytest.mark.slow
def test_an_interrupted_training_leaves_no_process_behind(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text("import os, time\n"
                      f"print('{launch.MARK}' + '{{\"call\": \"note\", \"arguments\": [\"%d\"]}}'"
                      " % os.getpid(), flush=True)\n"
                      "time.sleep(300)\n")
    started = []

    class Interrupted(Silent):
        def note(self, text: str) -> None:
            started.append(int(text))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch._run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                     "--nproc-per-node=1", str(worker)], tmp_path / "log", Interrupted())
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


@pytest.mark.slow
def test_a_process_that_runs_out_of_memory_gives_the_advice_of_the_stage(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text("import torch\nraise torch.OutOfMemoryError('CUDA out of memory.')\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node=1", str(worker)]
    with (pytest.raises(StageError, match=r"^stage tune ran out of memory; raise tune\."),
          pipeline.finishing("tune")):
        launch._run(command, tmp_path / "log", Silent())


@pytest.mark.slow
def test_what_a_process_raises_is_raised_here(tmp_path, sliced):
    with pytest.raises(InputError, match=r"tune\.target_modules"):
        api.tune("builtin:pico", no_attention(sliced, tmp_path / "model"), tmp_path / "out",
                 [*PLAIN, "tune.processes=2", "tune.target_modules=[q_proj]"])


def no_attention(source: Path, folder: Path) -> Path:
    """A model whose attentions were all dropped."""
    from tests.sliced import architecture_of, draw_kept, write_sliced

    arch = architecture_of(source)
    return write_sliced(source, folder, draw_kept(
        arch, [(0, widths.intermediate) for widths in arch.blocks]))


def test_training_on_the_test_text_is_said(tiny, tmp_path):
    text = tmp_path / "all.txt"
    text.write_text("a text of some words that is trained on and then tested on. " * 200)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "", "input": "", "output": text.read_text()}))
    for data, form in ((text, "text"), (rows, "alpaca")):
        recipe = Recipe.model_validate({
            "name": "x", "model": {"id": str(tiny)}, "prune": {"ratio": 0.3},
            "tune": {"enabled": True, "data": str(data), "format": form},
            "evaluate": {"perplexity": {"data": str(text)}}})
        found = check_overlap(recipe, Text(str(text), "test", (text.read_text(),)))
        assert found["tune"] > 0.99 and found["calibration"] < 0.01
