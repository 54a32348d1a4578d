"""Families: sizes read from `config.json` are those of the real tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from bipdeploy.errors import InputError
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.model.families import FAMILIES, BlockWidths, architecture, family_of
from bipdeploy.model.formats import pruned_config
from tests.sliced import architecture_of, draw_kept, widths_of, write_sliced
from tests.tiny import VARIANTS, tiny_model

UNEVEN = [(1, 40), (0, 96), (1, 0)]  # (KV groups, channels) by block


def elements(tensors) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def assert_counts_match(folder: Path) -> None:
    checkpoint, arch = Checkpoint(folder), architecture_of(folder)
    assert arch.parameters() == elements(checkpoint.tensors(checkpoint.entries))
    for index in range(len(arch.blocks)):
        assert arch.block_parameters(index) == elements(checkpoint.block(index))


def test_parameters_are_counted_exactly(variant):
    assert_counts_match(variant)


def test_parameters_of_a_per_block_model_are_counted_exactly(variant, tmp_path):
    kept = draw_kept(architecture_of(variant), UNEVEN)
    assert_counts_match(write_sliced(variant, tmp_path / "sliced", kept))


def test_parameters_at_given_widths_are_those_of_the_sliced_tensors(variant, tmp_path):
    arch = architecture_of(variant)
    kept = draw_kept(arch, UNEVEN)
    sliced = Checkpoint(write_sliced(variant, tmp_path / "sliced", kept))
    widths = tuple(widths_of(arch, kept))
    assert arch.parameters(widths) == elements(sliced.tensors(sliced.entries))
    for index, own in enumerate(widths):
        assert arch.block_parameters(index, own) == elements(sliced.block(index))


def test_tied_embeddings_are_counted_once(tmp_path):
    folder = tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    assert architecture_of(folder).tied
    assert_counts_match(folder)


def test_a_group_and_a_channel_weigh_what_their_removal_saves(variant):
    arch = architecture_of(variant)
    dense = arch.blocks[0]
    whole = arch.block_parameters(0)
    one_group_less = BlockWidths(dense.heads - dense.group, dense.kv_heads - 1, dense.intermediate)
    one_channel_less = BlockWidths(dense.heads, dense.kv_heads, dense.intermediate - 1)
    assert whole - arch.block_parameters(0, one_group_less) == arch.kv_group_parameters(0)
    assert whole - arch.block_parameters(0, one_channel_less) == arch.channel_parameters()


def test_cache_bytes_follow_the_kv_heads_that_are_left(variant):
    arch = architecture_of(variant)
    config = pruned_config(Checkpoint(variant).config, arch,
                           widths_of(arch, draw_kept(arch, UNEVEN)))
    assert arch.kv_bytes_per_token() == 3 * arch.blocks[0].kv_heads * 2 * 32 * 2
    assert architecture(config).kv_bytes_per_token() == 2 * 1 * 2 * 32 * 2


def test_per_layer_config_is_read_back_as_it_was_written(variant):
    arch = architecture_of(variant)
    group = arch.blocks[0].group
    widths = (BlockWidths(group, 1, 40), BlockWidths(0, 0, 72),
              BlockWidths(2 * group, 2, 0))
    read = architecture(pruned_config(Checkpoint(variant).config, arch, widths))
    assert read.blocks == widths
    assert not read.uniform
    assert (read.family, read.head_dim, read.hidden) == (arch.family, arch.head_dim, arch.hidden)


@pytest.mark.parametrize("widths", [
    [BlockWidths(0, 0, 8), BlockWidths(2, 1, 0), BlockWidths(0, 0, 0)],  # no whole block
    [BlockWidths(2, 1, 96), BlockWidths(4, 2, 8), BlockWidths(2, 1, 8)],  # widest in neither
    [BlockWidths(0, 0, 8)] * 3,
    [BlockWidths(2, 1, 0)] * 3,
], ids=["no-whole-block", "crossed", "no-attention", "no-ffn"])
def test_extreme_widths_are_read_back(tiny, widths):
    arch = architecture_of(tiny)
    assert list(architecture(pruned_config(Checkpoint(tiny).config, arch, widths)).blocks) == widths


def test_equal_widths_read_back_as_uniform(variant):
    arch = architecture_of(variant)
    widths = [BlockWidths(arch.blocks[0].group, 1, 64)] * 3
    read = architecture(pruned_config(Checkpoint(variant).config, arch, widths))
    assert list(read.blocks) == widths
    assert read.uniform


def test_an_unknown_model_type_is_refused_with_a_suggestion():
    with pytest.raises(InputError, match=r"'lama'.*did you mean 'llama'"):
        family_of({"model_type": "lama"})
    with pytest.raises(InputError, match="known: llama, mistral, qwen2, qwen3"):
        architecture({"model_type": "gpt2"})
    with pytest.raises(InputError, match="known: "):
        architecture({})


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads",
                                 "intermediate_size", "vocab_size"])
def test_a_missing_size_is_named(tiny, key):
    config = Checkpoint(tiny).config
    del config[key]
    with pytest.raises(InputError, match=key):
        architecture(config)


def test_every_family_has_a_tiny_variant():
    assert {settings["family"] for settings in VARIANTS.values()} == set(FAMILIES)


def test_head_dim_and_kv_heads_have_the_defaults_of_llama(tiny):
    config = Checkpoint(tiny).config
    del config["head_dim"], config["num_key_value_heads"]
    arch = architecture(config)
    assert arch.head_dim == 16
    assert arch.blocks[0] == BlockWidths(4, 4, 96)
