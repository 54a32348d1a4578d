"""Taylor scores: gradients taken block by block are those of the whole model, in little memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bipdeploy.model.blocks import BlockWalker
from bipdeploy.pruning.criteria.gradients import COUPLED, blocks_backwards
from bipdeploy.stages.score import score_blocks
from tests.sliced import architecture_of, draw_kept, loaded, write_sliced
from tests.test_criteria import TOKENS, group_columns, recipe, scores_of, walk, windows
from tests.tiny import tiny_model

# W * dL/dW of a matrix's rows (its columns, transposed) → importance of each.
REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "taylor": lambda salience: salience.abs().sum(1),
    "taylor_vector": lambda salience: salience.sum(1).abs()}


def whole_gradients(model: Path) -> list[dict[str, torch.Tensor]]:
    """By block, W * dL/dW of every weight, by autograd through the whole model in float64."""
    whole, ids = loaded(model).double(), torch.cat(windows())
    whole(ids, labels=ids).loss.backward()  # transformers' own loss: the mean over next tokens
    return [{name: (p * p.grad).detach() for name, p in layer.named_parameters()
             if name in COUPLED} for layer in whole.model.layers]


@pytest.mark.parametrize("criterion", REDUCTIONS)
def test_scores_are_those_of_autograd_through_the_whole_model(variant, criterion):
    arch, reduction = architecture_of(variant), REDUCTIONS[criterion]
    for index, (found, salience) in enumerate(
            zip(scores_of(variant, criterion), whole_gradients(variant), strict=True)):
        rows = {name.split(".")[1]: reduction(s.T if "o_proj" in name or "down" in name else s)
                for name, s in salience.items()}
        queries = rows["q_proj"] + rows["o_proj"]
        keys = rows["k_proj"] + rows["v_proj"]
        heads = torch.stack([
            queries[group_columns(arch, index, g)].sum()
            + keys[g * arch.head_dim:(g + 1) * arch.head_dim].sum()
            for g in range(arch.blocks[index].kv_heads)])
        torch.testing.assert_close(found.heads, heads, rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(found.ffn, rows["gate_proj"] + rows["up_proj"]
                                   + rows["down_proj"], rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_gives_the_models_logits(tmp_path, tied):
    model = tiny_model(tmp_path / "model", "qwen3", tie_word_embeddings=tied)
    walker, ids = walk(model), torch.cat(windows())
    with torch.no_grad():
        hidden = walker.embed([ids])[0]
        for block in walker.blocks(TOKENS):
            hidden = block(hidden)
        torch.testing.assert_close(walker.head()(hidden), loaded(model)(ids).logits,
                                   rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("widths", [[(0, 96), (2, 0), (0, 0)], [(1, 8), (0, 0), (2, 96)]])
def test_gradients_pass_through_blocks_without_a_part(tiny, tmp_path, widths):
    folder = write_sliced(tiny, tmp_path / "sliced", draw_kept(architecture_of(tiny), widths))
    for found, salience in zip(scores_of(folder, "taylor"), whole_gradients(folder), strict=True):
        if "mlp.up_proj.weight" in salience:
            down = salience["mlp.down_proj.weight"].abs().sum(0)
            rows = sum(salience[f"mlp.{p}_proj.weight"].abs().sum(1) for p in ("gate", "up"))
            torch.testing.assert_close(found.ffn, down + rows, rtol=1e-3, atol=1e-9)


@pytest.mark.slow
def test_there_are_never_gradients_of_more_than_one_block(tmp_path, monkeypatch):
    """At every step of the walk one block is alive, and it alone requires gradients."""
    model = tiny_model(tmp_path / "model", blocks=5)
    alive: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
    original, seen = BlockWalker.block, []

    def block(self, index, tokens):
        gc.collect()
        seen.append((len(alive), index))
        made = original(self, index, tokens)
        alive.add(made.layer)
        return made

    monkeypatch.setattr(BlockWalker, "block", block)
    walker = walk(model)
    inputs = [walker.embed(windows())]
    with torch.no_grad():
        for made in walker.blocks(TOKENS):
            inputs.append([made(x) for x in inputs[-1]])
    sizes = [sum(p.numel() for n, p in made.layer.named_parameters() if n in COUPLED)]
    del made
    seen.clear()
    for index, made, gradients in blocks_backwards(walker, windows(), inputs):
        assert len(inputs) == index  # what later blocks read is let go
        assert gradients.keys() == set(COUPLED)
        assert [sum(g.numel() for g in gradients.values())] == sizes
        assert not any(g.requires_grad for g in gradients.values())
        assert {n for n, p in made.layer.named_parameters() if p.requires_grad} == set(COUPLED)
        assert all(p.grad is None for p in made.layer.parameters())
    assert [index for _, index in seen] == [4, 3, 2, 1, 0]
    # The block before is let go once the next one has taken its name, here and in the walk.
    assert max(count for count, _ in seen) <= 1


def test_batches_do_not_change_gradients(tiny):
    walker, asked = walk(tiny), recipe(tiny, "taylor")
    whole = torch.cat(windows())
    together, apart = (score_blocks(walker, batches, asked).scores
                       for batches in ([whole], list(whole.split(1))))
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=0)


def test_sixteen_bits_rank_alike(tmp_path):
    """Gradients of a mean over thousands of tokens would be lost in float16; of a sum they stay."""
    model = tiny_model(tmp_path / "model")
    exact = scores_of(model, "taylor")
    asked = recipe(model, "taylor")
    section = asked.model.model_copy(update={"dtype": "bfloat16"})
    rough = score_blocks(BlockWalker(model, section), windows(), asked).scores
    for a, b in zip(exact, rough, strict=True):
        assert torch.corrcoef(torch.stack([a.ffn, b.ffn]))[0, 1] > 0.95
