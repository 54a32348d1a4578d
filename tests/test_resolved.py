"""A model's sizes are read once in a run, and what follows from them is the same for all."""

from __future__ import annotations

import sys

import pytest

from bipdeploy import api
from bipdeploy.errors import InputError
from bipdeploy.model import checkpoint, weights
from bipdeploy.model.families import architecture
from bipdeploy.planning.resolved import resolve, resolved_at
from bipdeploy.pruning.allocation import uniform_widths
from bipdeploy.recipe import file as recipe_file
from tests.running import SMOKE
from tests.tiny import PICO


@pytest.fixture
def reads(monkeypatch):
    """The folders whose config.json is read, and those whose weights are opened."""
    configs, opened = [], []
    original, entries = checkpoint.read_config, weights.entries

    def read(folder):
        configs.append(folder)
        return original(folder)

    def headers(folder, config):
        opened.append(folder)
        return entries(folder, config)

    for name, module in list(sys.modules.items()):
        if name.startswith("bipdeploy.") and getattr(module, "read_config", None) is original:
            monkeypatch.setattr(module, "read_config", read)
    monkeypatch.setattr(weights, "entries", headers)
    return configs, opened


# What transformers loads whole is verified by itself: for the walk's agreement, for perplexity, for
# the bench. `fingerprint` looks at the config alone, and a text is held against the vocabulary.

def test_a_run_reads_the_dense_model_s_config_once_and_opens_its_weights_once(tmp_path, reads):
    configs, opened = reads
    api.run(SMOKE, runs=tmp_path)
    assert opened.count(PICO) == 1 + 3
    assert 1 + 3 + 1 <= configs.count(PICO) <= 1 + 3 + 1 + 3  # token ids may be known already


def test_a_single_stage_opens_the_dense_model_once(tmp_path, reads, smoke):
    _, opened = reads
    api.prune("builtin:pico", smoke.folder / "score", tmp_path / "prune", ratio=0.3,
              settings=["prune.round_to=8"])
    assert opened.count(PICO) == 1


def test_the_cells_of_a_comparison_share_the_dense_model(tmp_path, reads):
    _, opened = reads
    api.compare(SMOKE, tmp_path / "compare", [
        'compare={criteria: [magnitude], ratios: [0.3, 0.4], repairs: [none, bias], seeds: [0]}',
        "evaluate.perplexity.max_tokens=500"])
    assert opened.count(PICO) == 1 + 2


def test_a_plan_reads_the_config_once_and_no_weights(tmp_path, reads):
    configs, opened = reads
    api.plan(SMOKE, runs=tmp_path)
    assert configs == [PICO] and opened == []


def test_all_that_follows_from_the_sizes_is_what_the_parts_say():
    recipe = recipe_file.load(SMOKE)
    found = resolve(recipe)
    arch = architecture(found.config)
    assert found == resolved_at(recipe, PICO)
    assert found.architecture == arch and found.folder == PICO
    assert list(found.uniform) == uniform_widths(arch, recipe.prune)
    assert found.exported(found.uniform).blocks == found.uniform
    assert found.allowed(0, "heads")[-1] == arch.blocks[0].attention


def test_another_recipe_of_the_same_model_reads_nothing_again(reads, tiny):
    configs, _ = reads
    first = resolve(recipe_file.load(SMOKE))
    second = first.under(recipe_file.load(SMOKE, ["prune.ratio=0.5"]))
    assert configs == [PICO] and second.architecture is first.architecture
    assert second.uniform != first.uniform
    other = first.under(recipe_file.load(SMOKE, [f"model.id={tiny}"]))
    assert configs == [PICO, tiny] and other.architecture != first.architecture


def test_what_cannot_be_met_is_said_when_it_is_asked_for_and_not_before():
    found = resolve(recipe_file.load(SMOKE, ["prune.ratio=null", "prune.target={memory: 1KB}"]))
    with pytest.raises(InputError, match=r"prune\.target\.memory"):
        _ = found.uniform
