"""Several texts at once: perplexity on further texts, by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bipdeploy import api
from bipdeploy.comparing import cells
from bipdeploy.errors import InputError, RecipeError
from bipdeploy.measuring.perplexity import Perplexity
from bipdeploy.pipeline.preflight import check_texts
from bipdeploy.planning import footprint
from bipdeploy.planning.resolved import resolved_at
from bipdeploy.recipe import file as recipe_file
from bipdeploy.recipe.figures import expected
from bipdeploy.reporting import summary
from bipdeploy.running import artifacts
from bipdeploy.stages import evaluate
from tests.running import SMOKE, bipdeploy_here, refused
from tests.tiny import PICO

WORDS = " ".join(f"word {n * 7919 % 1009} of a list" for n in range(400))


def texts_of(**texts: dict) -> str:
    return f"evaluate.perplexity.texts={json.dumps(texts)}"


@pytest.fixture
def words(tmp_path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(WORDS)
    return path


# Perplexity on further texts

@pytest.fixture(scope="module")
def measured(smoke, tmp_path_factory):
    """The smoke run with two further texts: one of its own, and the calibration text."""
    folder = tmp_path_factory.mktemp("further")
    (folder / "words.txt").write_text(WORDS)
    shutil.copytree(smoke.folder, folder / "smoke")
    settings = [texts_of(words={"data": str(folder / "words.txt")},
                         seen={"data": "builtin:pydocs", "split": "calibration"}),
                "evaluate.perplexity.windows=[128, 64]", "gates.perplexity.words.ratio.max=50",
                "gates.perplexity.seen.64.pruned.max=1"]
    return settings, api.run(SMOKE, settings, folder)


def test_every_text_has_figures_of_its_own_and_the_first_those_of_before(measured, smoke):
    settings, result = measured
    assert set(result.figures) == expected(recipe_file.load(SMOKE, settings))
    for name in ("perplexity.dense", "perplexity.128.pruned", "bits_per_byte.ratio"):
        assert result.figures[name] == pytest.approx(smoke.figures[name], rel=1e-6)
    values = {result.figures[f"perplexity{text}.dense"] for text in ("", ".words", ".seen")}
    assert len(values) == 3
    assert result.figures["perplexity.words.dense"] == result.figures["perplexity.words.128.dense"]
    assert result.figures["perplexity.words.64.dense"] != result.figures["perplexity.words.dense"]


def test_a_further_text_is_what_the_same_text_is_alone(measured):
    settings, result = measured
    data = json.loads(settings[0].partition("=")[2])["words"]["data"]
    alone = api.evaluate("builtin:pico", result.folder / "export" / "transformers",
                         result.folder.parent / "alone",
                         [f"evaluate.perplexity.data={data}", "evaluate.perplexity.windows=[64]"])
    figures = artifacts.figures([alone])
    for kind in ("dense", "pruned", "ratio"):
        for base in ("perplexity", "bits_per_byte"):
            assert result.figures[f"{base}.words.64.{kind}"] == pytest.approx(
                figures[f"{base}.{kind}"], rel=1e-6)


def test_what_a_further_text_shares_with_calibration_is_said_of_it_alone(measured):
    _, result = measured
    record = artifacts.read_json(result.folder / "evaluate" / "evaluate.json")
    assert record["texts"]["seen"]["overlap"] == {"calibration": 1.0}
    assert record["texts"]["words"]["overlap"] == {"calibration": 0.0}
    assert record["overlap"]["calibration"] < evaluate.OVERLAP_LIMIT
    (note,) = artifacts.read_manifest(result.folder / "evaluate")["notes"]
    assert note.startswith("100.0% of the test text 'seen' also stands in the text of calibration")


def test_gates_judge_by_further_texts(measured):
    (failed,) = measured[1].failed_gates
    assert failed["figure"] == "perplexity.seen.64.pruned"


def test_further_texts_are_in_the_table_and_the_reports(measured):
    _, result = measured
    labels = [row.label for row in summary.collect(result.folders)["rows"]]
    assert {"Perplexity, window 128", "Perplexity on words, window 64",
            "Bits/byte on seen, window 128"} <= set(labels)
    assert len(labels) == len(set(labels))
    for page in ("report.md", "report.html"):
        said = (result.folder / "report" / page).read_text()
        assert "Perplexity on words, window 64" in said and "Perplexity on seen: " in said


def test_what_a_further_text_holds_decides_whether_evaluate_is_reused(measured, tmp_path, words):
    settings, result = measured
    shutil.copytree(result.folder, tmp_path / "smoke")
    assert api.run(SMOKE, settings, tmp_path, until="evaluate").ran == []
    named = settings[0].replace(json.loads(settings[0].partition("=")[2])["words"]["data"],
                                str(words))
    words.write_text(WORDS + " and more")
    assert api.run(SMOKE, [named, *settings[1:]], tmp_path, until="evaluate").ran == ["evaluate"]


def test_the_graph_s_figures_bear_the_names_of_texts():
    recipe = recipe_file.load(SMOKE, [texts_of(code={"data": "c4"}), "export.onnx.enabled=true",
                                      "export.onnx.quantize=[int8]"])
    of = {"": {128: Perplexity(1.0, 10)}, "code": {128: Perplexity(2.0, 10)}}
    made = {name for prefix in ("", "onnx.", "onnx.int8.") for name in evaluate._figures(
        prefix, of, of, {"": 0.3, "code": 0.4}, torch=of if prefix else None)}
    assert made == {n for n in expected(recipe) if "perplexity" in n or "bits_per_byte" in n}
    figures = dict.fromkeys([*expected(recipe)], 1.0)
    labels = {row.label for row in summary.rows(figures, {})}
    assert {"ONNX: perplexity", "ONNX: perplexity on code", "ONNX int8: perplexity on code",
            "Perplexity on code, window 128"} <= labels


def test_a_plan_counts_every_text():
    def seconds(*settings: str) -> float:
        resolved = resolved_at(recipe_file.load(SMOKE, list(settings)), PICO)
        sized = footprint.sizes(resolved, resolved.architecture)
        return footprint.seconds(sized, 1e9, 1e12)["evaluate"]

    assert seconds(texts_of(a={"data": "c4"}, b={"data": "ptb"})) == pytest.approx(3 * seconds())


def test_a_comparison_measures_further_texts(tiny, tmp_path, words):
    from tests.test_compare import recipe

    own = recipe(tiny, tmp_path, {"methods": ["magnitude"], "repairs": ["none"], "seeds": [0],
                                  "criteria": [], "ratios": [0.5]},
                 [texts_of(further={"data": str(words)})])
    found = api.compare(own, tmp_path / "out")
    assert list(found.data["test"]) == [own.evaluate.perplexity.data, "further"]
    assert {s["text"] for s in found.data["summary"]} == set(found.data["test"])
    clash = own.evaluate.perplexity.model_copy(update={"data": "further"})
    with pytest.raises(InputError, match=r"^evaluate\.perplexity\.texts\.further: tables show"):
        cells.test_texts(own.model_copy(update={"evaluate": own.evaluate.model_copy(
            update={"perplexity": clash})}))


@pytest.mark.parametrize(("texts", "said"), [
    ("{my code: {data: c4}}", "texts: 'my code' is no name for a text's figures; use letters"),
    ("{'64': {data: c4}}", "texts: '64' is no name"),
    ("{a.b: {data: c4}}", "texts: 'a.b' is no name"),
    ("{'': {data: c4}}", "texts: '' is no name"),
    ("{max: {data: c4}}", "texts: perplexity.max is another figure; call the text something else"),
    ("{code: {}}", "texts.code.data: required, and missing"),
    ("{code: c4}", 'texts.code: "c4" is not accepted: this is a section, with the fields data'),
    ("{code: {data: c4, feild: x}}", "texts.code.feild: unknown field (did you mean 'field'?)"),
    ("{code: {data: 3}}", "texts.code.data: 3 is not accepted"),
    ("{code: {data: c4}, code: {split: test}}", "texts.code: given twice, first on line 6; keep "
     "one"),
    ("[{data: c4}]", "texts: [{"), ("c4", 'texts: "c4" is not accepted')])
def test_further_texts_that_cannot_be_are_refused_with_their_line(texts, said):
    with pytest.raises(RecipeError) as caught:
        recipe_file.parse("name: x\nmodel: {id: y}\nprune: {ratio: 0.3}\nevaluate:\n"
                          f"  perplexity:\n    texts: {texts}\n", "r.yaml")
    assert caught.value.faults[0].startswith(f"line 6: evaluate.perplexity.{said}")


def test_a_number_names_no_text():
    with pytest.raises(RecipeError, match=r"evaluate\.perplexity\.texts\.64: 64 is not accepted"):
        recipe_file.load(SMOKE, ["evaluate.perplexity.texts={64: {data: c4}}"])


def test_a_gate_on_a_text_that_is_not_measured_is_refused():
    with pytest.raises(RecipeError, match=r"did you mean 'perplexity\.code\.ratio'"):
        recipe_file.load(SMOKE, [texts_of(code={"data": "c4"}),
                                 "gates.perplexity.cod.ratio.max=2"])


@pytest.mark.parametrize(("content", "said"), [
    ("", "is empty"), ("  \n", "holds no text"), ("A few words.", "fills no window of 128")])
def test_a_further_text_with_too_little_in_it_is_named(smoke, tmp_path, words, content, said):
    words.write_text(content)
    shutil.copytree(smoke.folder, tmp_path / "runs" / "smoke")
    done = bipdeploy_here("run", SMOKE, "--runs", tmp_path / "runs", "--set",
                          texts_of(code={"data": str(words)}))
    refused(done, 2, "evaluate.perplexity.texts.code", said)


def test_further_texts_that_are_none_are_all_named():
    recipe = recipe_file.load(SMOKE, [texts_of(a={"data": "wikitext3"}, b={"data": "none.txt"})])
    with pytest.raises(InputError) as caught:
        check_texts(recipe)
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == [
        "evaluate.perplexity.texts.a.data", "evaluate.perplexity.texts.b.data"]
