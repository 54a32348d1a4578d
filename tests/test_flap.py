"""FLAP: its metrics and its bias are what they are defined as, and the bias keeps the mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bipdeploy import api
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.model.families import OUTPUT_BIAS, architecture
from bipdeploy.model.formats import biased_config
from bipdeploy.pruning.allocation import allocate
from bipdeploy.pruning.criteria.flap import standardised
from bipdeploy.pruning.criteria.statistics import Statistics
from bipdeploy.pruning.kept import BlockScores
from bipdeploy.recipe.model import ModelSection
from bipdeploy.recipe.prune import PruneSection
from bipdeploy.running.artifacts import figures
from bipdeploy.stages.recover import bias_block
from tests.sliced import (
    architecture_of,
    draw_kept,
    loaded,
    logits,
    short_calibration,
    token_windows,
    write_sliced,
)
from tests.test_criteria import TOKENS, group_columns, inputs_of, scores_of, windows
from tests.test_families import assert_counts_match
from tests.tiny import VARIANTS, tiny_model

METRICS = {
    "flap": lambda w, x: x.var(0) * w.square().sum(0),
    "flap_ifv": lambda _, x: x.var(0),
    "flap_wifn": lambda w, x: w.abs().mean(0) * x.norm(dim=0),
}
CHOICES = {"uniform": [(1, 48)] * 3, "per-block": [(1, 96), (2, 24), (1, 40)],
           "parts-removed": [(0, 40), (2, 0), (1, 96)]}


# Scores

@pytest.mark.parametrize("criterion", METRICS)
def test_scores_are_standardised_metrics_averaged_over_a_head(variant, criterion):
    checkpoint, arch, metric = Checkpoint(variant), architecture_of(variant), METRICS[criterion]
    inputs = zip(inputs_of(variant, "self_attn.o_proj"), inputs_of(variant, "mlp.down_proj"),
                 scores_of(variant, criterion), strict=True)
    for index, (z, h, found) in enumerate(inputs):
        tensors = {name: t.double() for name, t in checkpoint.block(index).items()}
        columns = metric(tensors["self_attn.o_proj.weight"], z).square()
        columns = (columns - columns.mean()) / columns.std()
        heads = torch.stack([columns[group_columns(arch, index, g)].mean()
                             for g in range(arch.blocks[index].kv_heads)])
        ffn = metric(tensors["mlp.down_proj.weight"], h)
        torch.testing.assert_close(found.heads, heads, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.ffn, (ffn - ffn.mean()) / ffn.std(), rtol=1e-4, atol=1e-4)


def test_a_variance_far_below_the_mean_is_exact():
    x = 1000 + torch.randn(3, 40, 6, generator=torch.Generator().manual_seed(0))
    statistics = Statistics(2, frozenset({"moments"}), 1e-6)
    for batch in x.split(1):
        statistics.see_attention(batch, batch)
        statistics.see_output(batch)
    torch.testing.assert_close(statistics.variance("z"), x.double().flatten(0, 1).var(0))


def test_values_that_do_not_differ_are_all_zero():
    for values in (torch.ones(4), torch.ones(1)):
        assert not standardised(values).any()


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.4])
def test_adaptive_widths_are_those_of_one_ranking_of_heads_and_channels(ratio):
    """FLAP's own rule (AL-AM): all that is above the score where the budget is met stays."""
    arch = architecture({"model_type": "llama", "hidden_size": 64, "intermediate_size": 160,
                         "num_attention_heads": 8, "num_key_value_heads": 8,
                         "num_hidden_layers": 6, "vocab_size": 100})
    draw = torch.Generator().manual_seed(1)
    scores = [BlockScores((torch.randn(8, generator=draw) / 2).tolist(),
                          torch.randn(160, generator=draw).tolist()) for _ in arch.blocks]
    asked = PruneSection.model_validate({"ratio": ratio, "layers": "adaptive", "round_to": 1})
    widths, kept = allocate(arch, asked, scores, comparable=True, one_scale=True)
    entries = sorted([(s, arch.kv_group_parameters(0), (i, "groups", n))
                      for i, b in enumerate(scores) for n, s in enumerate(b.heads)]
                     + [(s, arch.channel_parameters(), (i, "channels", n))
                        for i, b in enumerate(scores) for n, s in enumerate(b.ffn)])
    total = sum(arch.block_parameters(i) for i in range(6))
    gone, removed = set(), 0
    for _, weight, which in entries:
        if abs(ratio * total - removed - weight) >= abs(ratio * total - removed):
            break
        gone.add(which)
        removed += weight
    # The last head may leave or stay: channels then meet the budget more exactly than FLAP.
    found = {(i, field, n) for i, k in enumerate(kept) for field, count in
             (("groups", 8), ("channels", 160)) for n in set(range(count)) - set(getattr(k, field))}
    assert {w for w in found if w[1] == "groups"} == {w for w in gone if w[1] == "groups"}
    assert len(found ^ gone) <= arch.kv_group_parameters(0) / arch.channel_parameters()
    assert ratio < 0.3 or len({w.kv_heads for w in widths}) > 1


# The bias

@pytest.mark.parametrize("choice", CHOICES)
@torch.no_grad()
def test_the_bias_is_the_mean_output_of_what_was_removed(variant, tmp_path, choice):
    arch = architecture_of(variant)
    kept = draw_kept(arch, CHOICES[choice], seed=4)
    folders = (variant, write_sliced(variant, tmp_path / "sliced", kept))
    dense, pruned = (BlockWalker(f, ModelSection(id=str(f), device="cpu")) for f in folders)
    hidden = dense.embed(windows())
    inputs = {"self_attn.o_proj": inputs_of(variant, "self_attn.o_proj"),
              "mlp.down_proj": inputs_of(variant, "mlp.down_proj")}
    for index, choice_here in enumerate(kept):
        whole, block = dense.block(index, TOKENS), pruned.block(index, TOKENS)
        wanted = [whole(x) for x in hidden]
        hidden, added, _ = bias_block(whole, block, hidden)
        torch.testing.assert_close(torch.cat(hidden), torch.cat(wanted))
        width = arch.blocks[index].group * arch.head_dim
        staying = {"self_attn.o_proj": [g * width + i for g in choice_here.groups
                                        for i in range(width)],
                   "mlp.down_proj": list(choice_here.channels)}
        assert added.keys() == {f"{name}.bias" for name, columns in staying.items() if columns}
        for name, columns in staying.items():
            if not columns:
                continue
            weight = whole.layer.get_parameter(f"{name}.weight").double()
            x, gone = inputs[name][index], torch.ones(weight.shape[1], dtype=torch.bool)
            gone[columns] = False
            torch.testing.assert_close(added[f"{name}.bias"], weight[:, gone] @ x[:, gone].mean(0),
                                       rtol=1e-4, atol=1e-4)
            # On the calibration tokens the mean of the projection's output is the dense one's.
            projection = block.layer.get_submodule(name)
            own = whole.layer.get_submodule(name).bias
            output = x @ weight.T + (0 if own is None else own.double())
            sliced = x[:, ~gone] @ projection.weight.double().T + projection.bias.double()
            torch.testing.assert_close(sliced.mean(0), output.mean(0), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=VARIANTS)
def repaired(request, tmp_path_factory) -> tuple[Path, Path, Path]:
    """A model of every variant, pruned by FLAP, and its repair by biases."""
    folder = tmp_path_factory.mktemp(request.param)
    source = tiny_model(folder / "model", **VARIANTS[request.param])
    settings = [*short_calibration(folder), "score.criterion=flap"]
    pruned = api.prune(str(source), api.score(str(source), folder / "score", settings),
                       folder / "prune", 0.5, ["prune.round_to=8"])
    return source, pruned, api.recover(str(source), pruned, folder / "recover",
                                       [*settings, "recover.method=bias"])


def test_transformers_computes_the_sliced_model_with_its_biases(repaired):
    """The written checkpoint, loaded whole, is the sliced one plus the two biases of each block."""
    _, pruned, folder = repaired
    tensors, expected = Checkpoint(folder / "model"), loaded(pruned / "model")
    for index, layer in enumerate(expected.model.layers):
        biases = tensors.block(index)
        for part, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            parent = "self_attn" if name == "o_proj" else "mlp"
            getattr(part, name).bias = torch.nn.Parameter(biases[f"{parent}.{name}.bias"])
            assert bool(biases[f"{parent}.{name}.bias"].any())
    ids = token_windows(2, TOKENS)
    torch.testing.assert_close(logits(loaded(folder / "model"), ids), logits(expected, ids))


def test_the_format_is_stock_where_the_family_has_such_biases(repaired):
    _, pruned, folder = repaired
    before, after = (Checkpoint(f / "model").config for f in (pruned, folder))
    if before["model_type"] == "llama":
        assert (after["model_type"], after["mlp_bias"], after["attention_bias"]) == (
            "llama", True, True)
        assert OUTPUT_BIAS not in after
    else:
        assert after["model_type"] == before["model_type"] or after[OUTPUT_BIAS]


def test_biases_are_counted(repaired):
    source, pruned, folder = repaired
    assert_counts_match(folder / "model")
    sizes, before = figures([folder]), figures([pruned])
    arch = architecture_of(folder / "model")
    assert sizes["parameters.pruned"] == arch.parameters() >= before["parameters.pruned"]
    assert sizes["parameters.dense"] == architecture_of(source).parameters()


def test_a_biased_model_can_be_pruned_again(repaired, tmp_path):
    _, _, folder = repaired
    kept = draw_kept(architecture_of(folder / "model"), [(1, 8), (1, 16), (1, 8)])
    again = write_sliced(folder / "model", tmp_path / "again", kept)
    assert_counts_match(again)
    assert bool(logits(loaded(again), token_windows(1, TOKENS)).isfinite().all())


def test_a_model_that_has_both_biases_keeps_its_configuration(tmp_path):
    source = tiny_model(tmp_path / "model", attention_bias=True, mlp_bias=True)
    config = Checkpoint(source).config
    assert biased_config(config, architecture_of(source)) == config
