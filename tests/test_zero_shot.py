"""Zero-shot accuracy: true numbers, the built-in task, tasks of one's own, faults, whole runs."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import statistics

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bipdeploy import api
from bipdeploy.cli import screens
from bipdeploy.data import pydocs, pydocs_choice
from bipdeploy.errors import InputError, RecipeError
from bipdeploy.measuring import tasks, zero_shot
from bipdeploy.pipeline.keys import stage_keys
from bipdeploy.planning.job import Job
from bipdeploy.planning.resolved import resolved_at
from bipdeploy.recipe import figures
from bipdeploy.recipe import file as recipe_file
from bipdeploy.recipe import tasks as task_names
from bipdeploy.recipe.evaluate import ZeroShotSection
from bipdeploy.running import artifacts
from bipdeploy.running.reporter import Silent
from bipdeploy.stages.table import STAGES
from tests.running import RECIPES, SMOKE, bipdeploy_here, python, refused
from tests.tiny import PICO

pytestmark = pytest.mark.slow

ON = "evaluate.zero_shot.enabled=true"
ALONE = [ON, "evaluate.perplexity.enabled=false"]
SPARE = """\
task: spare
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: answers
doc_to_target: !function helper.target
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ROWS = [{"question": "The opposite of true is", "answers": ["false", "green"], "right": "first"},
        {"question": "A list of", "answers": ["xyzzy qwfp", "values"], "right": "second"},
        {"question": "Return the", "answers": ["number", "zebra", "umbrella"], "right": "first"}]


@pytest.fixture
def own(tmp_path):
    """A folder that defines the task `spare`: YAML, a helper in Python, questions as JSON lines."""
    folder = tmp_path / "own"
    folder.mkdir()
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "spare.yaml").write_text(SPARE.replace("QUESTIONS", str(questions)))
    (folder / "helper.py").write_text(
        "def target(doc):\n    return ['first', 'second'].index(doc['right'])\n")
    return folder


@pytest.fixture(scope="module")
def measured(smoke, tmp_path_factory):
    """The built-in task on the built-in model and its pruned copy, 200 questions."""
    out = tmp_path_factory.mktemp("zero_shot") / "e"
    return api.evaluate("builtin:pico", smoke.folder / "export" / "transformers", out,
                        [*ALONE, "evaluate.zero_shot.limit=200", "evaluate.zero_shot.batch=16"])


class Counting(Silent):
    """A reporter that counts."""

    steps = done = 0

    def total(self, steps: int, what: str = "") -> None:
        self.steps = steps

    def advance(self, steps: int = 1) -> None:
        self.done += steps


def record(folder) -> dict:
    return artifacts.read_json(folder / "evaluate.json")["zero_shot"]


@torch.no_grad()
def best(folder, question: str, answers: list[str], between: str, *, by_length: bool) -> int:
    """The answer that a model finds likeliest, one forward pass each, with transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    context = len(tokenizer(question)["input_ids"])
    scores = []
    for answer in answers:
        ids = tokenizer(question + between + answer, return_tensors="pt")["input_ids"][0]
        likely = model(ids[None]).logits[0].double().log_softmax(-1)
        total = sum(float(likely[i - 1, ids[i]]) for i in range(context, len(ids)))
        scores.append(total / len(answer) if by_length else total)
    return scores.index(max(scores))


# The built-in task

def test_the_questions_are_of_the_test_split_alone():
    test, calibration = (" ".join("\n\n".join(pydocs.documents(split)).split())
                         for split in ("test", "calibration"))
    for question in pydocs_choice.questions():
        answer = question["choices"][question["answer"]]
        assert question["signature"] in test and all(c in test for c in question["choices"])
        assert f"{question['signature']} {answer}" not in calibration


def test_neither_length_nor_place_gives_the_answer_away():
    questions = pydocs_choice.questions()
    assert len(questions) == 500
    longest = shortest = 0
    for question in questions:
        lengths = [len(choice) for choice in question["choices"]]
        assert len(set(question["choices"])) == 4 and max(lengths) - min(lengths) <= 6
        longest += lengths.index(max(lengths)) == question["answer"]
        shortest += lengths.index(min(lengths)) == question["answer"]
    places = [q["answer"] for q in questions]
    shares = [longest / 500, shortest / 500, *(places.count(i) / 500 for i in range(4))]
    assert all(0.19 < share < 0.31 for share in shares), shares


def test_the_questions_are_the_same_in_another_process():
    code = ("import hashlib\nfrom bipdeploy.data.pydocs_choice import questions\n"
            "print(hashlib.sha256(repr(questions()).encode()).hexdigest())")
    assert len({python(code, env={"PYTHONHASHSEED": seed}).stdout for seed in "12"}) == 1


def test_the_built_in_model_is_clearly_above_chance_and_better_than_its_pruned_copy(measured):
    task = record(measured)["tasks"]["pydocs_choice"]
    assert task["documents"] == 200 and task["chance"] == 0.25
    assert task["metric"] == "acc_norm" and task["few_shot"] == 0
    low, high = task["dense"]["interval"]
    assert 0.35 < low < task["dense"]["value"] < high
    assert task["pruned"]["value"] < task["dense"]["value"]


# True numbers

def test_accuracy_equals_a_computation_with_transformers_alone(smoke, tmp_path):
    pruned = smoke.folder / "export" / "transformers"
    out = api.evaluate("builtin:pico", pruned, tmp_path / "e",
                       [*ALONE, "evaluate.zero_shot.limit=12", "evaluate.zero_shot.batch=5"])
    questions = pydocs_choice.questions()[:12]
    found = artifacts.figures([out])
    for which, folder in (("dense", PICO), ("pruned", pruned)):
        for metric, by_length in (("acc", False), ("acc_norm", True)):
            right = [best(folder, q["signature"], q["choices"], "\n", by_length=by_length)
                     == q["answer"] for q in questions]
            shown = record(out)["tasks"]["pydocs_choice"][which]
            assert shown[metric] == pytest.approx(sum(right) / 12)
        assert found[f"accuracy.pydocs_choice.{which}"] == shown["acc_norm"] == shown["value"]


def test_a_task_folder_of_one_s_own_works_offline(own, smoke, tmp_path):
    out = api.evaluate("builtin:pico", smoke.folder / "export" / "transformers", tmp_path / "e",
                       [*ALONE, f"evaluate.zero_shot.tasks=[{own}, 'builtin:pydocs_choice']",
                        "evaluate.zero_shot.limit=12"])
    found = artifacts.figures([out])
    right = [best(PICO, row["question"], row["answers"], " ", by_length=False)
             == ["first", "second"].index(row["right"]) for row in ROWS]
    assert found["accuracy.spare.dense"] == pytest.approx(sum(right) / 3)
    assert found["accuracy.spare.chance"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)
    assert record(out)["tasks"]["spare"]["metric"] == "acc"
    for which in ("dense", "pruned", "chance"):
        assert found[f"accuracy.{which}"] == pytest.approx(statistics.mean(
            found[f"accuracy.{name}.{which}"] for name in ("spare", "pydocs_choice")))


def test_the_dense_model_beside_itself_differs_in_nothing(tmp_path):
    out = api.evaluate("builtin:pico", PICO, tmp_path / "e",
                       [*ALONE, "evaluate.zero_shot.limit=15", "evaluate.zero_shot.few_shot=1"])
    task = record(out)["tasks"]["pydocs_choice"]
    assert task["dense"] == task["pruned"] and task["few_shot"] == 1
    assert task["difference"] == {"value": 0.0, "stderr": 0.0, "interval": [0.0, 0.0]}
    assert task["ratio"]["value"] == 1.0


def test_a_paired_difference_s_error_is_that_of_the_differences_by_document():
    dense, pruned = [1, 1, 1, 0, 0, 1, 1, 0], [1, 1, 0, 0, 0, 1, 1, 0]
    pairs = list(zip(map(float, dense), map(float, pruned), strict=True))
    found = zero_shot.paired([pairs])
    differences = [d - p for d, p in pairs]
    assert found["difference"]["value"] == pytest.approx(1 / 8)
    assert found["difference"]["stderr"] == pytest.approx(
        statistics.stdev(differences) / math.sqrt(8))
    assert found["difference"]["stderr"] < math.hypot(*(zero_shot.stderr(side)
                                                        for side in (dense, pruned)))
    assert found["ratio"]["value"] == pytest.approx(4 / 5)
    residual = [p - 0.8 * d for d, p in pairs]
    assert found["ratio"]["stderr"] == pytest.approx(
        statistics.stdev(residual) / math.sqrt(8) / (5 / 8))
    twice = zero_shot.paired([pairs, pairs])  # two independent tasks
    assert twice["difference"]["stderr"] == pytest.approx(
        found["difference"]["stderr"] / math.sqrt(2))


def test_the_interval_of_a_share_is_wilson_s():
    assert zero_shot.wilson(0.5, 100) == pytest.approx([0.40383, 0.59617], abs=1e-5)
    assert zero_shot.wilson(0.0, 10) == pytest.approx([0.0, 0.27754], abs=1e-5)
    assert zero_shot.wilson(1.0, 10) == pytest.approx([0.72246, 1.0], abs=1e-5)


def test_a_dense_accuracy_of_zero_has_no_ratio():
    answers = zero_shot.Answers({"acc": [0.0, 0.0]}, [0.5, 0.5], ["a", "b"])
    task = tasks.Task("t", PICO, "acc")
    found, _ = zero_shot.summarise({task: (answers, answers)})
    assert found == {f"accuracy{name}.{kind}": value for name in ("", ".t")
                     for kind, value in (("dense", 0), ("pruned", 0), ("chance", 0.5))}


# Names

def test_the_seven_tasks_of_the_paper_are_lm_eval_s_with_the_metric_that_papers_report():
    found = tasks.find(["llm_bip_7", "piqa"])
    assert {task.name: task.metric for task in found} == {
        "boolq": "acc", "piqa": "acc", "hellaswag": "acc_norm", "winogrande": "acc",
        "arc_easy": "acc", "arc_challenge": "acc_norm", "openbookqa": "acc_norm"}
    for task in found:
        settings = tasks._settings(task.file)
        assert settings["output_type"] == "multiple_choice"
        assert task.metric in {m["metric"] for m in settings["metric_list"]}


def test_the_seven_tasks_run_on_documents_of_their_form(monkeypatch):
    """Their data is on the hub; one document of each stands in for it."""
    four = {"text": ["ice", "steam", "sand", "wood"], "label": ["A", "B", "C", "D"]}
    documents = {
        "aps/super_glue": {"passage": "Snow is cold.", "question": "is snow cold", "label": 1},
        "baber/piqa": {"goal": "Cut wood.", "sol1": "Use a saw.", "sol2": "Use soup.", "label": 0},
        "Rowan/hellaswag": {"ctx_a": "A man sits.", "ctx_b": "he", "activity_label": "Sitting",
                            "endings": ["stands up.", "melts.", "is a list.", "returns."],
                            "label": "0"},
        "allenai/winogrande": {"sentence": "The cup fits the box as the _ is large.",
                               "option1": "box", "option2": "cup", "answer": "1"},
        "allenai/ai2_arc": {"question": "Cold water is", "choices": four, "answerKey": "A"},
        "allenai/openbookqa": {"question_stem": "Cold water is", "choices": four,
                               "answerKey": "A"}}

    def load_dataset(path, *_, **__):
        rows = datasets.Dataset.from_list([documents[path]])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    section = ZeroShotSection(tasks=["llm_bip_7"])
    wanted = tasks.find(section.tasks)
    loaded = zero_shot.load(wanted, section)
    model = AutoModelForCausalLM.from_pretrained(PICO, dtype=torch.float32)
    counted = Counting()
    job = Job(recipe_file.load(SMOKE), {}, PICO, counted)
    found = zero_shot.evaluate(model, PICO, loaded, section, job)
    zero_shot.evaluate(model, PICO, loaded, section, job, first=False)
    assert {name: round(1 / answers.chance[0]) for name, answers in found.items()} == {
        "boolq": 2, "piqa": 2, "hellaswag": 4, "winogrande": 2, "arc_easy": 4,
        "arc_challenge": 4, "openbookqa": 4}
    assert all(task.metric in found[task.name].scores for task in wanted)
    assert counted.steps == counted.done == 2 * 22


def test_a_gate_may_name_every_figure_of_every_task():
    recipe = recipe_file.load(SMOKE, [ON, "evaluate.zero_shot.tasks=[llm_bip_7]",
                                      "gates.accuracy.arc_easy.ratio.min=0.9",
                                      "gates.accuracy.ratio.min=0.9"])
    known = {name for name in figures.expected(recipe) if name.startswith("accuracy")}
    assert len(known) == 8 * 4


@pytest.mark.parametrize("path", [p for p in sorted(RECIPES.glob("*.yaml"))
                                  if ("7b" in p.stem or "13b" in p.stem)
                                  and "random" not in p.stem], ids=lambda p: p.stem)
def test_the_paper_models_are_measured_on_the_seven_tasks(path):
    section = recipe_file.load(path).evaluate.zero_shot
    assert section.enabled and section.tasks == ["llm_bip_7"] and section.limit is None
    assert "bipdeploy[eval]" in path.read_text(encoding="utf-8").partition("name:")[0]


# Faults

def faults(*overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipe_file.load(SMOKE, list(overrides))
    return caught.value.faults


@pytest.mark.parametrize(("task", "words"), [
    ("builtin:pydoc_choice", "did you mean 'builtin:pydocs_choice'?"),
    ("./no/such/folder", "there is no file or folder './no/such/folder'")])
def test_a_task_that_is_not_there_is_a_fault_of_the_recipe(task, words):
    (fault,) = faults(f"evaluate.zero_shot.tasks=['{task}']")
    assert fault.startswith("evaluate.zero_shot.tasks: ") and words in fault


def test_a_folder_without_tasks_is_a_fault_of_the_recipe(tmp_path):
    (fault,) = faults(f"evaluate.zero_shot.tasks=['{tmp_path}']")
    assert "defines no task" in fault


def test_a_gate_on_accuracy_needs_the_task():
    (fault,) = faults(ON, "gates.accuracy.piqa.ratio.min=1")
    assert "no enabled stage measures 'accuracy.piqa.ratio'" in fault


@pytest.mark.parametrize(("task", "words"), [
    ("hellaswg", "did you mean 'hellaswag'?"), ("gsm8k", "no multiple-choice task"),
    ("mmlu", "lm-eval has no task 'mmlu'")])
def test_a_task_that_lm_eval_cannot_run_is_refused_before_the_first_stage(tmp_path, task, words):
    done = bipdeploy_here("run", SMOKE, "--runs", tmp_path, "--set", ON, "--set",
                          f"evaluate.zero_shot.tasks=[{task}]")
    assert len(refused(done, 2, "evaluate.zero_shot.tasks", words)) < 400
    assert list(tmp_path.iterdir()) == []


def test_a_yaml_file_alone_names_its_task(own):
    (own / "other.yaml").write_text("task: other\ninclude: spare.yaml\n")
    found = tasks.find([str(own / "other.yaml")])
    assert [(task.name, task.metric) for task in found] == [("other", "acc")]
    assert task_names.names([str(own)]) == ["other", "spare"]


def test_two_tasks_of_one_name_are_refused(own, tmp_path):
    other = shutil.copytree(own, tmp_path / "other")
    with pytest.raises(InputError, match=r"'spare' is defined by .* keep one"):
        tasks.find([str(own), str(other)])


@pytest.mark.parametrize("library", tasks.LIBRARIES)
def test_without_lm_eval_a_run_is_refused_before_the_first_stage(tmp_path, monkeypatch, library):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *a: None if name == library else find(name, *a))
    for command in (["run", SMOKE, "--runs", tmp_path], ["check", SMOKE]):
        done = bipdeploy_here(*command, "--set", ON)
        refused(done, 2, library, "pip install 'bipdeploy[eval]'")
    assert list(tmp_path.iterdir()) == []


def test_data_that_cannot_be_had_is_one_line(own):
    (own / "questions.jsonl").unlink()
    with pytest.raises(InputError, match=r"spare could not be loaded: .*offline") as caught:
        zero_shot.load(tasks.find([str(own)]), ZeroShotSection())
    assert "\n" not in str(caught.value)


def test_a_change_of_one_s_own_task_reruns_the_evaluation(own):
    recipe = recipe_file.load(SMOKE, [ON, f"evaluate.zero_shot.tasks=[{own}]"])

    def keys() -> dict[str, str]:
        return stage_keys(resolved_at(recipe, PICO))

    before = keys()
    assert keys() == before
    (own / "questions.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    changed = {name for name, key in keys().items() if before[name] != key}
    assert changed == {"evaluate", "gate", "report"}


# A whole run

def test_a_run_reports_accuracy_and_judges_it(smoke, tmp_path, capfd):
    shutil.copytree(smoke.folder, tmp_path / "smoke")
    result = api.run(SMOKE, [ON, "evaluate.zero_shot.limit=20", "gates.accuracy.ratio.min=0.2",
                             "gates.accuracy.pydocs_choice.dense.min=0.99"], tmp_path)
    shown = capfd.readouterr()
    assert "it/s" not in shown.err and "lm_eval" not in shown.err and not shown.out
    assert result.ran == ["evaluate", "gate", "report"]
    recipe = recipe_file.load(SMOKE, [ON])
    assert set(result.figures) == figures.expected(recipe)
    assert [gate["figure"] for gate in result.failed_gates] == ["accuracy.pydocs_choice.dense"]
    ratio = result.figures["accuracy.ratio"]
    for name in ("report.md", "report.html"):
        page = (result.folder / "report" / name).read_text(encoding="utf-8")
        for words in ("Accuracy, pydocs_choice", f"{ratio:.2f}x", "acc_norm", "25.0%", "(95%)",
                      "the first 20 documents of each task", "lm-eval 0."):
            assert words in page, (name, words)
    screens.show_comparison({name: result.folder / name for name in STAGES})
    table = capfd.readouterr().out.splitlines()
    assert max(map(len, table)) <= 80
    assert any("Accuracy, pydocs_choice" in line and "(95%)" in line for line in table)


def test_a_run_without_it_says_so(smoke):
    assert record(smoke.folder / "evaluate") == {
        "not_run": "evaluate.zero_shot.enabled is false"}
    page = (smoke.folder / "report" / "report.md").read_text(encoding="utf-8")
    assert "Zero-shot accuracy: not run: evaluate.zero_shot.enabled is false" in page
