"""Running ONNX folders: padding, caches, sampling, quantised weights, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch

from bipdeploy.errors import InputError
from bipdeploy.exporters import onnx as onnx_exporter
from bipdeploy.measuring.perplexity import forward_of, perplexity
from bipdeploy.ort import folder as onnx_folder
from bipdeploy.ort import installed, session
from bipdeploy.ort.folder import DATA, LAST, MODEL, RECORD
from bipdeploy.ort.quantize import KINDS, quantize
from bipdeploy.ort.runtime import OnnxModel
from bipdeploy.ort.sampling import Sampling
from bipdeploy.pipeline import preflight
from bipdeploy.planning.job import Job
from bipdeploy.planning.resolved import resolve
from bipdeploy.recipe.recipe import Recipe
from tests.sliced import loaded, logits, token_windows
from tests.test_ort_graph import STYLES, continued, exported, sliced
from tests.tiny import VARIANTS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A sliced checkpoint with a window, a removed attention and a removed FFN."""
    return sliced(tmp_path_factory.mktemp("source"), "per-block", **VARIANTS["mistral-window"])


@pytest.fixture(scope="module", params=STYLES)
def folder(request, source, tmp_path_factory) -> Path:
    """That checkpoint in either style."""
    return exported(source, tmp_path_factory.mktemp("onnx") / request.param, request.param)


@pytest.fixture
def copy(source, tmp_path) -> Path:
    """A folder to be damaged."""
    return exported(source, tmp_path / "onnx")


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of rows of 17, 9 and 3 tokens, padded on one side."""
    ids, mask = token_windows(3, 17), torch.ones(3, 17, dtype=torch.long)
    for row, tokens in enumerate((17, 9, 3)):
        mask[row, slice(tokens, None) if side == "right" else slice(0, 17 - tokens)] = 0
    return ids, mask


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_row_is_read_as_if_it_were_alone(source, folder, side):
    ids, mask = padded(side)
    model, reference = OnnxModel(folder, "cpu"), loaded(source)
    found, said = model.logits(ids, mask), model.generate(ids, 32, mask=mask)
    for row in range(3):
        real = mask[row] == 1
        alone = ids[row, real][None]
        difference = float((found[row, real] - logits(reference, alone)[0]).abs().max())
        assert difference < 1e-4
        assert torch.equal(said[row], continued(reference, alone)[0])


def test_the_standard_graph_itself_takes_left_padding(source, tmp_path):
    ids, mask = padded("left")
    opened = session.open_session(exported(source, tmp_path / "onnx", "std") / MODEL, CPU)
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    feed |= {i.name: np.zeros((3, i.shape[1], 0, 32), np.float32)
             for i in opened.get_inputs()[2:]}
    found = torch.from_numpy(opened.run(["logits"], feed)[0])
    assert found.isfinite().all()
    for row in range(3):
        alone = ids[row, mask[row] == 1][None]
        difference = float((found[row, -alone.shape[1]:] - logits(loaded(source), alone)[0])
                           .abs().max())
        assert difference < 1e-4


def test_steps_give_the_logits_of_the_whole(source, folder):
    ids = token_windows(2, 20)
    expected = logits(loaded(source), ids)
    model = OnnxModel(folder, "cpu", threads=1)
    found, cache = model.prefill(ids[:, :12], room=8)
    for position in range(12, 20):
        assert float((found - expected[:, position - 1]).abs().max()) < 1e-4
        found = model.step(ids[:, position], cache)
    with pytest.raises(InputError, match="the cache is full"):
        model.step(ids[:, 0], cache)


def test_its_perplexity_is_the_models(source, folder):
    ids = token_windows(1, 96)[0]
    expected = perplexity(forward_of(loaded(source)), ids, window=24, batch=2)
    found = perplexity(OnnxModel(folder, "cpu").logits, ids, window=24, batch=3)
    assert found.nats == pytest.approx(expected.nats, rel=1e-5)


def test_sampling_follows_its_seed_and_its_limits(folder):
    model, ids = OnnxModel(folder, "cpu"), token_windows(2, 8)
    greedy = model.generate(ids, 12)
    drawn = [model.generate(ids, 12, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(model.generate(ids, 12, temperature=2.0, top_k=1), greedy)
    assert torch.equal(model.generate(ids, 12, temperature=2.0, top_p=1e-9), greedy)


def test_sampling_draws_by_the_odds():
    odds = torch.tensor([0.5, 0.3, 0.15, 0.05])
    rows, generator = odds.log().expand(4000, 4), torch.Generator().manual_seed(0)
    for sampling, allowed in ((Sampling(1.0), 4), (Sampling(1.0, top_k=3), 3),
                              (Sampling(1.0, top_p=0.7), 2)):
        counted = sampling.choose(rows, generator).bincount(minlength=4) / 4000
        wanted = torch.where(torch.arange(4) < allowed, odds, 0.0)
        assert float((counted - wanted / wanted.sum()).abs().max()) < 0.03


def test_generation_stops_row_by_row_and_tells_each_token(folder):
    model, ids = OnnxModel(folder, "cpu"), token_windows(2, 8)
    whole = model.generate(ids, 12)
    told: list[torch.Tensor] = []
    stop = int(whole[0, 3])
    first = whole[0].tolist().index(stop)
    said = model.generate(ids, 12, stop=[stop], on_token=told.append)
    assert torch.equal(torch.stack(told, 1), said)
    assert said[0].tolist() == [*whole[0, :first].tolist(), *[stop] * (said.shape[1] - first)]
    assert model.generate(ids[:1], 12, stop=[stop]).shape == (1, first + 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [VARIANTS["llama-gqa"],
                                      {**VARIANTS["qwen2-gqa"], "tie_word_embeddings": True}])
def test_quantised_folders_stay_close(settings, kind, tmp_path, capfd):
    source, ids = sliced(tmp_path, "per-block", **settings), token_windows(2, 24)
    expected = logits(loaded(source), ids)
    for style in STYLES:
        whole = exported(source, tmp_path / style, style)
        capfd.readouterr()
        quantize(whole, tmp_path / f"{style}-small", kind)
        assert capfd.readouterr() == ("", "")
        small = tmp_path / f"{style}-small"
        assert {p.name for p in small.iterdir()} == {p.name for p in whole.iterdir()}
        model = OnnxModel(small, "cpu")
        error = (model.logits(ids) - expected).square().mean() / expected.square().mean()
        assert math.sqrt(error) < (0.5 if kind == "int4" else 0.12)
        assert model.generate(ids, 4).shape == (2, 4)
        size = {f: (f / DATA).stat().st_size for f in (whole, small)}
        if kind != "int8_dynamic":  # which keeps the embeddings, most of a tiny model
            assert size[small] < 0.4 * size[whole]


def test_a_hidden_size_that_blocks_do_not_divide_keeps_its_embeddings(tmp_path):
    source = sliced(tmp_path, "per-block", hidden_size=72, tie_word_embeddings=True)
    quantize(exported(source, tmp_path / "onnx"), tmp_path / "small", "int8")
    ids = token_windows(1, 16)
    expected = logits(loaded(source), ids)
    found = OnnxModel(tmp_path / "small", "cpu").logits(ids)
    assert float((found - expected).norm() / expected.norm()) < 0.12


def refusal(call, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_quantising_refuses(source, tmp_path):
    half = exported(source, tmp_path / "half", dtype="float16")
    refusal(lambda: quantize(half, tmp_path / "a", "int4"), str(half), "float16", "float32 export")
    refusal(lambda: quantize(half, tmp_path / "a", "int3"), "'int3'", "int4")
    whole = exported(source, tmp_path / "whole")
    quantize(whole, tmp_path / "int4", "int4")
    refusal(lambda: quantize(tmp_path / "int4", tmp_path / "b", "int8"), "int4", "float32 export")


@pytest.mark.parametrize("name", [MODEL, LAST, DATA])
def test_a_file_that_is_missing_or_cut_off_is_named(copy, name):
    path = copy / name
    path.write_bytes(path.read_bytes()[:-100])
    refusal(lambda: OnnxModel(copy, "cpu"), str(path), "bytes", "copy it again")
    path.unlink()
    refusal(lambda: OnnxModel(copy, "cpu"), str(path), "missing")


def test_a_folder_that_is_none_or_damaged_is_refused(copy, tmp_path):
    refusal(lambda: OnnxModel(tmp_path / "nowhere", "cpu"), "no ONNX folder", RECORD)
    onnx_folder.verify(copy)
    data = bytearray((copy / DATA).read_bytes())
    data[1000] ^= 1
    (copy / DATA).write_bytes(data)
    refusal(lambda: onnx_folder.verify(copy), str(copy / DATA), "SHA-256")
    record = json.loads((copy / RECORD).read_text())
    (copy / RECORD).write_text(json.dumps({**record, "blocks": [{"heads": 1}]}))
    refusal(lambda: OnnxModel(copy, "cpu"), RECORD, "damaged")
    (copy / RECORD).write_text("{")
    refusal(lambda: OnnxModel(copy, "cpu"), RECORD, "damaged")


def test_a_missing_or_old_onnxruntime_is_named(source, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(onnxruntime, "__version__", "1.22.1")
    standard = exported(source, tmp_path / "std", "std")
    refusal(lambda: OnnxModel(standard, "cpu"), "1.22.1", "Attention", "1.24")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refusal(lambda: OnnxModel(folder, "cpu"), "onnxruntime is not installed", "bipdeploy[onnx]",
            "bipdeploy[onnx-gpu]")
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    refusal(lambda: exported(source, tmp_path / "none"), "onnx_ir is not", "bipdeploy[onnx]")


def test_an_operator_that_onnxruntime_lacks_is_named(copy):
    model = onnx_ir.load(copy / MODEL)
    next(n for n in model.graph if n.op_type == "GroupQueryAttention").op_type = "NextAttention"
    onnx_ir.save(model, copy / MODEL)
    refusal(lambda: session.open_session(copy / MODEL, CPU), "NextAttention",
            f"onnxruntime {onnxruntime.__version__}", "newer")


def test_cuda_is_never_replaced_silently(source, copy, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refusal(lambda: OnnxModel(copy, "gpu"), "'gpu'", "auto, cpu, cuda")
    refusal(lambda: OnnxModel(copy, "cuda"), "cuda was asked for", "bipdeploy[onnx-gpu]")
    assert OnnxModel(copy, "auto").device == CPU
    # As with onnxruntime-gpu on a machine whose CUDA libraries do not load.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [session.CUDA, session.CPU])
    refusal(lambda: OnnxModel(copy, "cuda"), "cuda was asked for", "PyTorch finds no CUDA GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refusal(lambda: OnnxModel(copy, "cuda"), "GroupQueryAttention has no float32")
    assert OnnxModel(copy, "auto").device == CPU
    quantize(copy, tmp_path / "dynamic", "int8_dynamic")
    refusal(lambda: OnnxModel(tmp_path / "dynamic", "cuda"), "int8_dynamic runs on a CPU only")
    half = exported(source, tmp_path / "half", dtype="float16")
    assert OnnxModel(half, "auto").device.type == "cuda"
    opened = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "cuda_version", "12.8", raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession",
                        lambda path, options, providers: opened(path, options, [session.CPU]))
    refusal(lambda: session.open_session(half / MODEL, torch.device("cuda", 0)),
            "could not start CUDAExecutionProvider", "built for CUDA 12.8",
            f"PyTorch {torch.__version__}", "install another onnxruntime-gpu")


def recipe(device: str = "auto", **onnx) -> Recipe:
    return Recipe.model_validate({
        "name": "r", "model": {"id": "builtin:pico", "device": device},
        "calibration": {"data": "builtin:pydocs"}, "prune": {"ratio": 0.3},
        "export": {"onnx": {"enabled": True, **onnx}}})


def test_auto_runs_on_the_cpu_what_onnxruntime_cannot_run_on_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert session.device_of(recipe()).type == "cpu"
    assert "bipdeploy[onnx-gpu]" in session.why_on_cpu(recipe())
    assert session.device_of(recipe("cuda")).type == "cuda"  # refused where it is opened
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [session.CUDA, session.CPU])
    assert session.device_of(recipe()).type == "cuda" and session.why_on_cpu(recipe()) is None
    assert session.device_of(recipe(quantize=["int8"])).type == "cuda"
    assert session.device_of(recipe(quantize=["int8", "int8_dynamic"])).type == "cpu"
    assert session.device_of(recipe(style="gqa", dtype="float32")).type == "cpu"
    # Quantised copies compute in float32.
    assert session.device_of(recipe(style="gqa", dtype="float16", quantize=["int4"])).type == "cpu"
    assert session.device_of(recipe(dtype="float16", quantize=["int4"])).type == "cuda"


def test_a_gpu_without_an_onnxruntime_for_it_is_refused_before_a_run(monkeypatch):
    monkeypatch.setattr(installed, "hardware", lambda: {"gpus": ["NVIDIA H200"]})
    wanted = resolve(recipe("cuda"))
    refusal(lambda: preflight.refuse(wanted), "model.device: cuda", "built for the CPU",
            "bipdeploy[onnx-gpu]")
    preflight.refuse(wanted, here=False)  # a plan for another machine
    refusal(lambda: preflight.refuse(resolve(recipe(dtype="bfloat16"))),
            "export.onnx.dtype", "no bfloat16 on a CPU")
    preflight.refuse(resolve(recipe()))
    refusal(lambda: preflight.refuse(resolve(recipe("cuda", quantize=["int8_dynamic"])),
                                     here=False), "export.onnx", "int8_dynamic")


def test_operators_are_found_on_the_provider_that_runs_them(copy):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    opened = onnxruntime.InferenceSession(str(copy / MODEL), options, [session.CPU])
    assert {"GroupQueryAttention", "MatMul"} <= set(session.heavy_on(opened, session.CPU))
    assert session.heavy_on(opened, session.CUDA) == []


def test_bfloat16_is_refused_on_a_cpu(source, tmp_path):
    folder = exported(source, tmp_path / "onnx", dtype="bfloat16")
    refusal(lambda: OnnxModel(folder, "cpu"), "bfloat16", "float32")


def test_what_a_model_refuses_to_read(copy):
    model, ids = OnnxModel(copy, "cpu"), token_windows(2, 250)
    assert model.generate(ids, 6).shape == (2, 6)
    refusal(lambda: model.generate(ids, 7), "250 tokens and 7 to follow", "256")
    refusal(lambda: model.logits(token_windows(1, 257)), "257 tokens", "256")
    refusal(lambda: model.logits(torch.tensor([[1, 4096]])), "4096", "vocabulary")
    refusal(lambda: model.logits(torch.tensor([[-1]])), "-1", "vocabulary")
    refusal(lambda: model.logits(torch.tensor([1, 2])), "[rows, tokens]", "[2]")
    refusal(lambda: model.logits(ids[:, :3], torch.ones(2, 2)), "mask", "[2, 2]", "[2, 3]")
    refusal(lambda: model.logits(ids[:, :3], torch.tensor([[1, 0, 0], [0, 0, 0]])), "row 1")
    refusal(lambda: model.generate(ids[:, :3], 0), "new_tokens is 0")
    refusal(lambda: OnnxModel(copy, "cpu", threads=0).logits(ids[:, :3]), "threads is 0")
    for settings, words in (({"temperature": -1.0}, "temperature"), ({"top_k": -1}, "top_k"),
                            ({"top_p": 0.0}, "top_p"), ({"temperature": math.nan}, "temperature")):
        refusal(lambda given=settings: model.generate(ids[:, :3], 2, **given), words)


def test_a_folder_may_be_moved(copy, tmp_path):
    expected = OnnxModel(copy, "cpu").generate(token_windows(1, 8), 4)
    moved = Path(shutil.move(copy, tmp_path / "elsewhere"))
    assert torch.equal(OnnxModel(moved, "cpu").generate(token_windows(1, 8), 4), expected)


@pytest.mark.parametrize(("device", "graph", "copy"), [
    ("cpu", ("gqa", "float32"), "gqa"), ("cuda", ("gqa", "float16"), "std")])
def test_auto_chooses_what_the_device_has_kernels_for(monkeypatch, source, tmp_path, device, graph,
                                                      copy):
    """On a GPU float16 for bfloat16, and the standard operators where copies are float32."""
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    monkeypatch.setattr(onnx_exporter, "device_of", lambda _: torch.device(device))
    job = Job(recipe(quantize=["int4"]), {"pruned": folder}, tmp_path)
    assert onnx_exporter.style_and_dtype(job) == graph
    assert onnx_exporter.style_of(job, "float32") == copy
