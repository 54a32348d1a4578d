"""ONNX graphs: they compute what the sliced model computes, in every family, style and type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from bipdeploy.errors import InputError
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.ort import folder as onnx_folder
from bipdeploy.ort import graph
from bipdeploy.ort.runtime import OnnxModel
from tests.sliced import (
    architecture_of,
    draw_kept,
    loaded,
    logits,
    token_windows,
    write_biased,
    write_sliced,
)
from tests.test_slicing import LAYER_TYPES, QUERY_VARIANTS
from tests.tiny import VARIANTS, tiny_model

# (KV groups, channels) by block.
CHOICES = {"uniform": [(1, 56), (1, 56), (1, 56)], "per-block": [(1, 41), (0, 33), (2, 0)]}
# With query heads of each, of two KV heads with three.
QUERIES = {"queries-uniform": [(2, 56, 2)] * 3, "queries-and-groups": [(1, 56, 2)] * 3,
           "more-heads-on-fewer-kv-heads": [(2, 40, 1), (1, 41, 3), (2, 33, 1)],
           "queries-per-block": [(2, 41, 2), (0, 33), (2, 0, 1)]}
STYLES = list(graph.STYLES)
# Rotations that are no plain powers, over the 256 positions of a tiny model.
ROPE = {
    "llama3": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
             "original_max_position_embeddings": 64},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
}


def sliced(tmp: Path, choice: str, **settings: Any) -> Path:
    source = tiny_model(tmp / "model", **settings)
    kept = draw_kept(architecture_of(source), {**CHOICES, **QUERIES}[choice])
    return write_sliced(source, tmp / "sliced", kept)


def exported(source: Path, out: Path, style: str = "gqa", dtype: str = "float32") -> Path:
    onnx_folder.write(Checkpoint(source), out, style=style, dtype=dtype)
    return out


def continued(model: Any, ids: torch.Tensor, new_tokens: int = 32) -> torch.Tensor:
    """What the PyTorch model says greedily, without a cache."""
    said = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, use_cache=False,
                          eos_token_id=None, pad_token_id=0)
    return said[:, ids.shape[1]:]


def assert_equal(source: Path, folder: Path, tokens: int = 24) -> None:
    """Logits within rounding, and the same 32 tokens."""
    ids, reference, model = token_windows(2, tokens), loaded(source), OnnxModel(folder, "cpu")
    difference = float((model.logits(ids) - logits(reference, ids)).abs().max())
    assert difference < 1e-4
    assert torch.equal(model.generate(ids, 32), continued(reference, ids))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_graph_computes_what_the_sliced_model_does(name, choice, tmp_path):
    source = sliced(tmp_path, choice, **VARIANTS[name])
    for style in STYLES:
        assert_equal(source, exported(source, tmp_path / style, style))
    for file in (onnx_folder.MODEL, onnx_folder.LAST):
        onnx.checker.check_model(str(tmp_path / "std" / file), full_check=True)


@pytest.mark.parametrize("choice", QUERIES)
@pytest.mark.parametrize("name", QUERY_VARIANTS)
def test_a_graph_of_a_model_without_some_query_heads(name, choice, tmp_path):
    source = sliced(tmp_path, choice, **QUERY_VARIANTS[name], heads=6, hidden_size=96)
    for style in STYLES:
        assert_equal(source, exported(source, tmp_path / style, style))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", LAYER_TYPES)
def test_windows_on_some_layers_only(family, style, tmp_path):
    source = sliced(tmp_path, "per-block", family=family, **LAYER_TYPES[family])
    assert_equal(source, exported(source, tmp_path / "onnx", style))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["llama-gqa", "mistral-gqa"])
def test_biases_of_the_repair(name, style, tmp_path):
    source = write_biased(sliced(tmp_path, "per-block", **VARIANTS[name]), tmp_path / "biased")
    assert_equal(source, exported(source, tmp_path / "onnx", style))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", ROPE)
def test_scaled_rotations(kind, style, tmp_path):
    source = sliced(tmp_path, "per-block", rope_parameters=ROPE[kind])
    assert_equal(source, exported(source, tmp_path / "onnx", style), tokens=200)


@pytest.mark.parametrize("style", STYLES)
def test_tied_embeddings_are_stored_once(style, tmp_path):
    source = sliced(tmp_path, "per-block", tie_word_embeddings=True)
    folder = exported(source, tmp_path / "onnx", style)
    assert_equal(source, folder)
    arch = architecture_of(source)
    tables = 4 * arch.max_positions * arch.head_dim  # cos and sin, in float32
    size = (folder / onnx_folder.DATA).stat().st_size
    assert 0 <= 4 * arch.parameters() + tables - size < 2048  # the norms lie in the graph itself


@pytest.mark.parametrize("style", STYLES)
def test_a_model_without_any_attention_has_no_cache(style, tmp_path):
    source = tiny_model(tmp_path / "model")
    kept = draw_kept(architecture_of(source), [(0, 64), (0, 0), (0, 32)])
    source = write_sliced(source, tmp_path / "sliced", kept)
    folder = exported(source, tmp_path / "onnx", style)
    assert_equal(source, folder)
    inputs = onnx.load(folder / onnx_folder.MODEL, load_external_data=False).graph.input
    assert [i.name for i in inputs] == ["input_ids", "attention_mask"]


def test_caches_are_numbered_over_the_blocks_that_have_attention(tmp_path):
    folder = exported(sliced(tmp_path, "per-block"), tmp_path / "onnx")
    model = onnx.load(folder / onnx_folder.MODEL, load_external_data=False)
    heads = {i.name: i.type.tensor_type.shape.dim[1].dim_value for i in model.graph.input[2:]}
    assert heads == {"past_key_values.0.key": 1, "past_key_values.0.value": 1,
                     "past_key_values.1.key": 2, "past_key_values.1.value": 2}
    assert {p.key: p.value for p in model.metadata_props}["cached_blocks"] == "[0, 2]"
    config = json.loads((folder / onnx_folder.GENAI).read_text())
    assert config["model"]["decoder"]["num_hidden_layers"] == 2


@pytest.mark.parametrize("style", STYLES)
def test_float16_stays_near(style, tmp_path):
    source, ids = sliced(tmp_path, "per-block"), token_windows(2, 24)
    folder = exported(source, tmp_path / "onnx", style, "float16")
    half = exported(source, tmp_path / "whole", style)
    assert (2 * (folder / onnx_folder.DATA).stat().st_size
            == pytest.approx((half / onnx_folder.DATA).stat().st_size, rel=0.01))
    expected = logits(loaded(source), ids)
    difference = float((OnnxModel(folder, "cpu").logits(ids) - expected).abs().max())
    assert difference < 0.01 * float(expected.abs().max())


def test_bfloat16_weights_are_the_checkpoints(tmp_path):
    source = tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    folder = exported(source, tmp_path / "onnx", dtype="bfloat16")
    model = onnx.load(folder / onnx_folder.MODEL)
    stored = {t.name: t for t in model.graph.initializer}["model.layers.1.mlp.gate_proj.weight"]
    assert stored.data_type == onnx.TensorProto.BFLOAT16
    weight = Checkpoint(source).tensors(["model.layers.1.mlp.gate_proj.weight"]).popitem()[1]
    bits = torch.from_numpy(np.frombuffer(stored.raw_data, np.int16).reshape(64, 96).copy())
    assert torch.equal(bits.view(torch.bfloat16).T, weight)


@pytest.mark.parametrize("choice", ["per-block", "more-heads-on-fewer-kv-heads"])
@pytest.mark.parametrize("style", STYLES)
def test_onnxruntime_genai_runs_the_folder(style, choice, tmp_path):
    import onnxruntime_genai

    layout = {"heads": 6, "hidden_size": 96} if choice in QUERIES else {}
    source, ids = sliced(tmp_path, choice, **layout), token_windows(1, 24)
    model = onnxruntime_genai.Model(str(exported(source, tmp_path / "onnx", style)))
    settings = onnxruntime_genai.GeneratorParams(model)
    settings.set_search_options(max_length=24 + 32, do_sample=False)
    generator = onnxruntime_genai.Generator(model, settings)
    generator.append_tokens(ids.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    said = torch.tensor(np.array(generator.get_sequence(0)[24:]))
    assert torch.equal(said, continued(loaded(source), ids)[0])


def test_stop_tokens_are_those_of_the_generation_settings(tmp_path):
    source = sliced(tmp_path, "uniform")
    stated = {"eos_token_id": [5, 7], "bos_token_id": None, "do_sample": True, "top_k": 20}
    (source / "generation_config.json").write_text(json.dumps(stated))
    config = json.loads((exported(source, tmp_path / "onnx") / onnx_folder.GENAI).read_text())
    assert config["model"]["eos_token_id"] == [5, 7]
    assert config["model"]["bos_token_id"] == 0
    assert config["search"] == {"do_sample": True, "temperature": 1.0, "top_k": 20, "top_p": 1.0,
                                "max_length": 256, "past_present_share_buffer": True}
    (source / "generation_config.json").write_text("{")
    refused(source, ["generation_config.json", "cannot be read"])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PyTorch's own, of its own
def test_the_exporter_of_pytorch_agrees(tmp_path):
    source = sliced(tmp_path, "uniform", family="qwen3")

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = loaded(source)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    ids = token_windows(1, 12)
    program = torch.onnx.export(Flat().eval(), (ids,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(),
                                           providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0])
    ours = OnnxModel(exported(source, tmp_path / "onnx"), "cpu").logits(ids)
    assert float((found - ours).abs().max()) < 1e-4


def refused(source: Path, words: list[str], style: str = "gqa", dtype: str = "float32") -> None:
    out = source.parent / f"refused-{style}"
    with pytest.raises(InputError) as caught:
        onnx_folder.write(Checkpoint(source), out, style=style, dtype=dtype)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_styles_and_types_are_refused(tiny):
    refused(tiny, ["'gqqa'", "did you mean 'gqa'"], style="gqqa")
    refused(tiny, ["'int8'", "float16"], dtype="int8")


@pytest.mark.parametrize("settings, words", [
    ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0,
                          "short_factor": [1.0] * 16, "long_factor": [2.0] * 16,
                          "original_max_position_embeddings": 64}},
     ["longrope", "max_position_embeddings", "64"]),
])
def test_models_that_no_graph_can_hold_are_refused(settings, words, tmp_path):
    refused(tiny_model(tmp_path / "model", **settings), words)


def test_a_family_without_a_writer_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(graph, "WRITTEN", ("mistral",))
    refused(tiny, ["'llama'", "no ONNX writer", "mistral"])


def test_query_heads_must_be_a_multiple_of_kv_heads(tmp_path):
    source = tiny_model(tmp_path / "model", kv_heads=4)
    config = json.loads((source / "config.json").read_text()) | {"num_key_value_heads": 3}
    (source / "config.json").write_text(json.dumps(config))
    refused(source, ["4 query heads", "3 KV heads"])


def test_weights_that_do_not_fit_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    source = tiny_model(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = 1e5
    save_file(tensors, source / "model.safetensors")
    refused(source, [name, "float16", "bfloat16"], dtype="float16")
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, source / "model.safetensors")
    refused(source, [name, "[95, 64]", "[96, 64]"], style="std")


def test_a_damaged_weight_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    source = tiny_model(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.self_attn.k_proj.weight"][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors")
    refused(source, ["model.layers.2.self_attn.k_proj.weight", "NaN"])
