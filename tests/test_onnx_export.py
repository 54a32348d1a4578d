"""ONNX in the pipeline: the artefact itself is verified, evaluated, timed and generated from."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoTokenizer

from bipdeploy import api
from bipdeploy.errors import StageError
from bipdeploy.ort import folder as onnx_folder
from bipdeploy.ort import installed
from bipdeploy.ort.runtime import OnnxModel
from bipdeploy.running import artifacts
from bipdeploy.serving import generation
from tests.running import SMOKE, bipdeploy_here, refused
from tests.sliced import loaded

pytestmark = pytest.mark.slow

PROMPT = "Return the number of"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The smoke recipe with widths by block, as an ONNX graph and an int4 copy."""
    settings = {"prune.layers": "global", "bench.torch.enabled": "false",
                "export.onnx.enabled": "true", "export.onnx.quantize": "[int4]",
                "bench.onnx.enabled": "true", "bench.onnx.prompt_tokens": "16",
                "bench.onnx.new_tokens": "4", "bench.onnx.repeats": "3",
                "gates.onnx.perplexity.versus_torch.max": "1.001",
                "gates.onnx.int4.perplexity.ratio.max": "9"}
    return api.run(SMOKE, [f"{name}={value}" for name, value in settings.items()],
                   tmp_path_factory.mktemp("runs"))


def test_the_graph_is_verified_against_the_sliced_model(exported):
    record = artifacts.read_json(exported.folder / "export/export.json")["onnx"]
    checked = record["verified"]
    assert checked["relative_logit_difference"] < 1e-4
    assert checked["tokens"]["equal_tokens"] + checked["tokens"]["ties"] == 4
    assert checked["genai"]["status"] == "verified", checked["genai"]
    assert 0 < record["quantized"]["int4"]["relative_logit_difference"] < 1


def test_perplexity_is_that_of_the_graph_itself(exported):
    found = exported.figures
    assert found["onnx.perplexity.versus_torch"] == pytest.approx(1, abs=0.001)
    assert found["onnx.perplexity.pruned"] != found["onnx.int4.perplexity.pruned"]
    assert found["onnx.perplexity.ratio"] == pytest.approx(found["perplexity.ratio"], rel=0.001)
    assert found["onnx.int4.bytes.pruned"] < found["onnx.bytes.pruned"] / 2
    assert exported.failed_gates == []


def test_speed_of_the_graph_and_its_quantised_copy_is_in_figures_and_report(exported):
    for name in ("onnx.prefill", "onnx.decode", "onnx.int4.decode"):
        for kind in ("dense", "pruned", "speedup", "versus_torch"):
            assert exported.figures[f"{name}.{kind}"] > 0
    report = (exported.folder / "report/report.md").read_text()
    for row in ("ONNX: perplexity", "ONNX int4: decode", "ONNX int4: weights"):
        assert f"| {row} |" in report
    assert "`onnx.decode.versus_torch`" in report
    assert not list((exported.folder / "bench").glob(".dense*"))


def test_a_graph_that_does_not_agree_fails_the_stage(exported, tmp_path, monkeypatch):
    write = onnx_folder.write

    def wrong(source, out, **options):
        write(source, out, **options)
        data = out / onnx_folder.DATA
        values = torch.frombuffer(bytearray(data.read_bytes()), dtype=torch.float32)
        data.write_bytes((values * 1.01).numpy().tobytes())

    monkeypatch.setattr(onnx_folder, "write", wrong)
    with pytest.raises(StageError, match="ONNX graph does not agree"):
        api.export(exported.folder / "recover/model", tmp_path / "out",
                   ["export.onnx.enabled=true", "model.device=cpu"])
    assert not (tmp_path / "out").exists()


def test_a_missing_library_is_named_before_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(installed.importlib.util, "find_spec",
                        lambda name: None if name == "onnxruntime" else object())
    done = bipdeploy_here("run", SMOKE, "--runs", tmp_path, "--set", "export.onnx.enabled=true")
    refused(done, 2, "onnxruntime is not installed", "bipdeploy[onnx]")
    assert not (tmp_path / "smoke" / "score").exists()


def test_a_benchmark_of_what_is_not_written_is_a_fault(tmp_path):
    done = bipdeploy_here("run", SMOKE, "--runs", tmp_path, "--set", "bench.onnx.enabled=true")
    assert done.returncode == 2
    assert "export.onnx.enabled is false" in done.stderr


def test_bfloat16_for_a_cpu_is_refused(tmp_path):
    done = bipdeploy_here("run", SMOKE, "--runs", tmp_path, "--set", "export.onnx.enabled=true",
                          "--set", "export.onnx.dtype=bfloat16", "--set", "model.device=cpu")
    refused(done, 2, "export.onnx.dtype", "bfloat16")


# bipdeploy generate

def expected(folder, new_tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = loaded(folder).generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1]:])


@pytest.mark.parametrize("place", ["export/onnx", "export/transformers", ""])
def test_generating_from_an_artefact(exported, place):
    done = bipdeploy_here("generate", exported.folder / place, PROMPT, "--new-tokens", 12)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == expected(exported.folder / "export/transformers",
                                                12).rstrip("\n")


def test_sampling_repeats_with_its_seed(exported):
    folder = exported.folder / "export/onnx"
    texts = ["".join(generation.generate(folder, PROMPT, generation.Sampling(
        8, temperature=1.0, seed=seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_dense_and_pruned_side_by_side(exported):
    done = bipdeploy_here("generate", exported.folder, PROMPT, "--new-tokens", 8, "--compare")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("\n", " ")
    assert "dense: " in lines
    assert "pruned: " in lines


@pytest.mark.parametrize(("words", "said"), [
    (("--engine", "onnxx"), "did you mean 'onnx'?"),
    (("--new-tokens", 300), "maximum of 256"),
    (("--temperature", -1), "temperature"),
])
def test_what_cannot_be_generated(exported, words, said):
    done = bipdeploy_here("generate", exported.folder / "export/onnx", PROMPT, *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_comparing_what_is_not_of_a_run(tiny):
    refused(bipdeploy_here("generate", tiny, PROMPT, "--compare"), 2, "--compare", "run's folder")


def test_a_damaged_folder_is_named(exported, tmp_path):
    copy = shutil.copytree(exported.folder / "export/onnx", tmp_path / "onnx")
    data = copy / onnx_folder.DATA
    data.write_bytes(data.read_bytes()[:-8])
    refused(bipdeploy_here("generate", copy, PROMPT), 2, onnx_folder.DATA, "cut off")
    data.unlink()
    refused(bipdeploy_here("generate", copy, PROMPT), 2, onnx_folder.DATA, "missing")


@pytest.mark.vllm
def test_generating_with_vllm(exported):
    done = bipdeploy_here("generate", exported.folder, PROMPT, "--new-tokens", 8, "--engine",
                          "vllm")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_folder_says_what_is_in_it(exported):
    contents = OnnxModel(exported.folder / "export/onnx", "cpu").contents
    assert contents.dtype == "float32"
    assert len(contents.blocks) == 7
