"""Recipes: what is accepted, and that every fault is named with its line and its fix."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from bipdeploy.errors import BAD_INPUT, InputError, RecipeError
from bipdeploy.recipe import file as recipe_file
from bipdeploy.recipe.figures import expected
from bipdeploy.recipe.recipe import Recipe
from tests.running import RECIPES, SMOKE

ALL = sorted(RECIPES.glob("*.yaml"))
MINIMAL = """\
name: minimal
model:
  id: builtin:pico
prune:
  ratio: 0.3
"""


def faults(text: str, *overrides: str) -> list[str]:
    """The faults of a recipe's text; fails where there are none."""
    with pytest.raises(RecipeError) as caught:
        recipe_file.parse(text, "r.yaml", list(overrides))
    assert caught.value.exit_code == BAD_INPUT
    return caught.value.faults


def sections(model: type[BaseModel] = Recipe) -> dict[str, type[BaseModel]]:
    """Every section of a recipe by name, nested ones too."""
    found = {model.__name__: model}
    for field in model.model_fields.values():
        for option in (field.annotation, *get_args(field.annotation)):
            if isinstance(option, type) and issubclass(option, BaseModel):
                found |= sections(option)
    return found


def test_one_window_cannot_be_held_back():
    (fault,) = faults(MINIMAL + "recover: {refit: {ridge: auto}}\ncalibration: {samples: 1}\n")
    assert "recover.refit.ridge: auto holds calibration windows back" in fault


def test_the_amount_of_text_is_said_once():
    (fault,) = faults(MINIMAL + "calibration: {samples: 64, tokens_per_channel: 6}\n")
    assert fault == ("line 6: calibration: samples (64) and tokens_per_channel (6) both say how "
                     "much text there is; leave one out, or set it to null")
    recipe_file.parse(MINIMAL + "calibration: {samples: null, tokens_per_channel: 6}\n", "test")


# The recipes that come with the project

@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_every_recipe_loads_and_is_named_like_its_file(path):
    assert recipe_file.load(path).name == path.stem


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_every_recipe_opens_with_its_schema_what_it_needs_and_its_command(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[:next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert header[0] == "# yaml-language-server: $schema=schema.json"
    command = "compare" if path.stem.startswith("compare") else "run"
    assert any(line.startswith(f"#     bipdeploy {command} recipes/{path.name}") for line in header)
    assert any(line.startswith("# Needs") for line in header)


def test_the_recipes_that_the_project_promises_are_there():
    assert {path.stem for path in ALL} >= {
        "quickstart", "smoke", "llama7b-20", "llama7b-30", "llama7b-50", "vicuna7b-30",
        "llama13b-30", "smollm-135m", "qwen3-0.6b"}


def test_the_paper_models_are_gated_on_perplexity_and_decoding():
    for path in ALL:
        if ("7b" in path.stem or "13b" in path.stem) and "random" not in path.stem:
            recipe = recipe_file.load(path)
            assert {"perplexity.ratio", "decode.speedup"} <= set(recipe.gates), path
            assert recipe.evaluate.perplexity.windows == [128, 2048], path
            assert recipe.prune.ratio == int(path.stem[-2:]) / 100, path


def test_the_schema_beside_the_recipes_is_the_current_one():
    stored = json.loads((RECIPES / "schema.json").read_text(encoding="utf-8"))
    assert stored == recipe_file.schema(), "run `make schema`"


def test_the_schema_accepts_every_field_that_the_recipes_use():
    schema = recipe_file.schema()
    for path in ALL:
        used = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert set(used) <= set(schema["properties"])
        assert set(schema["required"]) <= set(used)


@pytest.mark.parametrize("name", sorted(sections()))
def test_every_field_is_documented_where_it_is_declared(name):
    section = sections()[name]
    assert section.__doc__, name
    for field, info in section.model_fields.items():
        nested = [o for o in (info.annotation, *get_args(info.annotation))
                  if isinstance(o, type) and issubclass(o, BaseModel)]
        assert info.description or (nested and nested[0].__doc__), f"{name}.{field}"


# Faults

def test_an_unknown_field_is_named_with_its_line_and_the_one_that_was_meant():
    assert faults(MINIMAL + "  raito: 0.2\n") == [
        "line 6: prune.raito: unknown field (did you mean 'ratio'?)"]


def test_an_unknown_section_is_named_with_its_line_and_the_one_that_was_meant():
    assert faults(MINIMAL + "prunning: {ratio: 0.2}\n") == [
        "line 6: prunning: unknown field (did you mean 'prune'?)"]


def test_an_unknown_field_deep_inside_is_named_with_its_line():
    text = MINIMAL + "recover:\n  refit:\n    rigde: 0.1\n"
    assert faults(text) == ["line 8: recover.refit.rigde: unknown field (did you mean 'ridge'?)"]


def test_all_faults_are_reported_at_once_each_with_its_line():
    found = faults("name: no spaces\nmodel: {id: x, dtype: int3}\nprune:\n  ratio: 2\n"
                   "  round: 8\ncalibration:\n  samples: none\n")
    assert len(found) == 5
    for start in ("line 1: name:", "line 2: model.dtype:", "line 4: prune.ratio:",
                  "line 5: prune.round:", "line 7: calibration.samples:"):
        assert any(fault.startswith(start) for fault in found), (start, found)


def test_the_message_counts_the_faults_and_names_the_file():
    with pytest.raises(RecipeError) as caught:
        recipe_file.parse("name: a b\nmodel: {id: x}\nprune: {ratio: 3}\n", "some/r.yaml")
    assert str(caught.value).splitlines()[0] == "some/r.yaml: 2 faults"


@pytest.mark.parametrize("section", ["name", "model", "prune"])
def test_a_missing_section_is_named(section):
    data = yaml.safe_load(MINIMAL)
    del data[section]
    assert faults(yaml.safe_dump(data)) == [f"{section}: required, and missing"]


def test_a_missing_field_is_named_with_the_line_of_its_section():
    assert faults("name: x\nmodel:\n  dtype: auto\nprune: {ratio: 0.3}\n") == [
        "line 2: model.id: required, and missing"]


def test_a_recipe_says_how_much_is_removed_once():
    assert faults("name: x\nmodel: {id: y}\nprune:\n  round_to: 8\n") == [
        "line 3: prune: give ratio or target"]


@pytest.mark.parametrize("ratio", ["0", "1", "-1", "1.5", ".nan", ".inf", "half"])
def test_a_ratio_outside_0_to_1_is_refused_with_its_line(ratio):
    (fault,) = faults(MINIMAL.replace("0.3", ratio))
    assert fault.startswith("line 5: prune.ratio: ")


@pytest.mark.parametrize(("line", "at"), [
    ("calibration: {samples: many}", "calibration.samples"),
    ("calibration: {samples: 0}", "calibration.samples"),
    ("calibration: {tokens_per_channel: 0}", "calibration.tokens_per_channel"),
    ("calibration: {tokens_per_channel: .inf}", "calibration.tokens_per_channel"),
    ("calibration: {tokens_per_channel: few}", "calibration.tokens_per_channel"),
    ("calibration: {tokens: 2}", "calibration.tokens"),
    ("calibration: []", "calibration"),
    ("seed: -1", "seed"),
    ("recover: {method: magic}", "recover.method"),
    ("recover: {refit: {ridge: -0.1}}", "recover.refit.ridge: -0.1 is neither"),
    ("recover: {refit: {ridge: none}}", "recover.refit.ridge: 'none' is neither"),
    ("prune: {depth: {layers: 2}}", "prune.depth.layers: unknown field"),
    ("prune: {ratio: 0.3, depth: {blocks: -1}}", "prune.depth.blocks"),
    ("evaluate: {perplexity: {windows: []}}", "evaluate.perplexity.windows"),
    ("evaluate: {perplexity: {windows: 128}}", "evaluate.perplexity.windows"),
    ("bench: {torch: {repeats: 1}}", "bench.torch.repeats"),
    ("score: {criterion: 7}", "score.criterion"),
])
def test_a_wrong_type_or_range_is_refused_at_its_field(line, at):
    assert any(fault.startswith(f"line 6: {at}") for fault in faults(MINIMAL + line + "\n"))


def test_a_value_where_a_section_belongs_is_refused_with_the_section_s_fields():
    (fault,) = faults("name: x\nmodel: builtin:pico\nprune: {ratio: 0.3}\n")
    assert fault.startswith('line 2: model: "builtin:pico" is not accepted: this is a section, ')
    assert "with the fields id, revision, dtype" in fault


def test_an_unknown_criterion_is_refused_with_the_one_that_was_meant():
    (fault,) = faults(MINIMAL + "score: {criterion: llm_pib}\n")
    assert fault == ("line 6: score.criterion: no criterion is called 'llm_pib' "
                     "(did you mean 'llm_bip'?)")


def test_nothing_to_prune_is_refused():
    (fault,) = faults(MINIMAL + "  heads: false\n  ffn: false\n")
    assert fault.startswith("line 4: prune: heads and ffn are both false")


def test_a_key_given_twice_is_refused_with_both_lines():
    assert faults(MINIMAL + "  ratio: 0.5\n") == [
        "line 6: prune.ratio: given twice, first on line 5; keep one"]


@pytest.mark.parametrize(("text", "line"), [
    ("name: [a\n", "line 2"), ("name: x\nmodel: : y\n", "line 2"), ("a: 'open\n", "line 2"),
    ("name: x\n\tid: y\n", "line 2"), ("%!\n", "line 1")])
def test_what_is_not_yaml_is_refused_with_the_line(text, line):
    (fault,) = faults(text)
    assert fault.startswith(f"{line}: not YAML: ")


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "just words\n", "42\n"])
def test_what_is_not_a_mapping_is_refused(text):
    (fault,) = faults(text)
    assert "a recipe is a mapping of sections" in fault


@pytest.mark.parametrize("text", ["a: 1\n---\nb: 2\n", "!!python/object:os.system {}\n",
                                  "? [a, b]\n: 1\n", "a: &x [*x]\n", "1: 2\n", "null: 3\n"])
def test_odd_yaml_is_a_fault_and_no_crash(text):
    assert faults(text)


def test_a_recipe_that_is_missing_or_no_text_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        recipe_file.load(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        recipe_file.load(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x9f")
    with pytest.raises(InputError, match="it is not UTF-8 text"):
        recipe_file.load(tmp_path / "bytes.yaml")


# Gates

def test_a_gate_on_an_unknown_figure_is_refused_with_the_one_that_was_meant():
    (fault,) = faults(MINIMAL + "gates:\n  perplexity.ration: {max: 2}\n")
    assert fault.startswith("line 7: gates.perplexity.ration: no enabled stage measures")
    assert "did you mean 'perplexity.ratio'?" in fault


def test_a_gate_on_a_figure_of_a_stage_that_is_off_is_refused():
    text = MINIMAL + "bench: {torch: {enabled: false}}\ngates:\n  decode.speedup: {min: 1}\n"
    (fault,) = faults(text)
    assert fault.startswith("line 8: gates.decode.speedup: no enabled stage measures")


def test_every_unknown_gate_is_reported():
    text = MINIMAL + "gates:\n  perplexity.ration: {max: 2}\n  speed: {min: 2}\n"
    assert [fault.partition(": ")[0] for fault in faults(text)] == ["line 7", "line 8"]


@pytest.mark.parametrize(("bounds", "why"), [
    ("{min: 2, max: 1}", "min 2 is above max 1"), ("{}", "a gate needs a min or a max"),
    ("{mex: 1}", "unknown field (did you mean 'max'?)"), ("1.5", "1.5 is not accepted"),
    ("{max: low}", '"low" is not accepted')])
def test_bounds_that_say_nothing_are_refused(bounds, why):
    (fault,) = faults(MINIMAL + f"gates:\n  perplexity.ratio: {bounds}\n")
    assert fault.startswith("line 7: gates.perplexity.ratio") and why in fault


def test_every_figure_that_a_recipe_measures_can_be_gated():
    for figure in expected(recipe_file.load(SMOKE)):
        recipe = recipe_file.load(SMOKE, [f"gates.{figure}.max=9"])
        assert recipe.gates[figure].max == 9


# Overrides

def test_an_override_goes_over_the_file():
    recipe = recipe_file.load(SMOKE, ["prune.ratio=0.4", "name=other", "recover.method=none"])
    assert (recipe.prune.ratio, recipe.name, recipe.recover.method) == (0.4, "other", "none")


def test_an_override_makes_the_sections_that_the_file_lacks():
    recipe = recipe_file.parse(MINIMAL, "r.yaml", ["recover.refit.ridge=0.5",
                                                   "prune.protect={first: 1, last: 2}"])
    assert recipe.recover.refit.ridge == 0.5
    assert (recipe.prune.protect.first, recipe.prune.protect.last) == (1, 2)


def test_a_gate_is_overridden_by_the_name_of_its_figure():
    recipe = recipe_file.load(SMOKE, ["gates.perplexity.ratio.max=1.0", "gates.ttft.dense.min=2"])
    assert recipe.gates["perplexity.ratio"].max == 1.0
    assert recipe.gates["ttft.dense"].min == 2
    assert recipe.gates["block_parameters.ratio"].max == 0.75


def test_a_whole_gate_is_overridden_by_its_bounds():
    recipe = recipe_file.load(SMOKE, ["gates.perplexity.ratio={max: 1.5}"])
    assert recipe.gates["perplexity.ratio"].max == 1.5


def test_a_gate_on_a_figure_with_three_parts_is_set():
    recipe = recipe_file.load(SMOKE, ["gates.perplexity.128.ratio.max=2"])
    assert recipe.gates["perplexity.128.ratio"].max == 2


@pytest.mark.parametrize("item", ["prune.ratio", "=0.3", " =0.3", "", "prune.ratio=[", "name.x=1"])
def test_an_override_of_a_wrong_form_is_refused(item):
    with pytest.raises(InputError, match="--set"):
        recipe_file.load(SMOKE, [item])


def test_a_fault_in_an_override_is_named_without_a_line_of_the_file():
    assert faults(MINIMAL, "prune.ratio=2", "model.dtipe=auto") == [
        "model.dtipe: unknown field (did you mean 'dtype'?)",
        "prune.ratio: 2 is not accepted: input should be less than 1"]


def test_an_empty_name_in_an_override_is_refused():
    assert faults(MINIMAL, "prune..ratio=2")


def test_a_recipe_does_not_change_after_reading():
    recipe = recipe_file.load(SMOKE)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]




# Names of before

OLD = """name: x
model: {id: builtin:pico}
prune: {ratio: 0.3}
lora: {enabled: true, rank: 4}
gates:
  lora.loss.after: {max: 3}
sweep:
  fields: {lora.rank: [2, 4]}
"""


def test_a_recipe_with_a_section_s_old_name_reads_as_with_the_new_one():
    made = recipe_file.parse(OLD, "old")
    assert made == recipe_file.parse(OLD.replace("lora", "tune"), "new")
    assert made.tune.rank == 4 and made.sweep.fields == {"tune.rank": [2, 4]}
    settings = ["{}.rank=8", "gates.{}.loss.after.max=2"]
    assert recipe_file.parse(OLD, "old", [s.format("lora") for s in settings]) == recipe_file.parse(
        OLD, "old", [s.format("tune") for s in settings])


def test_both_names_of_one_section_are_refused():
    with pytest.raises(RecipeError) as raised:
        recipe_file.parse(OLD + "tune: {enabled: true}\n", "both")
    assert "line 4: lora: the old name of tune, which is given too; keep tune" in str(raised.value)
    assert len(raised.value.faults) == 1


def test_a_fault_in_a_section_with_an_old_name_has_its_line():
    with pytest.raises(RecipeError, match=r"line 4: tune\.rank: 0 is not accepted"):
        recipe_file.parse(OLD.replace("rank: 4", "rank: 0"), "old")
