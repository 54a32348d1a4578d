"""Refit: the closed form equals a general solver, and repair never makes a block worse."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bipdeploy import api
from bipdeploy.data import text
from bipdeploy.data.calibration import calibration_batches
from bipdeploy.model.blocks import Block, BlockWalker
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.pruning.refit import RidgeProblem
from bipdeploy.recipe import file as recipe_file
from bipdeploy.recipe.model import ModelSection
from bipdeploy.recipe.recover import RIDGES
from bipdeploy.running.artifacts import read_json
from bipdeploy.stages.recover import Errors, hold_back, refit_block
from tests.sliced import (
    architecture_of,
    draw_kept,
    loaded,
    results,
    short_calibration,
    token_windows,
    write_sliced,
)
from tests.tiny import tiny_model

TOKENS = 64
CHOICES = {"uniform": [(1, 48)] * 3, "per-block": [(1, 96), (2, 24), (1, 40)],
           "parts-removed": [(0, 40), (2, 0), (1, 96)]}


def problem(seed: int = 0, *, tokens: int = 200, inputs: int = 12, outputs: int = 5
            ) -> tuple[RidgeProblem, torch.Tensor, torch.Tensor]:
    """A random problem that has seen all tokens in three batches, and these: Z [N, K], R [N, D]."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, inputs, generator=generator)
    target = torch.randn(tokens, outputs, generator=generator)
    found = RidgeProblem(torch.randn(outputs, inputs, generator=generator))
    for batch, wanted in zip(z.tensor_split(3), target.tensor_split(3), strict=True):
        found.see(batch, wanted)
    return found, z.double(), target.double()


def squared_error(weight: torch.Tensor, z: torch.Tensor, target: torch.Tensor) -> float:
    return float((target - z @ weight.double().T).square().sum())


@pytest.mark.parametrize("seed", range(3))
def test_without_ridge_it_is_least_squares(seed):
    found, z, target = problem(seed)
    expected = torch.linalg.lstsq(z, target).solution.T
    torch.testing.assert_close(found.solve(0.0), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ridge", [1e-3, 0.01, 0.5, 10.0])
def test_with_ridge_it_is_augmented_least_squares(ridge):
    found, z, target = problem()
    weight = float((z.square().sum(0).mean() * ridge).sqrt())
    inputs = torch.cat([z, weight * torch.eye(z.shape[1], dtype=torch.float64)])
    outputs = torch.cat([target, weight * found.start_DK.double().T])
    expected = torch.linalg.lstsq(inputs, outputs).solution.T
    torch.testing.assert_close(found.solve(ridge), expected, rtol=1e-4, atol=1e-5)


def test_a_strong_ridge_falls_back_to_the_original_weights():
    found, _, _ = problem()
    start = found.start_DK.double()
    distances = [float((found.solve(ridge) - start).norm()) for ridge in (0.0, 0.1, 1.0, 1e6)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-5 * distances[0]


def test_the_error_from_sums_is_the_error_on_the_tokens():
    found, z, target = problem()
    other = torch.randn(found.start_DK.shape, generator=torch.Generator().manual_seed(9))
    assert found.before == pytest.approx(squared_error(found.start_DK, z, target), rel=1e-5)
    for weight in (found.start_DK, other, found.solve(0.0), found.solve(0.1)):
        assert found.error(weight) == pytest.approx(squared_error(weight, z, target), rel=1e-5)


@pytest.mark.parametrize("tokens", [4, 12, 200])
@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
def test_the_error_never_grows(tokens, ridge):
    for seed in range(5):
        found, z, target = problem(seed, tokens=tokens)
        after = squared_error(found.solve(ridge), z, target)
        assert after <= squared_error(found.start_DK, z, target)


def test_weights_that_fit_already_stay():
    found, z, _ = problem()
    fitting = RidgeProblem(found.start_DK)
    fitting.see(z.float(), z.float() @ found.start_DK.T)
    torch.testing.assert_close(fitting.solve(0.01), found.start_DK.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_inputs_that_are_always_zero_keep_their_weights(ridge):
    found, z, target = problem()
    z = z.float()
    z[:, 3] = 0
    dead = RidgeProblem(found.start_DK)
    dead.see(z, target.float())
    solved = dead.solve(ridge)
    assert bool(solved.isfinite().all())
    torch.testing.assert_close(solved[:, 3], found.start_DK[:, 3].double())


def test_batches_of_windows_are_flattened():
    found, z, target = problem(tokens=24)
    shaped = RidgeProblem(found.start_DK)
    shaped.see(z.float().view(2, 12, -1), target.float().view(2, 12, -1))
    torch.testing.assert_close(shaped.solve(0.01), found.solve(0.01), rtol=1e-4, atol=1e-5)


def walkers(source: Path, sliced: Path) -> tuple[BlockWalker, BlockWalker]:
    dense, pruned = (BlockWalker(folder, ModelSection(id=str(folder), device="cpu"))
                     for folder in (source, sliced))
    return dense, pruned


def windows() -> list[torch.Tensor]:
    return list(token_windows(8, TOKENS).split(3))


def relative_error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    a, b = torch.cat(found).double(), torch.cat(wanted).double()
    return float((a - b).square().sum() / b.square().sum())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ridge", [0.0, 0.01])
@pytest.mark.parametrize("choice", CHOICES)
@torch.no_grad()
def test_a_refit_never_raises_the_error_of_a_block(variant, tmp_path, choice, ridge, stored):
    kept = draw_kept(architecture_of(variant), CHOICES[choice], seed=4)
    dense, pruned = walkers(variant, write_sliced(variant, tmp_path / "sliced", kept))
    x_dense, x_pruned = dense.embed(windows()), pruned.embed(windows())
    repaired = 0
    for index in range(len(dense)):
        whole, block = dense.block(index, TOKENS), pruned.block(index, TOKENS)
        y_dense, y_before = [whole(x) for x in x_dense], [block(x) for x in x_pruned]
        x_dense, y_after, record = refit_block(
            partial(dense.block, index, TOKENS), block, x_dense, x_pruned, ridge, stored)
        assert relative_error(x_dense, y_dense) < 1e-10
        assert relative_error(y_after, [block(x) for x in x_pruned]) < 1e-10
        before, after = relative_error(y_before, y_dense), relative_error(y_after, y_dense)
        shown = {name: value for name, value in record.items() if "median" not in name}
        assert shown == pytest.approx({"error_before": before, "error_after": after}, rel=1e-3,
                                      abs=1e-9)
        assert after <= before * (1 + 1e-6)
        repaired += after < 0.9 * before
        x_pruned = y_after
    assert repaired


def least_squares(inputs: list[torch.Tensor], wanted: list[torch.Tensor]) -> torch.Tensor:
    z, target = (torch.cat(batches).flatten(0, 1).double() for batches in (inputs, wanted))
    return torch.linalg.lstsq(z, target).solution.T.float()


def refit_by_brute_force(whole: Block, block: Block, x_dense: list[torch.Tensor],
                         x_pruned: list[torch.Tensor]) -> None:
    """Two general least-squares problems, one after the other: first o_proj, then down_proj."""
    u_dense = [whole.attention(x).u for x in x_dense]
    y_dense = [whole(x) for x in x_dense]
    bias = 0.0 if block.output.bias is None else block.output.bias
    block.output.weight.data = least_squares(
        [block.attention(x).z for x in x_pruned],
        [u - x - bias for u, x in zip(u_dense, x_pruned, strict=True)])
    u_pruned = [block.attention(x).u for x in x_pruned]
    bias = 0.0 if block.down.bias is None else block.down.bias
    hidden = [gate * up for gate, up in map(block.ffn_parts, u_pruned)]
    block.down.weight.data = least_squares(
        hidden, [y - u - bias for y, u in zip(y_dense, u_pruned, strict=True)])


@torch.no_grad()
def test_a_refit_equals_two_steps_of_least_squares(variant, tmp_path):
    kept = draw_kept(architecture_of(variant), [(1, 40), (1, 56), (1, 48)], seed=2)
    dense, pruned = walkers(variant, write_sliced(variant, tmp_path / "sliced", kept))
    x_dense, x_pruned = dense.embed(windows()), pruned.embed(windows())
    for index in range(len(dense)):
        whole, block = dense.block(index, TOKENS), pruned.block(index, TOKENS)
        other = pruned.block(index, TOKENS)
        refit_by_brute_force(whole, other, x_dense, x_pruned)
        wanted = [other(x) for x in x_pruned]
        x_dense, x_pruned, _ = refit_block(
            partial(dense.block, index, TOKENS), block, x_dense, x_pruned, 0.0, torch.float32)
        assert relative_error(x_pruned, wanted) < 1e-6
        torch.testing.assert_close(block.output.weight, other.output.weight, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(block.down.weight, other.down.weight, rtol=1e-2, atol=1e-3)


def test_massive_activations_do_not_hide_an_error():
    """One coordinate of 64 holds all but a millionth of the energy, and is exact."""
    y = torch.randn(2, 100, 64, generator=torch.Generator().manual_seed(0))
    y[..., 7] = 1e4
    own = 0.5 * y
    own[..., 7] = 1e4
    errors = Errors()
    errors.see(y, own)
    errors.see_repaired(y, y)
    record = errors.record()
    assert record["error_before"] < 1e-6
    assert record["median_error_before"] == pytest.approx(0.25)
    assert record["error_after"] == record["median_error_after"] == 0
    assert not errors.rose


@torch.no_grad()
def test_a_block_of_which_nothing_was_removed_stays(tiny):
    dense, same = walkers(tiny, tiny)
    x = dense.embed(windows())
    block = same.block(0, TOKENS)
    before = {name: p.clone() for name, p in block.layer.named_parameters()}
    _, y, record = refit_block(partial(dense.block, 0, TOKENS), block, x, x, 0.01, torch.float32)
    assert record["error_after"] <= record["error_before"] < 1e-10
    assert relative_error(y, [dense.block(0, TOKENS)(part) for part in x]) < 1e-10
    for name, parameter in block.layer.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_type_too_coarse_to_repair_in_keeps_the_weights(tiny):
    """float8 weights are worse than those that are exact already."""
    dense, same = walkers(tiny, tiny)
    x, block = dense.embed(windows()), same.block(0, TOKENS)
    before = {name: p.clone() for name, p in block.layer.named_parameters()}
    _, y, record = refit_block(partial(dense.block, 0, TOKENS), block, x, x, 0.01,
                               torch.float8_e4m3fn)
    assert record["error_after"] <= record["error_before"]
    assert all(torch.equal(p, before[name]) for name, p in block.layer.named_parameters())
    assert relative_error(y, [block(part) for part in x]) == 0


def last_hidden(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return loaded(folder).model(ids).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recovering_a_model_brings_it_nearer_to_the_dense_one(tmp_path, dtype):
    source = tiny_model(tmp_path / "model", dtype=dtype)
    settings = short_calibration(tmp_path)
    scores = api.score(str(source), tmp_path / "score", settings)
    pruned = api.prune(str(source), scores, tmp_path / "prune", 0.3,
                       ["prune.round_to=8", "prune.layers=global"])
    first, second = (api.recover(str(source), pruned, tmp_path / name, settings)
                     for name in ("one", "two"))
    assert results(first) == results(second)

    blocks = read_json(first / "recover.json")["blocks"]
    assert [entry["block"] for entry in blocks] == [0, 1, 2]
    for entry in blocks:
        assert entry["error_after"] <= entry["error_before"]

    other_windows = torch.cat(calibration_windows([*settings, "seed=1"], source))
    assert not torch.equal(other_windows, torch.cat(calibration_windows(settings, source)))
    dense = last_hidden(source, other_windows)
    before, after = (relative_error([last_hidden(folder / "model", other_windows)], [dense])
                     for folder in (pruned, first))
    assert after < 0.9 * before

    sliced, repaired = (load_file(folder / "model" / "model.safetensors")
                        for folder in (pruned, first))
    assert sliced.keys() == repaired.keys()
    for name, tensor in sliced.items():
        assert repaired[name].dtype == tensor.dtype == dtype
        if not name.endswith(("o_proj.weight", "down_proj.weight")):
            assert torch.equal(tensor, repaired[name])
    assert Checkpoint(first / "model").config == Checkpoint(pruned / "model").config


def calibration_windows(settings: list[str], model: Path) -> list[torch.Tensor]:
    recipe = recipe_file.build({"name": "test", "model": {"id": str(model)},
                                "prune": {"ratio": 0.3}}, "--set", settings)
    return calibration_batches(recipe, model, 256)[0]


def test_the_last_error_of_the_record_is_that_of_the_loaded_model(tiny, tmp_path):
    settings = short_calibration(tmp_path)
    pruned = api.prune(str(tiny), api.score(str(tiny), tmp_path / "score", settings),
                       tmp_path / "prune", 0.3, ["prune.round_to=8"])
    folder = api.recover(str(tiny), pruned, tmp_path / "recover", settings)
    ids = torch.cat(calibration_windows(settings, tiny))
    outputs = []
    for model in (loaded(tiny), loaded(folder / "model")):
        model.model.layers[-1].register_forward_hook(
            lambda _, __, output: outputs.append(output))
        with torch.no_grad():
            model(ids)
    last = read_json(folder / "recover.json")["blocks"][-1]
    assert relative_error([outputs[1]], [outputs[0]]) == pytest.approx(last["error_after"],
                                                                       rel=1e-3)


# ridge: auto

def test_the_last_eighth_of_the_windows_is_held_back():
    for count, batch, held in ((16, 4, 2), (20, 8, 3), (9, 3, 2), (2, 16, 1)):
        drawn = token_windows(count, TOKENS)
        batches, number = hold_back(list(drawn.split(batch)))
        assert torch.equal(torch.cat(batches), drawn)
        assert torch.equal(torch.cat(batches[-number:]), drawn[-held:])
        assert max(map(len, batches)) <= batch


@torch.no_grad()
def test_auto_takes_the_ridge_that_fits_the_held_back_windows_best(variant, tmp_path):
    """By brute force: weights fitted to the other windows, their error on the held-back ones."""
    kept = draw_kept(architecture_of(variant), [(1, 40), (2, 56), (1, 48)], seed=2)
    dense, pruned = walkers(variant, write_sliced(variant, tmp_path / "sliced", kept))
    batches, held = hold_back(list(token_windows(8, 16).split(3)))
    x_dense, x_pruned = dense.embed(batches), pruned.embed(batches)
    for index in range(len(dense)):
        whole, block = dense.block(index, 16), pruned.block(index, 16)
        start = block.output.weight.data.clone()
        z = [block.attention(x).z.flatten(0, 1).double() for x in x_pruned]
        bias = 0.0 if block.output.bias is None else block.output.bias.double()
        wanted = [(whole.attention(a).u - b).flatten(0, 1).double() - bias
                  for a, b in zip(x_dense, x_pruned, strict=True)]
        inputs, outputs = torch.cat(z[:-held]), torch.cat(wanted[:-held])
        errors = {}
        for ridge in RIDGES:
            weight = float((inputs.square().sum(0).mean() * ridge).sqrt())
            eye = weight * torch.eye(inputs.shape[1], dtype=torch.float64)
            solved = torch.linalg.lstsq(
                torch.cat([inputs, eye]),
                torch.cat([outputs, weight * start.double().T])).solution
            errors[ridge] = float((torch.cat(z[-held:]) @ solved
                                   - torch.cat(wanted[-held:])).square().sum())
        x_dense, x_pruned, record = refit_block(
            partial(dense.block, index, 16), block, x_dense, x_pruned, "auto", torch.float32, held)
        assert record["ridge_attention"] == min(errors, key=lambda ridge: errors[ridge])
        assert record["ridge_ffn"] in RIDGES


def test_problems_that_saw_different_tokens_add_up():
    found, z, target = problem()
    parts = [RidgeProblem(found.start_DK) for _ in range(2)]
    for part, rows in zip(parts, (slice(0, 170), slice(170, None)), strict=True):
        part.see(z[rows].float(), target[rows].float())
    parts[0].absorb(parts[1])
    for ridge in (0.0, 0.1):
        torch.testing.assert_close(parts[0].solve(ridge), found.solve(ridge), rtol=1e-4, atol=1e-5)
    assert parts[0].before == pytest.approx(found.before)


def test_auto_reads_no_test_text_and_records_what_it_chose(tiny, tmp_path, monkeypatch):
    settings = [*short_calibration(tmp_path), "evaluate.perplexity.data=builtin:pydocs"]
    pruned = api.prune(str(tiny), api.score(str(tiny), tmp_path / "score", settings),
                       tmp_path / "prune", 0.3, ["prune.round_to=8"])
    read, original = [], text.read
    monkeypatch.setattr(text, "read", lambda *a: read.append(a[:2]) or original(*a))
    folders = [api.recover(str(tiny), pruned, tmp_path / name,
                           [*settings, f"recover.refit.ridge={ridge}"])
               for name, ridge in (("auto", "auto"), ("fixed", 0.01))]
    assert read == [(str(tmp_path / "words.txt"), "calibration")] * 2
    auto, fixed = (read_json(folder / "recover.json") for folder in folders)
    assert (auto["ridge"], fixed["ridge"]) == ("auto", 0.01)
    for entry in auto["blocks"]:
        assert {entry["ridge_attention"], entry["ridge_ffn"]} <= set(RIDGES)
    assert "ridge_ffn" not in fixed["blocks"][0]
    assert auto["calibration"] == fixed["calibration"]


def test_method_none_leaves_the_sliced_model(tiny, tmp_path):
    settings = short_calibration(tmp_path)
    pruned = api.prune(str(tiny), api.score(str(tiny), tmp_path / "score", settings),
                       tmp_path / "prune", 0.3, ["prune.round_to=8"])
    folder = api.recover(str(tiny), pruned, tmp_path / "recover",
                         [*settings, "recover.method=none"])
    assert results(folder).keys() == {"recover.json"}
    assert read_json(folder / "recover.json") == {"method": "none"}
