"""Several texts at once: perplexity on further texts, by name; mixtures that calibrate."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from bipdeploy import api
from bipdeploy.comparing import cells, results
from bipdeploy.data import sampling, text, windows
from bipdeploy.data.calibration import calibration_batches
from bipdeploy.errors import InputError, RecipeError
from bipdeploy.measuring.perplexity import Perplexity
from bipdeploy.pipeline.keys import stage_keys
from bipdeploy.pipeline.preflight import check_texts
from bipdeploy.planning import footprint
from bipdeploy.planning.resolved import resolved_at
from bipdeploy.recipe import file as recipe_file
from bipdeploy.recipe.figures import expected
from bipdeploy.reporting import summary
from bipdeploy.running import artifacts
from bipdeploy.stages import curves, evaluate
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
    assert {"Perplexity, window 128", "Perplexity, words, 64",
            "Bits/byte, seen, 128"} <= set(labels)
    assert sum(label.startswith("Perplexity") for label in labels) == 3 * 2
    for page in ("report.md", "report.html"):
        said = (result.folder / "report" / page).read_text()
        assert "Perplexity, words, 64" in said and "Perplexity on seen: " in said


def test_what_a_further_text_holds_decides_whether_evaluate_is_reused(words):
    def keys() -> dict[str, str]:
        recipe = recipe_file.load(SMOKE, [texts_of(words={"data": str(words)})])
        return stage_keys(resolved_at(recipe, PICO))

    before = keys()
    assert keys() == before
    words.write_text(WORDS + " and more")
    assert [name for name, key in keys().items() if key != before[name]] == [
        "evaluate", "gate", "report"]


def test_the_graph_s_figures_bear_the_names_of_texts():
    recipe = recipe_file.load(SMOKE, [texts_of(code={"data": "c4"}), "export.onnx.enabled=true",
                                      "export.onnx.quantize=[int8]"])
    of = {"": {128: Perplexity(1.0, 10)}, "code": {128: Perplexity(2.0, 10)}}
    made = {name for prefix in ("", "onnx.", "onnx.int8.") for name in evaluate._figures(
        prefix, of, of, {"": 0.3, "code": 0.4}, torch=of if prefix else None)}
    assert made == {n for n in expected(recipe) if "perplexity" in n or "bits_per_byte" in n}
    figures = dict.fromkeys([*expected(recipe)], 1.0)
    labels = {row.label for row in summary.rows(figures, {})}
    assert {"ONNX: perplexity", "ONNX: perplexity, code", "ONNX int8: perplexity, code",
            "Perplexity, code, 128"} <= labels


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


# Mixtures that calibrate

def mixed(*sources: dict) -> str:
    return f"calibration.data={json.dumps(sources)}"


@pytest.fixture
def two(tmp_path) -> tuple[Path, Path]:
    """Two files whose windows can be told apart by their letters."""
    paths = tmp_path / "first.txt", tmp_path / "second.jsonl"
    draw = random.Random(0)
    first, second = (" ".join("".join(draw.choice(letters) for _ in range(5)) for _ in range(9000))
                     for letters in ("abcdefg", "tuvwxyz"))
    paths[0].write_text(first)
    paths[1].write_text(json.dumps({"code": second}))
    return paths


def drawn(*settings: str, samples: int = 40) -> tuple[torch.Tensor, dict]:
    recipe = recipe_file.load(SMOKE, ["calibration.tokens=32", f"calibration.samples={samples}",
                                      *settings])
    batches, provenance = calibration_batches(recipe, PICO, 256)
    return torch.cat(batches), provenance


def of_first(found: torch.Tensor) -> list[bool]:
    """Whether each window is of the first of the two files."""
    said = windows.tokenizer(PICO).batch_decode(found)
    return [window.strip()[0] < "m" for window in said]


def sources(two: tuple[Path, Path], share: float = 0.75) -> list[dict]:
    return [{"source": str(two[0]), "share": share},
            {"source": str(two[1]), "share": 1 - share, "field": "code"}]


def test_windows_come_by_share_and_are_the_same_each_time(two):
    found, provenance = drawn(mixed(*sources(two)))
    assert sum(of_first(found)) == 30 and found.shape == (40, 32)
    assert len({tuple(window) for window in found.tolist()}) == 40
    again, same = drawn(mixed(*sources(two)))
    assert torch.equal(found, again) and same == provenance
    other, _ = drawn(mixed(*sources(two)), "seed=1")
    assert not torch.equal(found, other) and of_first(found) == of_first(other)


def test_provenance_names_every_source(two):
    _, provenance = drawn(mixed(*sources(two)))
    assert (provenance["windows"], provenance["seed"]) == ([40, 32], 0)
    assert [(own["data"], own["share"], own["windows"]) for own in provenance["sources"]] == [
        (str(two[0]), 0.75, 30), (str(two[1]), 0.25, 10)]
    for own, field in zip(provenance["sources"], ("text", "code"), strict=True):
        assert own["text_sha256"] == text.read(own["data"], "calibration", field).sha256
    assert {"data", "text_sha256"}.isdisjoint(provenance)


def test_a_source_s_windows_are_in_the_order_of_its_text(two):
    found, _ = drawn(mixed(*sources(two)))
    ids = windows.token_ids(text.read(str(two[0]), "calibration"), PICO)
    own = found[torch.tensor(of_first(found))]
    assert torch.equal(own, windows.draw(ids, 30, 32, 0))


@pytest.mark.parametrize("share", [0.75, 0.9])
def test_what_a_search_judges_by_and_what_it_fits_to_hold_both_sources(two, share):
    settings = [mixed(*sources(two, share)), "prune.search.windows=16"]
    recipe = recipe_file.load(SMOKE, settings)
    found = curves.searched_text(recipe, drawn(*settings)[0])
    for part in (found.judged, found.fitted):
        assert abs(sum(of_first(torch.cat(part))) / sum(map(len, part)) - share) < 0.1
        assert set(of_first(torch.cat(part))) == {True, False}


def test_a_single_text_is_what_it_was():
    """And so is a list of one."""
    found, provenance = drawn()
    ids = windows.token_ids(text.read("builtin:pydocs", "calibration"), PICO)
    assert torch.equal(found, windows.draw(ids, 40, 32, 0))
    assert set(provenance) == {"data", "split", "text_sha256", "tokenised", "windows", "seed",
                               "windows_sha256"}
    assert drawn(mixed({"source": "builtin:pydocs", "share": 1}))[1] == provenance


@pytest.mark.parametrize(("count", "shares", "found"), [
    (10, [0.7, 0.3], [7, 3]), (10, [0.66, 0.34], [7, 3]), (7, [1 / 3, 1 / 3, 1 / 3], [3, 2, 2]),
    (100, [0.29, 0.71], [29, 71]), (40, [0.999, 0.001], [39, 1]), (3, [0.98, 0.01, 0.01],
                                                                   [1, 1, 1]),
    (9, [0.333, 0.333, 0.333], [3, 3, 3]), (5, [1], [5])])
def test_shares_in_whole_windows(count, shares, found):
    assert sampling.apportioned(count, shares) == found


def test_shares_are_never_more_than_a_window_off_where_each_has_one():
    draw = random.Random(0)
    for _ in range(300):
        parts = [draw.random() + 0.05 for _ in range(draw.randint(1, 5))]
        shares, count = [p / sum(parts) for p in parts], draw.randint(200, 400)
        found = sampling.apportioned(count, shares)
        assert sum(found) == count
        assert all(abs(n - count * s) < 1 for n, s in zip(found, shares, strict=True))


@pytest.mark.parametrize("counts", [[5], [30, 10], [1, 39], [7, 7, 7]])
def test_interleaving_takes_every_window_once_in_order_and_spreads_them(counts):
    found = sampling.interleaved(counts)
    assert len(set(found)) == len(found) == sum(counts)
    for source, count in enumerate(counts):
        places = [n for n, (own, _) in enumerate(found) if own == source]
        assert [number for own, number in found if own == source] == list(range(count))
        half = sum(place < len(found) / 2 for place in places)
        assert abs(half - count / 2) <= 1


def test_a_rule_gives_every_source_a_window():
    three = mixed(*({"source": name, "share": 0.333} for name in ("c4", "ptb", "alpaca")))
    recipe = recipe_file.load(SMOKE, [three, "calibration.samples=null",
                                      "calibration.tokens_per_channel=0.01"])
    assert resolved_at(recipe, PICO).recipe.calibration.windows == 3


def test_a_run_on_a_mixture(smoke, tmp_path, two):
    """Its provenance, its report, what it reuses, and the overlap of every source."""
    shutil.copytree(smoke.folder, tmp_path / "smoke")
    settings = [mixed(*sources(two)), "calibration.tokens=32", f"evaluate.perplexity.data={two[0]}",
                texts_of(second={"data": str(two[1]), "field": "code"},
                         pydocs={"data": "builtin:pydocs"}),
                "evaluate.perplexity.max_tokens=512", "calibration.field=text"]
    result = api.run(SMOKE, settings, tmp_path)
    scored = artifacts.read_json(result.folder / "score" / "scores.json")["calibration"]
    assert [own["windows"] for own in scored["sources"]] == [24, 8]
    assert artifacts.read_json(result.folder / "recover" / "recover.json")["calibration"] == scored
    record = artifacts.read_json(result.folder / "evaluate" / "evaluate.json")
    assert record["overlap"]["calibration"] == 1.0
    shares = {name: own["overlap"]["calibration"] for name, own in record["texts"].items()}
    assert shares["second"] == 1.0 and shares["pydocs"] < 0.01
    for page in ("report.md", "report.html"):
        said = (result.folder / "report" / page).read_text()
        assert "24 windows" in said and "second.jsonl" in said
    assert api.run(SMOKE, settings, tmp_path).ran == []
    two[1].write_text(two[1].read_text().replace("t", "u"))
    assert api.run(SMOKE, settings, tmp_path, until="score").ran == ["score"]


def test_a_comparison_says_what_its_windows_are_of():
    recipe = recipe_file.load(SMOKE, [mixed({"source": "c4", "share": 0.7},
                                            {"source": "ptb", "share": 0.3})])
    said = results.protocol({"recipe": recipe.model_dump(mode="json"), "command": "x"})
    assert "32 of 64 tokens of c4 (70%) and ptb (30%)" in said
    assert recipe_file.build(recipe.model_dump(mode="json"), "again") == recipe


HALVES = "{source: c4, share: 0.5}, {source: ptb, share: 0.5}"


@pytest.mark.parametrize(("section", "said"), [
    ("data: []", "data: [] is not accepted: list should have at least 1 item"),
    ("data: 3", "data: 3 is not accepted: give one text, or a list of sources"),
    ("data: {source: c4}", 'data: {"source": "c4"} is not accepted: give one text, or a list'),
    ("data: [c4]", 'data.0: "c4" is not accepted: this is a section, with the fields source, '),
    ("data: [{share: 1}]", "data.0.source: required, and missing"),
    ("data: [{source: c4}]", "data.0.share: required, and missing"),
    ("data: [{source: c4, shares: 1, share: 1}]",
     "data.0.shares: unknown field (did you mean 'share'?)"),
    ("data: [{source: c4, share: 0}, {source: ptb, share: 1}]", "data.0.share: 0 is not accepted"),
    ("data: [{source: c4, share: 1.5}]", "data.0.share: 1.5 is not accepted"),
    ("data: [{source: c4, share: .nan}]", "data.0.share: "),
    ("data: [{source: c4, share: half}]", 'data.0.share: "half" is not accepted'),
    ("data: [{source: c4, share: 0.5}, {source: ptb, share: 0.4}]",
     "data: the shares of the sources make 0.9, and not 1; change them"),
    ("data: [{source: c4, share: 0.5}, {source: c4, share: 0.5}]", "data: 'c4' is given twice"),
    ("data: [{source: c4, share: 0.5}, {source: c4, split: calibration, share: 0.5}]",
     "data: 'c4' is given twice"),
    (f"data: [{HALVES}], split: train", "split: 'train' is of one text, and data is a list; give"),
    (f"data: [{HALVES}], field: code", "field: 'code' is of one text, and data is a list; give"),
    (f"data: [{HALVES}], samples: 1", "samples: 1 windows cannot come from 2 sources; raise")])
def test_mixtures_that_cannot_be_are_refused_with_their_line(section, said):
    with pytest.raises(RecipeError) as caught:
        recipe_file.parse("name: x\nmodel: {id: y}\nprune: {ratio: 0.3}\nrecover: {method: none}\n"
                          f"calibration: {{{section}}}\n", "r.yaml")
    (fault,) = caught.value.faults
    assert fault.replace("calibration: ", "calibration.").startswith(f"line 5: calibration.{said}")


@pytest.mark.parametrize(("content", "named"), [
    ("", "calibration.data.1.source: "), ('{"code": " "}', "calibration.data.1.source: "),
    ('{"text": "x"}', "calibration.data.1.field: "), ("{", "calibration.data.1.source: "),
    ('{"code": "few words"}', "calibration.samples: ")])
def test_a_source_that_cannot_be_read_is_named(tmp_path, two, content, named):
    two[1].write_text(content)
    done = bipdeploy_here("run", SMOKE, "--runs", tmp_path / "runs", "--set", mixed(*sources(two)))
    refused(done, 2, named, "second.jsonl")


def test_sources_that_are_none_are_all_named():
    recipe = recipe_file.load(SMOKE, [mixed({"source": "c5", "share": 0.5},
                                            {"source": "none.txt", "share": 0.5})])
    with pytest.raises(InputError) as caught:
        check_texts(recipe)
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == [
        "calibration.data.0.source", "calibration.data.1.source"]
