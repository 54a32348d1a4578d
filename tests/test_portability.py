"""Exported checkpoints in other engines: a clean environment, real vLLM, the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bipdeploy.exporters import portability
from bipdeploy.exporters import vllm as target
from bipdeploy.exporters.portability import Question
from bipdeploy.model import formats, routes
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.model.families import architecture
from bipdeploy.model.routes import ROUTES, Route
from bipdeploy.planning.job import Job
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.reporting import portability as shown
from bipdeploy.serving import engine as engines
from tests.sliced import (
    architecture_of,
    draw_kept,
    loaded,
    logits,
    token_windows,
    write_biased,
    write_sliced,
)
from tests.tiny import VARIANTS, tiny_model

pytestmark = pytest.mark.slow

# (KV heads as a share of the dense, FFN channels of 96) for each of four blocks.
UNIFORM = [(0.5, 48)] * 4
THREE_QUARTERS = [(0.75, 48)] * 4
PER_BLOCK = [(0.5, 48), (0, 64), (1, 0), (0.5, 40)]  # block 1 has no attention, block 2 no FFN
# With query heads of each, of two KV heads with three.
QUERIES_UNIFORM = [(1, 48, 2)] * 4
QUERIES_PER_BLOCK = [(1, 48, 1), (0, 64), (1, 0, 2), (0.5, 40, 2)]
MORE_ON_FEWER = [(1, 48, 1), (0.5, 64, 3), (1, 40, 1), (0.5, 48, 2)]
SIX_HEADS = {"heads": 6, "hidden_size": 96}


def question(folder: Path, **changes: Any) -> Question:
    asked = {"seed": 0, "prompts": 3, "new_tokens": 12, "dtype": "float32", "device": "cpu"}
    return portability.draw_question(architecture_of(folder), **{**asked, **changes})


def made(folder: Path, variant: str, shares: Sequence[tuple[float, ...]], **settings: Any
         ) -> tuple[Path, Path]:
    """A sliced tiny model, and the folder that the export wrote from it."""
    dense = tiny_model(folder / "dense", blocks=4, **VARIANTS[variant], **settings)
    arch = architecture_of(dense)
    kept = draw_kept(arch, [(int(share * arch.blocks[0].kv_heads), *own) for share, *own in shares])
    sliced = write_sliced(dense, folder / "sliced", kept)
    target.write(Checkpoint(sliced), folder / "written", tensor_parallel=1)
    return sliced, folder / "written"


def agrees(name: str, sliced: Path, written: Path) -> dict[str, Any]:
    """The result of one route; fails where it is not verified with every token equal."""
    asked = question(sliced)
    reference = portability.reference(sliced, asked)
    engine = engines.find() if ROUTES[name].engine == "vllm" else None
    result = portability.verify(name, written, asked, reference, engine)
    assert result["status"] == "verified", result
    assert result["equal_tokens"] + result["ties"] == len(asked.prompts)
    return result


# What is written

@pytest.mark.parametrize("variant", VARIANTS)
def test_the_folder_for_vllm_holds_the_same_model(tmp_path, variant):
    sliced, written = made(tmp_path, variant, PER_BLOCK)
    ids = token_windows(2, 24)
    torch.testing.assert_close(logits(loaded(written), ids), logits(loaded(sliced), ids))


def test_a_removed_attention_is_written_as_zero_heads_that_divide(tmp_path):
    sliced, _ = made(tmp_path, "llama-gqa", PER_BLOCK)
    target.write(Checkpoint(sliced), tmp_path / "split", tensor_parallel=4)
    checkpoint = Checkpoint(tmp_path / "split")
    assert checkpoint.config[formats.ZERO_ATTENTION] == [1]
    block = architecture(checkpoint.config).blocks[1]
    assert (block.heads, block.kv_heads) == (4, 1)
    tensors = checkpoint.block(1)
    assert not tensors["self_attn.v_proj.weight"].any()
    assert tensors["self_attn.q_proj.weight"].shape == (4 * 32, 64)
    ids = token_windows(1, 16)
    torch.testing.assert_close(logits(loaded(tmp_path / "split"), ids),
                               logits(loaded(sliced), ids))


def test_nothing_is_rewritten_where_vllm_reads_the_checkpoint_as_it_is(tmp_path):
    sliced, written = made(tmp_path, "llama-gqa", UNIFORM)
    assert Checkpoint(written).config == Checkpoint(sliced).config
    assert (written / "model.safetensors").samefile(sliced / "model.safetensors")
    assert not (written / formats.CODE_FILE).exists()


def test_a_qwen2_that_vllm_would_misread_gets_our_class(tmp_path):
    _, written = made(tmp_path, "qwen2-mha", THREE_QUARTERS)
    config = Checkpoint(written).config
    assert config["architectures"] == ["BipdeployQwen2ForCausalLM"]
    assert (written / formats.CODE_FILE).exists()


def test_pruning_an_exported_model_again_forgets_which_attentions_were_zero(tmp_path):
    _, written = made(tmp_path, "llama-gqa", PER_BLOCK)
    config = Checkpoint(written).config
    again = formats.pruned_config(config, architecture(config), architecture(config).blocks)
    assert formats.ZERO_ATTENTION not in again


# How agreement is judged

def reference(**changes: Any) -> dict[str, Any]:
    return {"tokens": [[1, 2, 3]], "logprobs": [[-1.0, -2.0, -3.0]], "margins": [[1.0, 0.5, 2.0]],
            **changes}


def test_equal_answers_agree():
    found = portability.compare(reference(), {"tokens": [[1, 2, 3]],
                                              "scored": [[-1.0, -2.001, -3.0]]}, "float32")
    assert (found["why"], found["equal_tokens"], found["ties"]) == (None, 1, 0)
    assert found["largest_logprob_difference"] == pytest.approx(0.001)


def test_another_token_does_not():
    answer = {"tokens": [[1, 9, 3]], "scored": [[-1.0, -2.0, -3.0]]}
    assert "token 1 is 9" in portability.compare(reference(), answer, "float32")["why"]
    assert portability.compare(reference(), answer, "bfloat16")["why"] is None


def test_another_token_is_no_fault_where_both_are_as_likely():
    answer = {"tokens": [[1, 9, 4]], "scored": [[-1.0, -2.0, -3.0]]}
    found = portability.compare(reference(margins=[[1.0, 0.001, 2.0]]), answer, "float32")
    assert (found["why"], found["equal_tokens"], found["ties"]) == (None, 0, 1)


@pytest.mark.parametrize("wrong", [-2.1, float("nan")])
def test_other_log_probabilities_do_not(wrong):
    answer = {"tokens": [[1, 2, 3]], "scored": [[-1.0, wrong, -3.0]]}
    assert "log-probabilities" in portability.compare(reference(), answer, "float32")["why"]


def test_a_checkpoint_with_other_weights_fails(tmp_path):
    sliced, _ = made(tmp_path / "a", "llama-gqa", UNIFORM)
    other = tiny_model(tmp_path / "other", kv_heads=2, blocks=4, seed=1)
    asked = question(sliced)
    result = portability.verify("transformers.stock", other, asked,
                                portability.reference(sliced, asked), None)
    assert result["status"] == "failed"
    assert result["why"]


def test_a_checkpoint_that_does_not_load_fails_with_the_cause(tmp_path):
    sliced, written = made(tmp_path, "llama-gqa", PER_BLOCK)
    (written / formats.CODE_FILE).unlink()
    asked = question(sliced)
    result = portability.verify("transformers.remote_code", written, asked,
                                portability.reference(sliced, asked), None)
    assert result["status"] == "failed"
    assert formats.CODE_FILE in result["why"]


@pytest.mark.parametrize(("device", "asked", "compared"), [
    ("cpu", "auto", "float32"), ("cuda", "auto", "bfloat16"), ("cuda", "float32", "float32"),
    ("cpu", "float16", "float16")])
def test_the_type_of_the_comparison_follows_the_device(tmp_path, monkeypatch, device, asked,
                                                       compared):
    """On a GPU float32 may be TF32 in vLLM's kernels, and then its tokens differ for no fault."""
    folder = tiny_model(tmp_path / "m", dtype=torch.bfloat16)
    monkeypatch.setattr(target, "compute_device", lambda _: torch.device(device))
    recipe = Recipe.model_validate({
        "name": "r", "model": {"id": str(folder)}, "calibration": {"data": "builtin:pydocs"},
        "prune": {"ratio": 0.3}, "export": {"vllm": {"dtype": asked}}})
    assert target.compared_in(Job(recipe, {}, tmp_path), Checkpoint(folder)) == compared


def test_routes_that_do_not_apply_say_why():
    assert "different widths" in str(routes.inapplicable("vllm.stock", per_block=True))
    assert "stock" in str(routes.inapplicable("vllm.plugin", per_block=False))
    for name in ROUTES:
        assert None in {routes.inapplicable(name, per_block=kind) for kind in (True, False)}


def test_without_the_vllm_target_the_table_says_what_was_not_run():
    record = {"transformers": {"architecture": "MistralForCausalLM", "verified": {}},
              "vllm": {"not_run": "export.vllm.enabled is false"}}
    rows = shown.table(shown.of_export(record))
    assert ("transformers", "as it is", "verified") in rows
    assert [said for engine, _, said in rows if engine == "vLLM"] == [
        "not run: export.vllm.enabled is false"] * 3


# transformers, where bipdeploy is not installed

@pytest.fixture(scope="module")
def clean_python(tmp_path_factory) -> Path:
    """The Python of a new virtual environment that has this one's libraries, but not bipdeploy:
    a .pth file adds a folder without running what is installed in it as editable."""
    place = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = place / "bin" / "python"
    found = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                           check=True, capture_output=True, text=True).stdout.strip()
    (Path(found) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


GENERATE = """
import importlib.util, json, sys, torch
from transformers import AutoModelForCausalLM
assert importlib.util.find_spec("bipdeploy") is None, "bipdeploy is installed here"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.tensor([json.loads(sys.argv[2])])
print(json.dumps(model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()))
"""


def require_same_tokens(clean_python, sliced: Path, written: Path, place: Path) -> None:
    """What `written` generates in a Python without bipdeploy is what `sliced` does here."""
    prompt = token_windows(1, 9)
    there = subprocess.run([clean_python, "-c", GENERATE, written, json.dumps(prompt[0].tolist())],
                           capture_output=True, text=True, check=False, cwd=place)
    assert there.returncode == 0, there.stderr
    here = loaded(sliced).generate(prompt, max_new_tokens=12, do_sample=False)[0].tolist()
    assert json.loads(there.stdout.splitlines()[-1]) == here


@pytest.mark.parametrize("variant", ["llama-gqa", "qwen3-gqa"])
def test_a_per_block_checkpoint_generates_the_same_where_bipdeploy_is_not_installed(
        tmp_path, clean_python, variant):
    sliced, written = made(tmp_path, variant, PER_BLOCK)
    require_same_tokens(clean_python, sliced, written, tmp_path)


@pytest.mark.parametrize(("shares", "class_name"), [
    (QUERIES_UNIFORM, "LlamaForCausalLM"), (QUERIES_PER_BLOCK, "BipdeployLlamaForCausalLM")])
def test_transformers_gives_the_tokens_without_some_query_heads(
        tmp_path, clean_python, shares, class_name):
    """Of a stock class, and of ours by the code that the folder carries."""
    sliced, written = made(tmp_path, "llama-gqa", shares, **SIX_HEADS)
    assert Checkpoint(written).config["architectures"] == [class_name]
    require_same_tokens(clean_python, sliced, written, tmp_path)


def test_the_probe_can_make_bipdeploy_look_as_if_it_were_not_installed(tmp_path):
    sliced, written = made(tmp_path, "llama-gqa", PER_BLOCK)
    plain = Route("transformers", "", "", True, True)
    with pytest.raises(portability.ProbeFailed, match="custom code"):
        portability.ask(plain, written, question(sliced), [])


# vLLM

@pytest.mark.vllm
@pytest.mark.parametrize("variant", ["llama-mha", "llama-gqa"])
@pytest.mark.parametrize("route", ["vllm.stock", "vllm.transformers_backend"])
def test_vllm_gives_the_sliced_models_tokens_uniform(tmp_path, variant, route):
    sliced, written = made(tmp_path, variant, UNIFORM)
    found = agrees(route, sliced, written)
    assert found["class"].startswith("Transformers" if "backend" in route else "Llama"), found


@pytest.mark.vllm
@pytest.mark.parametrize("variant", ["llama-mha", "llama-gqa", "mistral-window", "qwen2-gqa",
                                     "qwen3-gqa"])
def test_vllm_with_the_plugin_gives_the_sliced_models_tokens_per_block(tmp_path, variant):
    found = agrees("vllm.plugin", *made(tmp_path, variant, PER_BLOCK))
    assert found["class"].startswith("Bipdeploy")


@pytest.mark.vllm
@pytest.mark.parametrize("variant", ["llama-mha", "llama-gqa", "mistral-window", "qwen2-gqa",
                                     "qwen3-gqa"])
def test_vllms_transformers_backend_gives_the_sliced_models_tokens_per_block(tmp_path, variant):
    found = agrees("vllm.transformers_backend", *made(tmp_path, variant, PER_BLOCK))
    assert found["class"].startswith("Transformers")


@pytest.mark.vllm
def test_a_uniform_qwen2_with_its_own_head_size_is_served_by_the_plugin(tmp_path):
    agrees("vllm.plugin", *made(tmp_path, "qwen2-mha", THREE_QUARTERS))


@pytest.mark.vllm
@pytest.mark.parametrize(("variant", "shares", "route"), [
    ("llama-gqa", QUERIES_UNIFORM, "vllm.stock"),
    ("llama-gqa", QUERIES_PER_BLOCK, "vllm.plugin"),
    ("llama-gqa", QUERIES_PER_BLOCK, "vllm.transformers_backend"),
    ("mistral-window", QUERIES_PER_BLOCK, "vllm.plugin"),
    ("llama-gqa", MORE_ON_FEWER, "vllm.plugin"),
    ("llama-gqa", MORE_ON_FEWER, "vllm.transformers_backend"),
    ("qwen2-gqa", QUERIES_UNIFORM, "vllm.plugin"),
    ("qwen3-gqa", QUERIES_PER_BLOCK, "vllm.plugin")])
def test_vllm_gives_the_tokens_without_some_query_heads(tmp_path, variant, shares, route):
    agrees(route, *made(tmp_path, variant, shares, **SIX_HEADS))


@pytest.mark.vllm
@pytest.mark.parametrize(("variant", "shares", "routes"), [
    ("llama-gqa", UNIFORM, ("vllm.stock",)),
    ("llama-gqa", PER_BLOCK, ("vllm.plugin", "vllm.transformers_backend")),
    ("qwen2-gqa", UNIFORM, ("vllm.plugin",)), ("qwen3-gqa", PER_BLOCK, ("vllm.plugin",))])
def test_vllm_adds_the_biases_of_the_repair(tmp_path, variant, shares, routes):
    sliced, _ = made(tmp_path, variant, shares)
    write_biased(sliced, tmp_path / "biased")
    target.write(Checkpoint(tmp_path / "biased"), tmp_path / "served", tensor_parallel=1)
    for route in routes:
        agrees(route, tmp_path / "biased", tmp_path / "served")


@pytest.mark.vllm
def test_the_plugin_gives_the_same_tokens_compiled(tmp_path, monkeypatch):
    sliced, written = made(tmp_path, "llama-gqa", PER_BLOCK)
    asked = question(sliced)
    seen: dict[str, Any] = {}

    def compiled(request, folder, variables):
        request["options"]["enforce_eager"] = False
        variables.pop("TORCH_COMPILE_DISABLE")
        seen.update(request["options"])
        return run(request, folder, variables)

    reference = portability.reference(sliced, asked)
    run = portability._run
    monkeypatch.setattr(portability, "_run", compiled)
    result = portability.verify("vllm.plugin", written, asked, reference, engines.find())
    assert result["status"] == "verified", result
    assert result["equal_tokens"] + result["ties"] == len(asked.prompts)
    assert seen["enforce_eager"] is False
