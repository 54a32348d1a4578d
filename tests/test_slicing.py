"""Slicing: a smaller checkpoint computes what the dense model with masked groups computes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bipdeploy.model import modeling_bipdeploy
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.model.families import architecture
from bipdeploy.model.loading import register
from bipdeploy.pruning.kept import Kept
from bipdeploy.pruning.slicing import slice_block
from bipdeploy.recipe.model import ModelSection
from tests.sliced import (
    architecture_of,
    draw_kept,
    loaded,
    logits,
    masked_model,
    token_windows,
    write_sliced,
)
from tests.tiny import VARIANTS, tiny_model

# (KV groups, channels) by block; every variant has at least two KV groups and 96 channels.
CHOICES = {
    "uniform": [(1, 56), (1, 56), (1, 56)],
    "heads-only": [(1, 96), (1, 96), (1, 96)],
    "channels-only": [(2, 40), (2, 40), (2, 40)],
    "per-block": [(1, 96), (2, 24), (1, 7)],
    "first-attention-removed": [(0, 48), (1, 96), (2, 33)],
    "last-attention-removed": [(2, 48), (1, 48), (0, 48)],
    "first-ffn-removed": [(1, 0), (2, 96), (1, 40)],
    "block-removed": [(2, 64), (0, 0), (1, 64)],
    "all-attention-removed": [(0, 64), (0, 64), (0, 32)],
    "all-ffn-removed": [(2, 0), (1, 0), (1, 0)],
    "no-whole-block": [(0, 64), (1, 0), (0, 0)],
}
# (KV groups, channels, query heads of each) by block, of models with two KV heads of three each.
QUERIES = {
    "queries-uniform": [(2, 96, 2)] * 3,
    "queries-single": [(2, 96, 1)] * 3,
    "queries-and-groups": [(1, 56, 2)] * 3,
    "queries-per-block": [(2, 96, 1), (1, 40, 2), (2, 24, 3)],
    "more-heads-on-fewer-kv-heads": [(2, 96, 1), (1, 40, 3), (2, 24, 1)],
    "queries-and-depth": [(0, 48), (2, 96, 2), (2, 0, 1)],
}
QUERY_VARIANTS = {name: settings for name, settings in VARIANTS.items()
                  if settings["kv_heads"] == 2}
# Layers that differ in more than width: sliding windows on some of them only.
LAYER_TYPES = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
}

# Loads every folder below the working directory that its arguments name, without bipdeploy.
WITHOUT_BIPDEPLOY = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bipdeploy":
            raise ImportError("bipdeploy is blocked")

sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ids, found, classes = load_file("ids.safetensors")["ids"], {}, {}
for name in sys.argv[1:]:
    code = name != "stock"
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=code).eval()
    with torch.no_grad():
        found[name], classes[name] = model(ids).logits, type(model).__name__
save_file(found, "logits.safetensors", classes)
assert not [name for name in sys.modules if name.partition(".")[0] == "bipdeploy"]
"""


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def assert_equals_masked(source: Path, folder: Path, kept: list[Kept]) -> None:
    ids = token_windows(2, 24)
    masked = logits(masked_model(source, kept), ids)
    difference = largest_difference(logits(loaded(folder), ids), masked)
    assert difference < 1e-4
    changed = largest_difference(logits(loaded(source), ids), masked)
    assert changed > 1e-2


@pytest.mark.parametrize("choice", CHOICES)
def test_the_sliced_model_equals_the_masked_one(variant, choice, tmp_path):
    kept = draw_kept(architecture_of(variant), CHOICES[choice], seed=1)
    folder = write_sliced(variant, tmp_path / "sliced", kept)
    assert_equals_masked(variant, folder, kept)


@pytest.mark.parametrize("family", LAYER_TYPES)
@pytest.mark.parametrize("choice", ["uniform", "per-block", "first-attention-removed"])
def test_layers_of_different_types_are_kept_apart(family, choice, tmp_path):
    source = tiny_model(tmp_path / "model", family, **LAYER_TYPES[family])
    kept = draw_kept(architecture_of(source), CHOICES[choice])
    folder = write_sliced(source, tmp_path / "sliced", kept)
    assert_equals_masked(source, folder, kept)
    assert_walk_equals_transformers(folder)


@pytest.mark.parametrize("choice", QUERIES)
@pytest.mark.parametrize("name", QUERY_VARIANTS)
def test_the_model_without_some_query_heads_equals_the_masked_one(name, choice, tmp_path):
    """Other ones leave each group."""
    source = tiny_model(tmp_path / "model", **QUERY_VARIANTS[name], heads=6, hidden_size=96)
    kept = draw_kept(architecture_of(source), QUERIES[choice], seed=3)
    assert any(len(set(own.queries)) > 1 for own in kept) or choice != "queries-per-block"
    folder = write_sliced(source, tmp_path / "sliced", kept)
    for own, made in zip(QUERIES[choice], architecture_of(folder).blocks, strict=True):
        groups, channels, *queries = own
        assert (made.kv_heads, made.intermediate) == (groups, channels)
        assert made.heads == groups * sum(queries)
    assert_equals_masked(source, folder, kept)
    assert_cache_changes_nothing(folder)


def test_query_heads_that_all_stay_are_as_if_unnamed(tiny):
    arch, checkpoint = architecture_of(tiny), Checkpoint(tiny)
    named = draw_kept(arch, [(1, 40, 2)] * 3)[0]
    plain = Kept(named.groups, named.channels)
    assert named.queries == ((0, 1),) and plain.query_heads(2) == named.query_heads(2)
    for name, tensor in slice_block(checkpoint.block(0), arch, 0, plain).items():
        assert torch.equal(tensor, slice_block(checkpoint.block(0), arch, 0, named)[name])


def test_keeping_everything_changes_no_tensor(variant):
    checkpoint, arch = Checkpoint(variant), architecture_of(variant)
    everything = draw_kept(arch, [(w.kv_heads, w.intermediate) for w in arch.blocks])
    for index, kept in enumerate(everything):
        dense = checkpoint.block(index)
        sliced = slice_block(dense, arch, index, kept)
        assert dense.keys() == sliced.keys()
        assert all(torch.equal(dense[name], sliced[name]) for name in dense)


def test_slicing_in_two_steps_equals_slicing_once(variant, tmp_path):
    arch = architecture_of(variant)
    first = draw_kept(arch, [(2, 80), (1, 64), (2, 50)])
    once = write_sliced(variant, tmp_path / "first", first)
    second = draw_kept(architecture_of(once), [(1, 16), (1, 24), (2, 20)], seed=1)
    twice = write_sliced(once, tmp_path / "second", second)
    direct = write_sliced(variant, tmp_path / "direct", list(map(Kept.then, first, second)))
    assert Checkpoint(twice).config == Checkpoint(direct).config
    assert (twice / "model.safetensors").read_bytes() == (direct / "model.safetensors").read_bytes()


@pytest.mark.parametrize("first", [[(2, 80, 2), (1, 64), (2, 50, 1)], [(2, 80), (2, 64), (1, 50)]])
@pytest.mark.parametrize("second", [[(1, 16), (1, 24, 2), (1, 20)], [(1, 16, 1)] * 3])
def test_query_heads_may_leave_in_either_of_two_steps(tmp_path, first, second):
    source = tiny_model(tmp_path / "model", heads=6, hidden_size=96)
    before = draw_kept(architecture_of(source), first)
    once = write_sliced(source, tmp_path / "first", before)
    after = draw_kept(architecture_of(once), second, seed=1)
    twice = write_sliced(once, tmp_path / "second", after)
    direct = write_sliced(source, tmp_path / "direct", list(map(Kept.then, before, after)))
    assert Checkpoint(twice).config == Checkpoint(direct).config
    assert (twice / "model.safetensors").read_bytes() == (direct / "model.safetensors").read_bytes()


def assert_walk_equals_transformers(folder: Path) -> None:
    ids = token_windows(2, 24)
    model = loaded(folder)
    states: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: states.append(output))
    walker = BlockWalker(folder, ModelSection(id=str(folder), device="cpu"))
    with torch.no_grad():
        model(ids)
        hidden = walker.embed([ids])[0]
        for block, expected in zip(walker.blocks(24), states, strict=True):
            hidden = block(hidden)
            difference = largest_difference(hidden, expected)
            assert difference < 1e-4


def test_walking_the_dense_model_gives_its_hidden_states(variant):
    assert_walk_equals_transformers(variant)


@pytest.mark.parametrize("choice", ["uniform", "per-block", "first-attention-removed",
                                    "block-removed"])
def test_walking_a_sliced_model_gives_its_hidden_states(variant, choice, tmp_path):
    kept = draw_kept(architecture_of(variant), CHOICES[choice])
    assert_walk_equals_transformers(write_sliced(variant, tmp_path / "sliced", kept))


def generated(model: Any, ids: torch.Tensor, mask: torch.Tensor, *, cache: bool) -> torch.Tensor:
    output = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False,
                            use_cache=cache, pad_token_id=0, eos_token_id=None)
    return output[:, ids.shape[1]:]


def assert_cache_changes_nothing(folder: Path) -> None:
    model, prompt = loaded(folder), token_windows(1, 13)
    whole = torch.ones_like(prompt)
    alone = generated(model, prompt, whole, cache=False)
    assert alone.shape == (1, 12)
    assert torch.equal(generated(model, prompt, whole, cache=True), alone)
    short = prompt[:, 6:]
    pad = torch.zeros(1, 6, dtype=torch.long)
    ids = torch.cat([prompt, torch.cat([pad, short], 1)])
    mask = torch.cat([whole, torch.cat([pad, torch.ones_like(short)], 1)])
    padded = generated(model, ids, mask, cache=True)
    assert torch.equal(padded, generated(model, ids, mask, cache=False))
    assert torch.equal(padded[:1], alone)
    assert torch.equal(padded[1:], generated(model, short, torch.ones_like(short), cache=False))


@pytest.mark.parametrize("choice", ["per-block", "first-attention-removed",
                                    "last-attention-removed", "first-ffn-removed",
                                    "block-removed"])
def test_cached_generation_equals_uncached(variant, choice, tmp_path):
    kept = draw_kept(architecture_of(variant), CHOICES[choice], seed=2)
    assert_cache_changes_nothing(write_sliced(variant, tmp_path / "sliced", kept))


@pytest.mark.parametrize("family", LAYER_TYPES)
@pytest.mark.parametrize("choice", ["per-block", "first-attention-removed"])
def test_cached_generation_with_mixed_layer_types(family, choice, tmp_path):
    source = tiny_model(tmp_path / "model", family, **LAYER_TYPES[family])
    kept = draw_kept(architecture_of(source), CHOICES[choice])
    assert_cache_changes_nothing(write_sliced(source, tmp_path / "sliced", kept))


@pytest.mark.parametrize("choice", ["queries-per-block", "more-heads-on-fewer-kv-heads"])
@pytest.mark.parametrize("name", QUERY_VARIANTS)
def test_a_static_cache_of_blocks_without_some_query_heads(name, choice, tmp_path):
    source = tiny_model(tmp_path / "model", **QUERY_VARIANTS[name], heads=6, hidden_size=96)
    kept = draw_kept(architecture_of(source), QUERIES[choice], seed=2)
    assert_static_cache_changes_nothing(write_sliced(source, tmp_path / "sliced", kept))


@pytest.mark.parametrize("choice", ["per-block", "first-attention-removed", "block-removed"])
def test_a_static_cache_holds_blocks_of_different_widths(variant, choice, tmp_path):
    kept = draw_kept(architecture_of(variant), CHOICES[choice], seed=2)
    assert_static_cache_changes_nothing(write_sliced(variant, tmp_path / "sliced", kept))


def assert_static_cache_changes_nothing(folder: Path) -> None:
    model, ids = loaded(folder), token_windows(1, 13)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False,
                "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(ids, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(found, model.generate(ids, use_cache=False, **settings))


def test_the_attention_implementation_reaches_every_block(variant, tmp_path):
    kept = draw_kept(architecture_of(variant), CHOICES["per-block"])
    model, ids = loaded(write_sliced(variant, tmp_path / "sliced", kept)), token_windows(2, 24)
    before = logits(model, ids)
    model.set_attn_implementation("eager")
    for layer in model.model.layers:
        assert layer.self_attn.config._attn_implementation == "eager"
    difference = largest_difference(logits(model, ids), before)
    assert difference < 1e-4


@pytest.mark.parametrize("choice", ["uniform", "per-block", "first-attention-removed"])
def test_a_sliced_model_survives_saving_and_loading(variant, choice, tmp_path):
    kept = draw_kept(architecture_of(variant), CHOICES[choice])
    model, ids = loaded(write_sliced(variant, tmp_path / "sliced", kept)), token_windows(2, 16)
    model.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again")
    assert type(again) is type(model)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert architecture_of(tmp_path / "again").blocks == architecture_of(tmp_path / "sliced").blocks


def test_tied_embeddings_stay_tied(tmp_path):
    source = tiny_model(tmp_path / "model", tie_word_embeddings=True)
    kept = draw_kept(architecture_of(source), CHOICES["per-block"])
    folder = write_sliced(source, tmp_path / "sliced", kept)
    assert_equals_masked(source, folder, kept)
    model = loaded(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@dataclass
class Elsewhere:
    """A model as loaded by a process that cannot import bipdeploy, and what it should compute."""

    folder: Path
    class_name: str
    logits: torch.Tensor
    masked: torch.Tensor


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> dict[str, Elsewhere]:
    """Every variant with uneven blocks and our code beside the weights, and one stock model."""
    work = tmp_path_factory.mktemp("elsewhere")
    ids = token_windows(2, 24)
    save_file({"ids": ids}, work / "ids.safetensors")
    masked = {}
    for name, settings in {**VARIANTS, "stock": VARIANTS["llama-mha"]}.items():
        source = tiny_model(work / "dense" / name, **settings)
        widths = [(3, 64)] * 3 if name == "stock" else CHOICES["first-attention-removed"]
        kept = draw_kept(architecture_of(source), widths)
        folder = write_sliced(source, work / name, kept)
        if name != "stock":
            shutil.copyfile(modeling_bipdeploy.__file__, folder / "modeling_bipdeploy.py")
        masked[name] = logits(masked_model(source, kept), ids)
    subprocess.run([sys.executable, "-I", "-c", WITHOUT_BIPDEPLOY, *masked], cwd=work, check=True,
                   timeout=240, env={**os.environ, "HF_HOME": str(work / "home")})
    with safe_open(work / "logits.safetensors", "pt") as file:
        return {name: Elsewhere(work / name, file.metadata()[name], file.get_tensor(name), expected)
                for name, expected in masked.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_shipped_code_loads_without_bipdeploy(elsewhere, name):
    model = elsewhere[name]
    assert model.class_name == Checkpoint(model.folder).config["architectures"][0]
    assert model.class_name.startswith("Bipdeploy")
    difference = largest_difference(model.logits, model.masked)
    assert difference < 1e-4


def test_a_llama_whose_heads_do_not_divide_its_hidden_size_is_a_stock_mistral(elsewhere):
    model = elsewhere["stock"]
    config = Checkpoint(model.folder).config
    assert config["num_attention_heads"] == 3
    assert config["model_type"] == "mistral"
    assert config["architectures"] == [model.class_name] == ["MistralForCausalLM"]
    assert not config.keys() & {"auto_map", "per_layer_config"}
    difference = largest_difference(model.logits, model.masked)
    assert difference < 1e-4


def test_equal_widths_give_a_stock_checkpoint(variant, tmp_path):
    config = Checkpoint(variant).config
    kept = draw_kept(architecture_of(variant), CHOICES["uniform"])
    written = Checkpoint(write_sliced(variant, tmp_path / "sliced", kept)).config
    assert written["model_type"] == config["model_type"]
    assert written["architectures"] == config["architectures"]
    assert not written.keys() & {"auto_map", "per_layer_config"}


def test_equal_widths_that_no_stock_class_holds_stay_per_block(tmp_path):
    source = tiny_model(tmp_path / "model", "llama", kv_heads=4, attention_bias=True)
    kept = draw_kept(architecture_of(source), [(3, 64)] * 3)
    folder = write_sliced(source, tmp_path / "sliced", kept)
    assert Checkpoint(folder).config["model_type"] == "bipdeploy_llama"
    assert architecture(Checkpoint(folder).config).uniform
    assert_equals_masked(source, folder, kept)
    assert_cache_changes_nothing(folder)


def test_registering_twice_is_harmless():
    register()
    register.cache_clear()
    register()


def test_names_and_types_of_tensors_are_unchanged(tmp_path):
    source = tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    kept = draw_kept(architecture_of(source), CHOICES["per-block"])
    dense = Checkpoint(source)
    sliced = Checkpoint(write_sliced(source, tmp_path / "sliced", kept))
    assert dense.entries.keys() == sliced.entries.keys()
    assert {t.dtype for t in sliced.tensors(sliced.entries).values()} == {torch.bfloat16}
