"""GGUF files as models: the checkpoint written out is the model that the file was made from."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bipdeploy.model import gguf as source
from bipdeploy.model import gguf_file
from bipdeploy.model.checkpoint import Checkpoint, read_config
from tests.gguf_files import arrays, logits, permuted, quantized, refused, theirs, write
from tests.running import leftovers
from tests.tiny import VARIANTS, tiny_model

CPU = {"dtype": torch.float32}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("gguf") / "llama", blocks=2)


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, **CPU).eval()


# The same model

@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_a_float32_file_gives_the_logits_of_the_model_it_was_made_from(tmp_path, variant, tied):
    settings = {**VARIANTS[variant], "tie_word_embeddings": tied}
    dense = tiny_model(tmp_path / "dense", blocks=2, **settings)
    window = settings.get("sliding_window")
    path = write(dense, tmp_path / "model.gguf",
                 **({"ARCH__attention__sliding_window": window} if window else {}))
    folder = source.converted(path)
    Checkpoint(folder).verify()
    found = read_config(folder)
    assert found["dtype"] == "float32" and found["tie_word_embeddings"] is tied
    assert found.get("sliding_window") == window
    torch.testing.assert_close(logits(load(folder)), logits(load(dense)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind, stored", [("F16", "float16"), ("BF16", "bfloat16"),
                                          ("Q8_0", "bfloat16"), ("Q4_0", "bfloat16")])
def test_a_quantised_file_gives_the_logits_of_its_dequantised_values(tmp_path, family, kind,
                                                                     stored):
    dense = tiny_model(tmp_path / "dense", family, blocks=2)
    folder = source.converted(write(dense, tmp_path / "model.gguf", kind))
    reference = load(dense)
    heads = {"q_proj": 4, "k_proj": 2} if family == "llama" else {}
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            part = name.split(".")[-2]
            values = parameter.numpy()
            values = permuted(values, heads[part]) if part in heads else values
            values = gguf.quants.dequantize(*quantized(values, kind)).reshape(values.shape)
            if part in heads:  # the inverse of swapping two axes of sizes 2 and n
                size = len(values) // heads[part] // 2
                values = (values.reshape(heads[part], size, 2, *values.shape[1:]).swapaxes(1, 2)
                          .reshape(values.shape))
            parameter.copy_(torch.from_numpy(values.copy()).to(getattr(torch, stored)))
    assert read_config(folder)["dtype"] == stored
    torch.testing.assert_close(logits(load(folder)), logits(reference), atol=1e-4, rtol=1e-4)
    found = json.loads((folder / source.SOURCE).read_text())["gguf"]
    matrices = sum(values.ndim > 1 for values in arrays(dense).values())
    assert (found["file"], found["file_type"]) == ("model.gguf", kind)
    assert found["quantized_tensors"] == (matrices if kind.startswith("Q") else 0)


@pytest.mark.parametrize("variant", ["llama-mha", "llama-gqa", "qwen2-gqa"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_transformers_reads_the_same_model_from_the_same_file(tmp_path, variant, kind):
    dense = tiny_model(tmp_path / "dense", blocks=2, hidden_size=128, **VARIANTS[variant])
    path = write(dense, tmp_path / "model.gguf", kind)
    own = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, **CPU).eval()
    found = load(source.converted(path))
    stored = getattr(torch, read_config(source.converted(path))["dtype"])
    for parameter in own.parameters():  # it keeps float32 in memory, whatever the file has
        parameter.data = parameter.data.to(stored).float()
    torch.testing.assert_close(logits(found), logits(own), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_tensors_that_are_read_in_parts_are_the_same(tmp_path, llama, kind, monkeypatch):
    path = write(llama, tmp_path / "model.gguf", kind)
    source.write(path, tmp_path / "whole" / "model")
    monkeypatch.setattr(gguf_file, "_CHUNK", 1000)  # no multiple of a row, nor a block
    source.write(path, tmp_path / "parts" / "model")
    whole, parts = (Checkpoint(tmp_path / name / "model") for name in ("whole", "parts"))
    for name, tensor in whole.tensors(whole.entries).items():
        assert torch.equal(tensor, parts.entry(name).read()), name


def test_a_head_that_repeats_the_embeddings_is_tied_again(tmp_path):
    dense = tiny_model(tmp_path / "dense", blocks=1, tie_word_embeddings=True)
    embeddings = arrays(dense)["token_embd.weight"]
    folder = source.converted(write(dense, tmp_path / "same.gguf", "Q8_0",
                                    tensors={"output.weight": embeddings}))
    assert read_config(folder)["tie_word_embeddings"] is True
    assert "lm_head.weight" not in Checkpoint(folder).entries
    other = embeddings.copy()
    other[-1, -1] += 100
    folder = source.converted(write(dense, tmp_path / "other.gguf", "Q8_0",
                                    tensors={"output.weight": other}))
    assert read_config(folder)["tie_word_embeddings"] is False
    assert "lm_head.weight" in Checkpoint(folder).entries


def test_heads_that_do_not_divide_the_hidden_size_become_a_mistral(tmp_path):
    dense = tiny_model(tmp_path / "dense", "mistral", blocks=1, heads=3, kv_heads=3)
    folder = source.converted(write(dense, tmp_path / "model.gguf"))
    assert read_config(folder)["model_type"] == "mistral"
    assert read_config(folder)["sliding_window"] is None
    torch.testing.assert_close(logits(load(folder)), logits(load(dense)), atol=1e-4, rtol=1e-4)


# Positions

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("scaling, metadata", [
    ({"rope_type": "linear", "factor": 4.0},
     {"ARCH__rope__scaling__type": "linear", "ARCH__rope__scaling__factor": 4.0}),
    ({"rope_type": "linear", "factor": 2.0}, {"ARCH__rope__scale_linear": 2.0}),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
     {"ARCH__rope__scaling__type": "yarn", "ARCH__rope__scaling__factor": 4.0,
      "ARCH__rope__scaling__original_context_length": 64}),
    (LLAMA3, {}),
], ids=["linear", "old-linear", "yarn", "llama3"])
def test_scaled_positions_are_read(tmp_path, scaling, metadata):
    rope = {**scaling, "rope_theta": 500000.0}
    dense = tiny_model(tmp_path / "dense", blocks=2, rope_parameters=rope)
    model = load(dense)
    tensors = {}
    if scaling is LLAMA3:  # llama.cpp knows it as a divisor of each frequency
        plain = 500000.0 ** -(np.arange(0, 32, 2, dtype=np.float32) / 32)
        tensors["rope_freqs.weight"] = plain / model.model.rotary_emb.inv_freq.numpy()
        assert {1.0, 8.0} < set(tensors["rope_freqs.weight"].round(4).tolist())
    folder = source.converted(write(dense, tmp_path / "model.gguf", tensors=tensors, **metadata))
    assert read_config(folder)["rope_parameters"] == rope
    torch.testing.assert_close(logits(load(folder)), logits(model), atol=1e-4, rtol=1e-4)


def test_other_scalings_are_refused(tmp_path, llama):
    path = tmp_path / "model.gguf"
    refused(write(llama, path, ARCH__rope__scaling__type="longrope",
                  ARCH__rope__scaling__factor=2.0), "longrope", "yarn")
    refused(write(llama, path, tensors={"rope_freqs.weight": np.linspace(1, 3, 16,
                                                                         dtype=np.float32)}),
            "rope_freqs.weight", "Llama 3")
    divisors = np.ones(16, dtype=np.float32)
    source.converted(write(llama, path, tensors={"rope_freqs.weight": divisors}))


# What is refused

@pytest.mark.parametrize("changed, words", [
    ({"general__architecture": "gemma2"}, ("gemma2", "qwen3")),
    ({"general__type": "adapter"}, ("adapter",)),
    ({"split__count": 3, "split__no": 0}, ("3 parts", "llama-gguf-split")),
    ({"ARCH__expert_count": 8}, ("llama.expert_count", "8")),
    ({"ARCH__logit_scale": 0.5}, ("llama.logit_scale", "0.5")),
    ({"ARCH__rope__dimension_count": 16}, ("llama.rope.dimension_count", "16", "32")),
    ({"ARCH__attention__value_length": 16}, ("llama.attention.value_length", "16")),
    ({"ARCH__feed_forward_length": [96, 64]}, ("llama.feed_forward_length", "block")),
    ({"ARCH__block_count": 3}, ("tensor blk.2.attn_k.weight is missing",)),
    ({"ARCH__block_count": 2**31}, ("too few",)),
    ({"ARCH__block_count": 1}, ("tensor blk.1.attn_k.weight",)),
    ({"ARCH__feed_forward_length": 128}, ("blk.0.ffn_", "96", "128")),
    ({"ARCH__attention__head_count": 0}, ("llama.attention.head_count",)),
    ({"ARCH__attention__head_count": "four"}, ("llama.attention.head_count", "four")),
    ({"ARCH__context_length": None}, ("no llama.context_length",)),
    ({"without": ("output_norm.weight",)}, ("tensor output_norm.weight is missing",)),
    ({"without": ("token_embd.weight",)}, ("tensor token_embd.weight is missing",)),
    ({"tensors": {"blk.0.attn_sinks.weight": np.ones(4, dtype=np.float32)}},
     ("blk.0.attn_sinks.weight",)),
    ({"tensors": {"blk.1.ffn_norm.weight": np.full(64, np.nan, dtype=np.float32)}},
     ("blk.1.ffn_norm.weight", "NaN")),
    ({"kind": "F16", "tensors": {"output_norm.weight": np.full(64, 1e6, dtype=np.float32)}},
     ("output_norm.weight", "float16")),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else None)
def test_what_the_checkpoint_cannot_say_is_refused_in_one_line(tmp_path, llama, changed, words):
    refused(write(llama, tmp_path / "model.gguf", **changed), *words)


def test_what_changes_nothing_is_passed_over(tmp_path, llama):
    path = write(llama, tmp_path / "model.gguf", ARCH__expert_count=0,
                 ARCH__tensor_data_layout="Meta AI original pth", ARCH__attention__causal=True,
                 ARCH__feed_forward_length=[96, 96], ARCH__attention__head_count_kv=[2, 2])
    torch.testing.assert_close(logits(load(source.converted(path))), logits(load(llama)))


def test_a_sliding_window_of_another_family_is_refused(tmp_path):
    dense = tiny_model(tmp_path / "dense", "qwen2", blocks=1)
    refused(write(dense, tmp_path / "model.gguf", ARCH__attention__sliding_window=8),
            "qwen2.attention.sliding_window", "8")
    source.converted(write(dense, tmp_path / "wide.gguf", ARCH__attention__sliding_window=256))


def test_a_file_that_is_cut_off_or_none_is_refused_wherever_it_ends(tmp_path, llama, cache):
    whole = write(llama, tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in (0, 2, 7, 20, 40, 300, 5000, 100_000, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        refused(path, "copy it again")
    path.write_bytes(b"PK\3\4" + whole[4:])
    refused(path, "copy it again")
    path.write_bytes(whole[:4] + (9).to_bytes(4, "little") + whole[8:])
    refused(path, "version 9")
    assert not any(folder.is_dir() for folder in cache.glob("bipdeploy/gguf/*"))


def test_types_that_cannot_be_read_and_the_other_byte_order_are_refused(tmp_path, llama):
    path = write(llama, tmp_path / "model.gguf")
    content = path.read_bytes()
    name = b"output_norm.weight"
    place = content.index(name) + len(name) + 4 + 8  # after the number of sizes and one size
    for number, words in ((999, "999"), (26, "I32")):
        path.write_bytes(content[:place] + number.to_bytes(4, "little") + content[place + 4:])
        refused(path, words)
    big = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(big, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(big, "big-endian", "gguf-convert-endian")


def test_without_the_package_the_line_says_what_to_install(tmp_path, llama, monkeypatch):
    path = write(llama, tmp_path / "model.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    refused(path, "pip install 'bipdeploy[gguf]'")


# The cache

def test_a_file_is_written_out_once_and_again_where_its_content_changes(tmp_path, llama):
    path = write(llama, tmp_path / "model.gguf")
    first = source.converted(path)
    written = {p: p.stat().st_mtime_ns for p in first.iterdir()}
    assert source.converted(path) == first
    shutil.copyfile(path, tmp_path / "renamed.gguf")
    assert source.converted(tmp_path / "renamed.gguf") == first
    assert {p: p.stat().st_mtime_ns for p in first.iterdir()} == written
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-40] ^= 1  # in a tensor: the header, the size and the time stay
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    second = source.converted(path)
    assert second != first
    assert Checkpoint(second).architecture == Checkpoint(first).architecture


def test_a_run_that_was_cut_off_leaves_nothing_that_the_next_would_take(tmp_path, llama,
                                                                        monkeypatch, cache):
    path = write(llama, tmp_path / "model.gguf")
    read = source.GgufFile.read

    def stops(self, name):
        if "layers.1" in name:
            raise KeyboardInterrupt
        return read(self, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(source.GgufFile, "read", stops)
        source.converted(path)
    assert not leftovers(cache) and not list(cache.rglob("*.safetensors"))
    Checkpoint(source.converted(path)).verify()


def test_two_at_once_end_with_one_whole_checkpoint(tmp_path, llama, cache):
    path = write(llama, tmp_path / "model.gguf")
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(source.converted(path)))
               for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1
    Checkpoint(found[0]).verify()
    assert not leftovers(cache)


def test_the_header_alone_gives_the_configuration(tmp_path, llama, cache):
    path = write(llama, tmp_path / "model.gguf", "Q8_0")
    found = source.config(path)
    assert not cache.exists()
    assert found == read_config(source.converted(path)) == source.config(path)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, llama, monkeypatch):
    path = write(llama, tmp_path / "model.gguf")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    refused(path, "XDG_CACHE_HOME")


def test_what_is_a_gguf_file(tmp_path, llama):
    path = write(llama, tmp_path / "model.gguf")
    assert source.is_gguf(path)
    assert source.is_gguf(path.rename(tmp_path / "model.bin"))
    (tmp_path / "broken.gguf").write_text("not one")
    assert source.is_gguf(tmp_path / "broken.gguf")
    assert not source.is_gguf(llama / "config.json")
    assert not source.is_gguf(tmp_path) and not source.is_gguf(tmp_path / "nothing.gguf")


def test_names_of_tensors_go_both_ways(llama):
    for name in Checkpoint(llama).entries:
        assert gguf_file._gguf_name(name) == theirs(name)
