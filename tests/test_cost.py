"""What widths cost: against counted FLOPs and files on disk; and the solver for such costs."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bipdeploy.model import cost
from bipdeploy.model.checkpoint import read_config
from bipdeploy.model.families import BlockWidths, Heads
from bipdeploy.planning.footprint import Sizes, writes
from bipdeploy.pruning import search
from bipdeploy.pruning.search import Curve
from bipdeploy.recipe.recipe import Recipe
from tests.sliced import architecture_of, draw_kept, loaded, token_windows, write_sliced

WIDTHS = [(1, 40), (2, 96), (2, 24)]
QUERIES = [(1, 40, 1), (2, 96, 1), (2, 24)]


def counted(model, ids: torch.Tensor, **arguments) -> tuple[int, object]:
    """FLOPs of one forward pass; eager attention, whose products the counter sees. Without those of
    the angles of positions, which some versions of transformers count in a product."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = model(ids, logits_to_keep=1, **arguments)
    angles = [sum(own.values()) for name, own in counter.get_flop_counts().items()
              if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(angles), out


@pytest.mark.parametrize("widths", [None, WIDTHS, QUERIES])
def test_flops_are_those_that_torch_counts(variant, tmp_path, widths):
    folder = variant
    if widths:
        folder = write_sliced(variant, tmp_path / "m", draw_kept(architecture_of(variant), widths))
    arch, model = architecture_of(folder), loaded(folder)
    if not read_config(folder).get("sliding_window"):  # eager masks a window and counts it whole
        flops, out = counted(model, token_windows(1, 24), use_cache=True)
        assert flops == cost.flops(arch, 24).whole(arch.blocks) + cost.head_flops(arch, 1)
        flops, _ = counted(model, token_windows(1, 1), use_cache=True,
                           past_key_values=out.past_key_values)
        assert flops == cost.flops(arch, 1, 24).whole(arch.blocks) + cost.head_flops(arch, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_files(tmp_path, dtype):
    from tests.tiny import tiny_model

    folder = tiny_model(tmp_path / "m", dtype=dtype)
    arch, value = architecture_of(folder), cost.value_bytes(read_config(folder))
    assert value == dtype.itemsize
    assert cost.memory(arch, value).whole(arch.blocks) == tensor_bytes(folder)
    for number, widths in enumerate((WIDTHS, QUERIES)):
        sliced = write_sliced(folder, tmp_path / f"{number}", draw_kept(arch, widths))
        own = architecture_of(sliced).blocks
        assert cost.memory(arch, value).whole(own) == tensor_bytes(sliced)


def tensor_bytes(folder: Path) -> int:
    """Bytes of the tensors in a checkpoint's only file: all behind its header."""
    path = folder / "model.safetensors"
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def test_the_cache_costs_what_a_model_keeps(tiny):
    arch, model = architecture_of(tiny), loaded(tiny)
    with torch.no_grad():
        cache = model(token_windows(3, 20), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    without, with_cache = cost.memory(arch, 4), cost.memory(arch, 4, 3 * 20)
    assert with_cache.whole(arch.blocks) - without.whole(arch.blocks) == kept


def test_parts_and_rest_add_up_to_the_parameters_of_a_model(variant):
    arch = architecture_of(variant)
    assert cost.memory(arch, 1).whole(arch.blocks) == arch.parameters() == sum(
        p.numel() for p in loaded(variant).parameters())


@pytest.mark.parametrize("share", [0.5, 0.7, 0.85])
@pytest.mark.parametrize("name", ["flops", "memory"])
def test_the_solver_finds_the_best_of_all_at_another_cost(tiny, name, share):
    arch = architecture_of(tiny)
    spent = {"flops": cost.flops(arch, 200), "memory": cost.memory(arch, 2, 4000)}[name]
    draw = torch.Generator().manual_seed(int(share * 100))
    choices = {"heads": [Heads(1, 2), Heads(2, 2)], "ffn": [24, 48, 72, 96]}
    curves = [Curve(block, part, widths, sorted(torch.rand(len(widths), generator=draw).tolist(),
                                                reverse=True))
              for block in range(3) for part, widths in choices.items()]
    options = [BlockWidths(0, 0, f).having(heads) for heads, f in product(*choices.values())]
    everything = list(product(options, repeat=3))
    least = min(map(spent.whole, everything))
    budget = least + share * (spent.whole(arch.blocks) - least)
    found = search.solve_within(arch, curves, lambda _, part: choices[part], budget, spent)
    assert spent.whole(found) <= budget
    best = min(search.predicted(curves, w) for w in everything if spent.whole(w) <= budget * 0.999)
    assert search.predicted(curves, found) <= best + 1e-9
    by_parameters = search.solve(arch, curves, lambda _, part: choices[part], 0.7 * sum(
        map(arch.block_parameters, range(3))))
    assert spent.whole(by_parameters) != pytest.approx(budget, rel=1e-3)


def test_what_the_prune_and_recover_stages_write_is_what_was_estimated(smoke):
    recipe = Recipe.model_validate({"name": "x", "model": {"id": "y"}, "prune": {"ratio": 0.3}})
    folder = smoke.folder / "prune" / "model"
    arch = architecture_of(folder)
    estimated = writes(Sizes(recipe, arch, arch, 2, 4))
    for stage in ("prune", "recover"):
        made = sum(p.stat().st_size for p in (smoke.folder / stage).rglob("*") if p.is_file())
        assert made <= estimated[stage] <= made + (4 << 20)
