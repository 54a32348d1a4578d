"""Learned widths: the budget is met, multipliers do what they say, training resumes bit for bit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bipdeploy import api
from bipdeploy.comparing import cells
from bipdeploy.errors import InputError, StageError
from bipdeploy.model import cost, sources
from bipdeploy.model.checkpoint import Checkpoint, CheckpointWriter
from bipdeploy.model.cost import Cost
from bipdeploy.model.families import Heads
from bipdeploy.model.formats import pruned_config
from bipdeploy.model.loading import load_model
from bipdeploy.pipeline.keys import stage_keys
from bipdeploy.planning import footprint, outlook
from bipdeploy.planning.latency import Curve, Phase, Table
from bipdeploy.planning.resolved import resolve, resolved_at
from bipdeploy.pruning import projection
from bipdeploy.pruning.allocation import part_widths
from bipdeploy.pruning.kept import BlockScores, keep
from bipdeploy.pruning.projection import Budget, Part
from bipdeploy.pruning.slicing import scale_columns, slice_block
from bipdeploy.recipe import file
from bipdeploy.recipe.prune import LearnedSection, PruneSection
from bipdeploy.running import artifacts
from bipdeploy.running.reporter import Reporter, Silent
from bipdeploy.stages.learned import MULTIPLIER, STANDING, Learner, Task, read_windows
from bipdeploy.tuning import checkpoints, losses
from bipdeploy.tuning.data import Windows, hold_back
from bipdeploy.tuning.multipliers import Multiplied, columns, straight_through
from tests.running import SMOKE, bipdeploy_here, refused
from tests.sliced import (
    CPU,
    architecture_of,
    draw_kept,
    loaded,
    logits,
    short_calibration,
    token_windows,
    widths_of,
)
from tests.tiny import VARIANTS, tiny_model

SHORT = ["prune.layers=learned", "prune.round_to=8", "prune.learned.steps=6",
         "prune.learned.batch=4", "prune.learned.accumulation=2", "prune.learned.held_back=4"]


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """Two KV heads with three query heads each."""
    return tiny_model(tmp_path_factory.mktemp("grouped") / "model", heads=6, kv_heads=2,
                      hidden_size=48, head_dim=8)


def budget(folder, spent: Cost, share: float, **settings) -> Budget:
    arch = architecture_of(folder)
    section = PruneSection(ratio=0.01, layers="learned", round_to=8, **settings)
    least = sum(min(spent.part(i, part, w) for w in part_widths(arch, section)(i, part))
                for i in range(len(arch.blocks)) for part in ("heads", "ffn")) + spent.rest
    whole = spent.whole(arch.blocks)
    return Budget(arch, part_widths(arch, section), spent, least + (whole - least) * share)


def drawn(asked: Budget, single: bool, seed: int = 0) -> dict[Part, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    arch, found = asked.arch, {}
    for part in asked.parts():
        w = arch.blocks[part.block]
        shape = ((w.kv_heads, w.group if single else 1) if part.part == "heads" else
                 (w.intermediate,))
        found[part] = torch.rand(shape, generator=generator) * asked.dense_cost(part)
    return found


# The projection

@pytest.mark.parametrize("heads", ["kv", "query", "both", False])
@pytest.mark.parametrize("unit", ["parameters", "memory", "flops"])
def test_a_budget_is_met_and_nothing_more_would_fit(grouped, heads, unit):
    arch = architecture_of(grouped)
    spent = {"parameters": cost.parameters(arch), "memory": cost.memory(arch, 2, 4096),
             "flops": cost.flops(arch, 250)}[unit]
    for share in (0.0, 0.21, 0.5, 0.77, 0.99):
        asked = budget(grouped, spent, share, heads=heads)
        values = drawn(asked, heads in ("query", "both"), seed=int(100 * share))
        widths, masks = projection.project(values, asked)
        room = asked.limit - spent.whole(widths)
        assert room >= 0
        for part, own in masks.items():
            now = widths[part.block].of(part.part)
            more = [spent.part(*part, w) - spent.part(*part, now)
                    for w in asked.choices(*part) if projection._size(w) > projection._size(now)]
            assert all(step <= 0 or step > room for step in more)
            if isinstance(now, Heads):
                assert int(own.any(1).sum()) == now.kv
                assert set(own.sum(1).tolist()) <= {0.0, float(min(now.queries, own.shape[1]))}
            else:
                assert now % 8 == 0 and int(own.sum()) == now


@pytest.mark.parametrize("heads", ["kv", "both"])
def test_the_best_groups_stay_as_scores_would_have_them(grouped, heads):
    asked = budget(grouped, cost.parameters(architecture_of(grouped)), 0.5, heads=heads)
    values = drawn(asked, heads == "both")
    widths, masks = projection.project(values, asked)
    expected = [keep(BlockScores(values[Part(i, "heads")].sum(1).tolist(),
                                 values[Part(i, "ffn")].tolist(),
                                 values[Part(i, "heads")].flatten().tolist()
                                 if heads == "both" else ()), w) for i, w in enumerate(widths)]
    assert projection.kept(asked.arch, widths, masks) == expected


def test_of_values_that_differ_the_higher_stay(tiny):
    """Blocks whose groups are worth ten times as much keep more of them."""
    asked = budget(tiny, cost.parameters(architecture_of(tiny)), 0.5)
    values = {part: own * (10 if part.block == 1 else 1)
              for part, own in drawn(asked, False).items()}
    widths, _ = projection.project(values, asked)
    assert widths[1].intermediate > max(widths[0].intermediate, widths[2].intermediate)


def test_protected_blocks_have_no_choice_and_keep_all(tiny):
    asked = budget(tiny, cost.parameters(architecture_of(tiny)), 0.5, protect={"first": 1})
    assert {part.block for part in asked.parts()} == {1, 2}
    widths, masks = projection.project(drawn(asked, False), asked)
    assert widths[0] == asked.arch.blocks[0]
    assert projection.kept(asked.arch, widths, masks)[0].channels == tuple(range(96))


def test_places_are_ranks_within_a_kind_and_ties_keep_the_lower_index():
    scores = [BlockScores([5.0, 1.0], [1.0, 1.0, 9.0]), BlockScores([2.0, 2.0], [4.0, 2.0, 0.5])]
    parts = [Part(i, part) for i in range(2) for part in ("heads", "ffn")]
    found = projection.places(scores, parts, comparable=True, single=False)
    ranks = {part: (own.flatten() * (4 if part.part == "heads" else 6) - 0.5).round().tolist()
             for part, own in found.items()}
    assert ranks == {parts[0]: [3, 0], parts[1]: [2, 1, 5], parts[2]: [2, 1], parts[3]: [4, 3, 0]}
    apart = projection.places([BlockScores([1.0, 2.0], [1.0, 2.0]),
                               BlockScores([10.0, 20.0], [10.0, 20.0])], parts, comparable=False,
                              single=False)
    assert (apart[parts[1]] - apart[parts[3]]).abs().max() < 0.3  # alike but for the tie


# The multipliers

def test_multipliers_of_1_are_the_dense_model_bit_for_bit(variant):
    arch, ids = architecture_of(variant), token_windows(2, 16)
    expected = logits(loaded(variant), ids)
    model = Multiplied(loaded(variant), arch)
    ones = {(i, part): torch.ones(shape) for i, w in enumerate(arch.blocks)
            for part, shape in (("heads", (w.kv_heads, 1)), ("ffn", (w.intermediate,)))}
    with model.by(ones) as own:
        assert torch.equal(logits(own, ids), expected)
    assert torch.equal(logits(model.model, ids), expected)
    with torch.no_grad():
        assert float(model.divergence(ids, ones)) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("name", "queries"), [
    *((name, None) for name in VARIANTS), ("llama-gqa", 1), ("qwen2-gqa", 1), ("qwen3-gqa", 1)])
def test_what_is_written_is_the_model_that_was_multiplied_and_masked(tmp_path, name, queries):
    dense = tiny_model(tmp_path / "dense", **VARIANTS[name])
    arch, ids = architecture_of(dense), token_windows(2, 16)
    groups = arch.blocks[0].kv_heads // 2
    kept = draw_kept(arch, [(groups, 40, *([queries] if queries else []))] * 3)
    torch.manual_seed(0)
    used, by_block = {}, []
    for i, (w, own) in enumerate(zip(arch.blocks, kept, strict=True)):
        every = {"heads": torch.rand(w.kv_heads, w.group if queries else 1) * 2,
                 "ffn": torch.rand(w.intermediate) * 2}
        by_block.append({part: columns(m, arch, i) for part, m in every.items()})
        heads, ffn = torch.zeros(w.heads), torch.zeros(w.intermediate)
        heads[list(own.query_heads(w.group))] = 1
        ffn[list(own.channels)] = 1
        used |= {(i, "heads"): every["heads"].expand(-1, w.group) * heads.view(w.kv_heads, -1),
                 (i, "ffn"): every["ffn"] * ffn}
    with Multiplied(loaded(dense), arch).by(used) as model:
        expected = logits(model, ids)
    source = Checkpoint(dense)
    with CheckpointWriter(tmp_path / "small", pruned_config(
            source.config, arch, widths_of(arch, kept)), dense) as writer:
        writer.add(source.tensors(source.outside_blocks()))
        for i, own in enumerate(kept):
            scaled = scale_columns(source.block(i), arch, by_block[i])
            writer.add(slice_block(scaled, arch, i, own), f"model.layers.{i}.")
    found = logits(loaded(tmp_path / "small"), ids)
    assert (found - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))


def test_standings_get_the_gradient_of_the_mask_where_it_is_0_too():
    multipliers = torch.tensor([2.0, 3.0, 0.5], requires_grad=True)
    standings, mask = torch.zeros(3, requires_grad=True), torch.tensor([1.0, 0.0, 1.0])
    used = straight_through(multipliers, standings, mask)
    assert used.tolist() == [2.0, 0.0, 0.5]
    (used * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert standings.grad.tolist() == [2.0, 30.0, 50.0]
    assert multipliers.grad.tolist() == [1.0, 0.0, 100.0]


# Training

def learner(folder, place, **settings) -> Learner:
    section = LearnedSection(**{"steps": 8, "batch": 4, "accumulation": 2, "held_back": 4,
                                "learning_rate": 0.05, **settings})
    asked = budget(folder, cost.parameters(architecture_of(folder)), 0.5)
    scores = [BlockScores(torch.rand(w.kv_heads).tolist(), torch.rand(w.intermediate).tolist())
              for w in asked.arch.blocks]
    places = projection.places(scores, list(asked.parts()), comparable=True, single=False)
    ids = token_windows(14, 16)
    task = Task(section, 0, asked, places, Windows(ids[4:], ids[4:]), Windows(ids[:4], ids[:4]),
                place, "one")
    model = load_model(folder, torch.float32, CPU).requires_grad_(False)
    return Learner(task, Multiplied(model, asked.arch), CPU)


class Killed(Exception):
    pass


class Killing(Silent):
    """Ends a training before the step of a number."""

    def __init__(self, steps: int):
        super().__init__()
        self.left = steps

    def advance(self, steps: int = 1) -> None:
        self.left -= steps
        if self.left < 0:
            raise Killed


@pytest.mark.parametrize("after", [1, 4, 7])
def test_a_training_that_was_killed_goes_on_to_the_same_bits(tiny, tmp_path, monkeypatch, after):
    monkeypatch.setattr("bipdeploy.stages.learned.SAVED_EVERY", 2)
    torch.manual_seed(0)
    whole = learner(tiny, tmp_path / "whole").run(Silent())
    with pytest.raises(Killed):
        torch.manual_seed(0)
        learner(tiny, tmp_path / "killed").run(Killing(after))
    torch.manual_seed(0)
    reporter = Silent()
    again = learner(tiny, tmp_path / "killed")
    assert again.state.step == (after + 1) // 2 * 2
    state = again.run(reporter)
    assert reporter.notes == [f"goes on from step {(after + 1) // 2 * 2} of a run that was "
                              "interrupted"]
    assert state.history == whole.history and state.tokens == whole.tokens == 8 * 4 * 16
    saved = [checkpoints.load(tmp_path / place) for place in ("whole", "killed")]
    for part in ("values", "best", "first", "second"):
        one, two = (getattr(own, part) for own in saved)
        assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_a_stage_that_was_stopped_goes_on_and_writes_the_same_model(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("bipdeploy.stages.learned.SAVED_EVERY", 1)
    base = [*short_calibration(tmp_path), "score.criterion=magnitude"]
    scores = api.score(str(tiny), tmp_path / "scores", base)

    def pruned(name: str, *more: str, reporter: Reporter | None = None) -> Path:
        return api.prune(str(tiny), scores, tmp_path / name, 0.4, [*base, *SHORT, *more], reporter)

    whole, place = pruned("whole"), artifacts.checkpoint_folder(tmp_path / "stopped")
    with pytest.raises(StageError):
        pruned("stopped", reporter=Killing(3))
    assert artifacts.read_json(place / "state.json")["step"] == 4
    kept = shutil.copytree(place, tmp_path / "copy")
    reporter = Silent()
    again = pruned("stopped", reporter=reporter)
    assert reporter.notes == ["goes on from step 4 of a run that was interrupted"]
    assert not place.exists()
    assert artifacts.file_hashes(again / "model") == artifacts.file_hashes(whole / "model")
    kept.rename(artifacts.checkpoint_folder(tmp_path / "other"))
    pruned("other", "prune.learned.learning_rate=0.01", reporter=reporter)
    assert reporter.notes[1:] == ["the checkpoint of an earlier run is not used: it is of another "
                                  "recipe, model, text or version"]


def test_how_a_step_is_split_changes_rounding_only_and_weights_stay(tiny, tmp_path):
    dense = {n: p.clone() for n, p in loaded(tiny).named_parameters()}
    found = []
    for parts in (1, 4):
        torch.manual_seed(0)
        own = learner(tiny, tmp_path / str(parts), accumulation=parts, steps=2)
        own.run(Silent())
        found.append(own.trained)
        assert all(torch.equal(p, dense[n]) for n, p in own.model.model.named_parameters())
    assert max(float((a - found[1][n]).abs().max().detach()) for n, a in found[0].items()) < 1e-3
    assert all(float(own.min().detach()) >= 0 for name, own in found[0].items()
               if name.endswith(MULTIPLIER))
    assert any(float(own.abs().max().detach()) > 0 for name, own in found[0].items()
               if name.endswith(STANDING))


def test_the_built_in_model_comes_nearer_to_the_dense_one_and_through_all_stages(tmp_path):
    settings = [*SHORT, "calibration.samples=32", "score.criterion=wanda_sp", "model.device=cpu",
                "recover.refit.ridge=0.1", "evaluate.perplexity.max_tokens=2000",
                "evaluate.perplexity.windows=[128]"]
    options = [part for s in settings for part in ("--set", s)]
    for words in (["score", "builtin:pico", "--out", tmp_path / "scores"],
                  ["prune", "builtin:pico", tmp_path / "scores", "--out", tmp_path / "pruned",
                   "--ratio", "0.3"],
                  ["recover", "builtin:pico", tmp_path / "pruned", "--out", tmp_path / "repaired"],
                  ["evaluate", "builtin:pico", tmp_path / "repaired", "--out", tmp_path / "e"]):
        done = bipdeploy_here(*words, *options)
        assert done.returncode == 0, done.stderr
    record = artifacts.read_json(tmp_path / "pruned" / "kept.json")["learned"]
    assert record["divergence"]["after"] < 0.9 * record["divergence"]["before"]
    assert record["steps"] == 6 and record["tokens"] == 6 * 4 * 128
    asked, met = record["budget"]["asked"], record["budget"]["met"]
    arch = architecture_of(tmp_path / "pruned" / "model")
    assert met == sum(map(arch.block_parameters, range(7)))
    assert asked - 8 * arch.channel_parameters() < met <= asked
    assert 1 < artifacts.figures([tmp_path / "e"])["perplexity.ratio"] < 3
    assert not list(tmp_path.glob(".*"))  # no checkpoint is left


def test_a_target_is_met_in_its_own_unit_and_what_is_written_is_what_was_learned(grouped, tmp_path):
    base = [*short_calibration(tmp_path), "score.criterion=magnitude"]
    settings = [*base, *SHORT, "prune.heads=both",
                "prune.target={memory: 1.72MB, context: 64, batch: 1}"]
    scores = api.score(str(grouped), tmp_path / "scores", base)
    out = api.prune(str(grouped), scores, tmp_path / "pruned", None, settings)
    record = artifacts.read_json(out / "kept.json")
    found = record["learned"]["budget"]
    assert found["unit"] == "bytes" and found["met"] == record["target"]["spent"]
    arch = architecture_of(out / "model")
    step = 8 * 4 * arch.channel_parameters()
    assert found["asked"] - step < found["met"] <= found["asked"] == record["target"]["limit"]
    own = resolved_at(file.build({"name": "x", "model": {"id": str(grouped)},
                                  "prune": {"ratio": None}}, "here", settings), grouped)
    windows, _ = read_windows(own.recipe, grouped)
    _, held = hold_back(windows, 4, 0)
    written, dense = (logits(loaded(folder), held.ids) for folder in (out / "model", grouped))
    assert float(losses.divergence(written, dense, 1.0)) / held.ids.numel() == pytest.approx(
        record["learned"]["divergence"]["after"], rel=1e-4)


def test_a_stage_of_its_own_spends_seconds_that_it_measures_first(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    phase = Phase(Curve((1, 2), (2e-4, 3e-4)), Curve((8, 96), (1e-4, 9e-4)), 1e-3, {}, {})
    monkeypatch.setattr("bipdeploy.measuring.profile.obtain", lambda key, *_: Table(
        key, {"prefill": phase, "decode": phase}, 7, 9, 1.0, {}))
    base = [*short_calibration(tmp_path), "score.criterion=magnitude"]
    scores = api.score(str(tiny), tmp_path / "scores", base)
    out = api.prune(str(tiny), scores, tmp_path / "pruned", None, [
        *base, *SHORT, "prune.target={prefill_speedup: 1.3, context: 32, batch: 1}"])
    record = artifacts.read_json(out / "kept.json")
    found = record["learned"]["budget"]
    assert found["unit"] == "seconds" and found["met"] == record["target"]["spent"]
    assert found["met"] <= found["asked"] == record["target"]["limit"]


# What depends on it, and what is refused

def recipe(*settings: str):
    return file.load(SMOKE, ["prune.layers=learned", *settings])


@pytest.mark.parametrize(("settings", "words"), [
    (["prune.depth.ffn=1"], ["layers: learned", "depth"]),
    (["prune.learned.batch=6", "prune.learned.accumulation=4"], ["batch 6", "accumulation 4"]),
    (["prune.learned.tokens=512"], ["prune.learned.tokens", "512", "256"])])
def test_what_cannot_be_is_refused_before_the_first_stage(settings, words):
    options = [part for s in ["prune.layers=learned", *settings] for part in ("--set", s)]
    done = bipdeploy_here("check", SMOKE, *options)
    assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr


def test_a_text_that_is_too_short_is_refused_before_scoring(tmp_path):
    settings = ["prune.layers=learned", "prune.learned.held_back=4000"]
    done = bipdeploy_here("run", SMOKE, "--runs", tmp_path,
                          *(part for s in settings for part in ("--set", s)))
    refused(done, 2, "prune.learned", "windows", "4000")
    assert not list((tmp_path / "smoke").glob("score"))


def test_learned_widths_depend_on_their_settings_and_text_and_on_no_repair():
    def key(*settings: str) -> str:
        own = recipe(*settings)
        return stage_keys(resolved_at(own, sources.dense_folder(own.model)))["prune"]

    base = key()
    assert base == key("recover.method=none") == key("name=other")
    for change in ("prune.learned.steps=7", "seed=3", "calibration.samples=9"):
        assert key(change) != base


def test_a_comparison_s_cell_depends_on_how_it_is_learned():
    def keys(method: str, *settings: str) -> list[str]:
        wanted = cells.plan(file.load(SMOKE, [f"compare.methods=[{method}]",
                                              "compare.ratios=[0.3]", "compare.repairs=[refit]",
                                              *settings]))
        return [cells.key(wanted, cell) for cell in wanted.cells]

    change = "prune.learned.steps=7"
    assert keys("llm_bip@learned") != keys("llm_bip@learned", change)
    assert keys("llm_bip") == keys("llm_bip", change)


def test_a_plan_s_time_and_memory_grow_with_what_is_trained():
    def prune(*settings: str) -> footprint.Stage:
        resolved = resolve(recipe(*settings))
        sized = footprint.sizes(resolved, resolved.exported(resolved.uniform))
        return footprint.stages(sized, {"flops": 1e12, "bandwidth": 1e11})["prune"]

    base, more = prune(), prune("prune.learned.steps=4000", "prune.learned.accumulation=1")
    assert more.seconds > 5 * base.seconds and more.memory > base.memory
    assert "prune.learned.steps" in outlook.cheaper("prune", recipe())


def test_too_small_a_budget_is_refused(tiny):
    asked = budget(tiny, cost.parameters(architecture_of(tiny)), 0.0)
    with pytest.raises(ValueError, match="below what the smallest"):
        projection.project(drawn(asked, False), replace(asked, limit=asked.limit - 1))
    with pytest.raises(InputError, match=r"prune\.ratio"):
        part_widths(asked.arch, PruneSection(ratio=0.99, layers="learned", round_to=8))
