"""Tokenizers and models as people have them: loaded in one place, never asking, and one line for
what cannot be."""

from __future__ import annotations

import ast
import builtins
import json
import os
import pty
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bipdeploy import api
from bipdeploy.data import windows
from bipdeploy.errors import InputError
from bipdeploy.exporters import vllm as target
from bipdeploy.model import loading, sources
from bipdeploy.model.checkpoint import Checkpoint, CheckpointWriter, companions, write_companions
from bipdeploy.model.folder import copy_checkpoint
from bipdeploy.ort import folder as onnx_folder
from bipdeploy.running import artifacts
from bipdeploy.serving import generation
from bipdeploy.serving.generation import Sampling
from tests.running import ENVIRONMENT, ROOT, SCRIPT, SMOKE, bipdeploy, bipdeploy_here, refused
from tests.sliced import architecture_of, draw_kept, short_calibration, write_sliced
from tests.test_checkpoint import rewrite
from tests.tiny import PICO, tiny_model

CPU = torch.device("cpu")
PROMPT = "Return the number of"


@pytest.fixture(autouse=True)
def never_asked(monkeypatch) -> None:
    """Whoever asks for something on a terminal fails."""
    def asked(prompt: object = "") -> str:
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr(builtins, "input", asked)


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the built-in model, to be damaged."""
    return shutil.copytree(PICO, tmp_path / "model")


@pytest.fixture(scope="module")
def per_block(tmp_path_factory) -> Path:
    """The export of a model with widths by block, which carries our class and names it."""
    place = tmp_path_factory.mktemp("per-block")
    dense = tiny_model(place / "dense")
    sliced = write_sliced(dense, place / "sliced",
                          draw_kept(architecture_of(dense), [(2, 48), (1, 96), (2, 32)]))
    return api.export(sliced, place / "export", ["model.device=cpu"]) / "transformers"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}),
                                **changes}))


# One place, which asks nobody

AUTO = {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig"}
# `probe.py` is a program of its own, which runs where bipdeploy is not installed; the other proves
# that transformers by itself loads what was written.
PLACES = {"bipdeploy/model/loading.py", "bipdeploy/serving/probe.py"}
PROOFS = {"bipdeploy/model/gguf_tokenizer.py"}


def calls(path: Path) -> Iterator[ast.Call]:
    """Where a file has transformers load something from a folder."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                and node.func.attr == "from_pretrained" and ast.unparse(node.func.value) in AUTO):
            yield node


def test_one_place_has_transformers_load_what_a_folder_holds():
    files = [p for room in ("bipdeploy", "benchmarks") for p in (ROOT / room).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): list(calls(path)) for path in files}
    assert {name for name, there in found.items() if there} - PROOFS == PLACES
    for call in (call for name in PLACES for call in found[name]):
        named = {keyword.arg for keyword in call.keywords}
        assert ("trust_remote_code" in named) != ("GenerationConfig" in ast.unparse(call.func))


def test_nobody_is_asked_about_our_own_class(per_block):
    assert json.loads((per_block / "config.json").read_text())["auto_map"]
    text = "".join(generation.generate(per_block, PROMPT, Sampling(8), device="cpu"))
    model, tokens = (kind.from_pretrained(per_block, trust_remote_code=True)
                     for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokens(PROMPT, return_tensors="pt").input_ids
    said = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert text == tokens.decode(said[0, ids.shape[1]:])


@pytest.mark.slow
def test_nothing_is_asked_on_a_terminal(per_block):
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run([SCRIPT, "generate", per_block, PROMPT, "--new-tokens", "2"],
                              stdin=theirs, capture_output=True, text=True, timeout=120,
                              env={**os.environ, **ENVIRONMENT}, check=False)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "custom code" not in done.stdout + done.stderr


# A tokenizer that is code of its own

OWN = """
from transformers import PreTrainedTokenizerFast

from .own_words import TURNED


class OwnTokenizer(PreTrainedTokenizerFast):
    def _encode_plus(self, text, *arguments, **options):
        return super()._encode_plus(TURNED(text), *arguments, **options)
"""


@pytest.fixture
def own(model) -> Path:
    """The built-in model, whose tokenizer writes everything in capitals before it looks."""
    (model / "tokenization_own.py").write_text(OWN)
    (model / "own_words.py").write_text("TURNED = str.upper\n")
    edit(model / "tokenizer_config.json", tokenizer_class="OwnTokenizer",
         auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})
    return model


def test_a_tokenizer_of_its_own_code_is_run_where_that_is_said(own):
    found = loading.load_tokenizer(own, trust_remote_code=True)
    assert type(found).__name__ == "OwnTokenizer"
    assert found("list")["input_ids"] == windows.tokenizer(PICO)("LIST")["input_ids"]
    sources.model_folder(str(own), code=True)
    assert type(windows.tokenizer(own)).__name__ == "OwnTokenizer"
    sources.model_folder(str(own), weights=False)  # asks for its config alone
    assert sources.runs_code(own)
    sources.model_folder(str(own))  # for a recipe that does not say so
    with pytest.raises(InputError, match="code of its own"):
        windows.tokenizer(own)


@pytest.mark.slow
def test_a_run_scores_with_the_tokenizer_that_the_recipe_trusts(own, tmp_path):
    """And not with another: the windows are those of the text in capitals."""
    data = tmp_path / "text.txt"
    data.write_text("".join(f"The value of item {n} is not a list.\n" for n in range(900)))
    small = [part for setting in (f"calibration.data={data}", "calibration.samples=8",
                                  "calibration.tokens=64")
             for part in ("--set", setting)]
    asked = ("run", SMOKE, "--until", "score", *small)
    refused(bipdeploy(*asked, "--runs", tmp_path / "no", "--set", f"model.id={own}", cwd=tmp_path),
            2, "code of its own", "model.trust_remote_code: true")
    drawn = {}
    for name, model in {"own": own, "plain": PICO}.items():
        if name == "plain":
            data.write_text(data.read_text().upper())
        done = bipdeploy(*asked, "--runs", tmp_path / name, "--set", f"model.id={model}",
                         "--set", "model.trust_remote_code=true", env={"HF_HOME": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        scores = artifacts.read_json(tmp_path / name / "smoke" / "score" / "scores.json")
        drawn[name] = scores["calibration"]["windows_sha256"]
    assert drawn["own"] == drawn["plain"]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_tokenizer_of_its_own_code_is_else_refused(own, family):
    edit(own / "config.json", model_type=family)
    with pytest.raises(InputError, match=r"it is code of its own \(tokenization_own.OwnTokenizer\)"
                       r"; if you trust it, set model.trust_remote_code: true"):
        windows.tokenizer(own)
    refused(bipdeploy_here("generate", own, PROMPT), 2, str(own), "model.trust_remote_code: true")


@pytest.mark.parametrize(("code", "words"), [
    ("import a_module_that_is_not_there\n" + OWN, "a_module_that_is_not_there"),
    ("raise ZeroDivisionError('by nothing')", "by nothing"), ("class Other: pass", "OwnTokenizer")])
def test_code_that_does_not_work_is_one_line(own, code, words):
    (own / "tokenization_own.py").write_text(code)
    with pytest.raises(InputError) as caught:
        loading.load_tokenizer(own, trust_remote_code=True)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_code_of_a_tokenizer_goes_where_the_model_goes(own, tmp_path):
    (own / "modeling_own.py").write_text("")
    there = rewrite(own, tmp_path / "there")
    assert {path.name for path in there.glob("*.py")} == {"tokenization_own.py", "own_words.py"}
    assert type(loading.load_tokenizer(there, trust_remote_code=True)).__name__ == "OwnTokenizer"


# Tokenizers of later libraries, damaged ones, none

def later(**changes: Any):
    return lambda folder: edit(folder / "tokenizer.json", **changes)


def model_of_the_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    edit(path, model={**json.loads(path.read_text())["model"], "type": "Later"})


DAMAGE = {
    "version": later(version="2.0"), "model": model_of_the_tokenizer,
    "pre-tokenizer": later(pre_tokenizer={"type": "Later"}),
    "normalizer": later(normalizer={"type": "Later"}), "decoder": later(decoder={"type": "Later"}),
    "post-processor": later(post_processor={"type": "Later"}), "field": later(later=1),
    "no JSON": lambda folder: (folder / "tokenizer.json").write_text("<html>"),
    "cut off": lambda folder: os.truncate(folder / "tokenizer.json", 2000),
    "empty": lambda folder: (folder / "tokenizer.json").write_text(""),
    "list": lambda folder: (folder / "tokenizer.json").write_text("[]"),
    "settings": lambda folder: (folder / "tokenizer_config.json").write_text("{"),
    "settings list": lambda folder: (folder / "tokenizer_config.json").write_text("[]")}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_tokenizer_that_the_libraries_do_not_know_is_one_line(model, damage):
    damage(model)
    refused(bipdeploy_here("generate", model, PROMPT), 2,
            f"{model} has no tokenizer that can be loaded by transformers ", " and tokenizers 0.",
            "update both if it was written by later ones")


@pytest.mark.slow
def test_a_later_tokenizer_is_one_line_of_a_run_with_lora(model, tmp_path):
    edit(model / "tokenizer.json", version="2.0")
    done = bipdeploy("run", SMOKE, "--runs", tmp_path / "runs", "--set", f"model.id={model}",
                     "--set", "tune.enabled=true")
    refused(done, 2, "no tokenizer that can be loaded", "version '2.0'", "update both")


# The class that a folder names without a vocabulary: transformers makes an empty tokenizer of some.
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", [None, "LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer"])
def test_no_vocabulary_is_no_tokenizer(model, family, name):
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name} if name
                                                            else {}))
    (model / "vocab.json").write_text("{}")  # half of one
    edit(model / "config.json", model_type=family)
    with pytest.raises(InputError, match="no tokenizer that can be loaded: there is no tokenizer"):
        windows.tokenizer(model)


# Models

def config(**changes: Any):
    return lambda folder: edit(folder / "config.json", **changes)


def weights(change):
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return damage


UP = "model.layers.1.mlp.up_proj.weight"
BROKEN = {
    "missing": (weights(lambda tensors: tensors.pop(UP)), f"tensor {UP} is missing"),
    "shape": (weights(lambda tensors: tensors.update({UP: torch.zeros(5, 64)})), "5 × 64"),
    "cut off": (lambda folder: os.truncate(folder / "model.safetensors", 5000), "truncated"),
    "activation": (config(hidden_act="later"), "cannot be loaded by transformers"),
    "rope": (config(rope_parameters={"rope_type": "later", "rope_theta": 1e4}), "'later'"),
    "attention": (config(attn_implementation="later"), "attn_implementation"),
    "dtype": (config(dtype="float7"), "config.json is not accepted by transformers"),
    "quantised": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "")}


@pytest.mark.parametrize(("damage", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_a_model_that_cannot_be_loaded_is_one_line(tiny, tmp_path, damage, words):
    folder = shutil.copytree(tiny, tmp_path / "model")
    damage(folder)
    for load in (loading.load_model, loading.open_model):
        with pytest.raises(InputError) as caught:
            load(folder, torch.float32, CPU)
        assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory")])
def test_a_machine_without_memory_is_no_fault_of_the_folder(tiny, monkeypatch, error):
    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(type(error)):
        loading.load_model(tiny, torch.float32, CPU)


# What is said about generating

# What transformers refuses when it saves (the first three), loads, or generates.
UNUSABLE: list[dict[str, Any]] = [
    {"temperature": 0.6, "top_p": 0.9, "do_sample": False}, {"top_k": -1}, {"pad_token_id": -1},
    {"max_new_tokens": 0}, {"cache_implementation": "later"}, {"num_return_sequences": 3},
    {"watermarking_config": {"later": 1}}, {"compile_config": {"later": 1}}, {"num_beams": "2"},
    {"eos_token_id": "2"}, {"bos_token_id": {}}, {"repetition_penalty": -1},
    {"temperature": "warm", "do_sample": "maybe", "top_p": 7, "top_k": 1e999}]


@pytest.mark.parametrize("stated", UNUSABLE, ids=lambda stated: next(iter(stated)))
def test_generation_settings_that_no_library_accepts_are_no_obstacle(tiny, tmp_path, stated):
    folder = shutil.copytree(tiny, tmp_path / "model")
    plain = "".join(generation.generate(folder, PROMPT, Sampling(6), device="cpu"))
    (folder / "generation_config.json").write_text(json.dumps(stated))
    assert "".join(generation.generate(folder, PROMPT, Sampling(6), device="cpu")) == plain
    sampled = [list(generation.generate(folder, PROMPT, Sampling(6, 0.9, seed=s), device="cpu"))
               for s in (1, 1)]
    assert sampled[0] == sampled[1] != []
    loading.open_model(folder, torch.float32, CPU)
    out = api.export(folder, tmp_path / "export", ["model.device=cpu"]) / "transformers"
    assert json.loads((out / "generation_config.json").read_text()) == json.loads(
        json.dumps(stated))


def test_the_model_s_own_penalties_change_nothing_here(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    plain = "".join(generation.generate(folder, PROMPT, Sampling(12), device="cpu"))
    edit(folder / "generation_config.json", repetition_penalty=50.0, min_new_tokens=3)
    edit(folder / "config.json", temperature=0.5, do_sample=True)  # as old checkpoints have them
    assert "".join(generation.generate(folder, PROMPT, Sampling(12), device="cpu")) == plain


def settings_of(folder: Path, stated: dict[str, Any] | None, **said: Any) -> dict[str, Any]:
    edit(folder / "config.json", **said)
    path = folder / "generation_config.json"
    path.unlink(missing_ok=True)
    if stated is not None:
        path.write_text(json.dumps(stated))
    return loading.generation_settings(folder)


@pytest.mark.parametrize(("stated", "said", "ids"), [
    (None, {"eos_token_id": 5}, 5), (None, {"eos_token_id": [5, 7]}, [5, 7]),
    ({}, {"eos_token_id": 5}, 5), ({"eos_token_id": None}, {"eos_token_id": 5}, 5),
    ({"eos_token_id": 0}, {"eos_token_id": 5}, 0), ({"eos_token_id": [7]}, {}, [7]),
    ({"eos_token_id": "7"}, {"eos_token_id": 5}, 5), ({"eos_token_id": -1}, {"eos_token_id": 5}, 5),
    ({"eos_token_id": [7, "8", 9_999]}, {}, [7]), ({"eos_token_id": True}, {"eos_token_id": 5}, 5),
    ({"eos_token_id": 4096}, {"eos_token_id": 4095}, 4095), (None, {"eos_token_id": None}, None)])
def test_the_tokens_that_end_a_text(model, stated, said, ids):
    assert settings_of(model, stated, **said).get("eos_token_id") == ids


@pytest.mark.parametrize("text", ["{", "[]", "3", ""])
def test_generation_settings_that_cannot_be_read_are_named(model, text):
    (model / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=r"generation_config.json cannot be read: .*remove it"):
        loading.generation_settings(model)
    loading.load_model(model, torch.float32, CPU)  # which needs none of them


def first_said(folder: Path) -> int:
    """The first token that the model says after the prompt."""
    tokens = windows.tokenizer(folder)
    ids = tokens(PROMPT, return_tensors="pt").input_ids
    return int(loading.load_model(folder, torch.float32, CPU)(ids).logits[0, -1].argmax())


@pytest.mark.slow
@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("engine", ["transformers", "onnx"])
def test_a_text_ends_at_the_token_that_either_file_names(model, tmp_path, engine, place):
    pytest.importorskip("onnx_ir")
    folder = model
    if engine == "onnx":
        folder = tmp_path / "onnx"
        (model / "generation_config.json").unlink()
        onnx_folder.write(Checkpoint(model), folder, style="gqa", dtype="float32")
    (folder / "generation_config.json").unlink(missing_ok=True)
    whole = "".join(generation.generate(folder, PROMPT, Sampling(8)))
    assert len(whole) > 4
    edit(folder / place, eos_token_id=[3, first_said(model)])
    assert "".join(generation.generate(folder, PROMPT, Sampling(8))) == ""


@pytest.mark.slow
@pytest.mark.parametrize("stated", [None, {"eos_token_id": "2", "temperature": "warm", "top_p": 7,
                                           "do_sample": "maybe", "top_k": -3}])
def test_onnxruntime_genai_runs_a_folder_with_such_settings(model, tmp_path, stated):
    onnxruntime_genai = pytest.importorskip("onnxruntime_genai")
    settings_of(model, stated)
    onnx_folder.write(Checkpoint(model), tmp_path / "onnx", style="gqa", dtype="float32")
    made = json.loads((tmp_path / "onnx" / onnx_folder.GENAI).read_text())
    assert made["model"]["eos_token_id"] == 0
    assert made["search"] == {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
                              "max_length": 256, "past_present_share_buffer": True}
    tokens = windows.tokenizer(model)
    running = onnxruntime_genai.Model(str(tmp_path / "onnx"))
    options = onnxruntime_genai.GeneratorParams(running)
    options.set_search_options(max_length=24, do_sample=False)
    generator = onnxruntime_genai.Generator(running, options)
    ids = tokens(PROMPT)["input_ids"]
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    said = tokens.decode(generator.get_sequence(0)[len(ids):])
    whole = "".join(generation.generate(model, PROMPT, Sampling(24 - len(ids))))
    assert said.removesuffix("<|endoftext|>") == whole


# Companions

BESIDE = {"tokenizer.model", "qwen.tiktoken", "tokenizer.model.v3", "spiece.model", "tekken.json",
          "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
          "chat_template.jinja", "chat_template.json", "additional_chat_templates/tools.jinja",
          "LICENSE", "Licence.txt", "license-mit.md", "NOTICE", "Notice.md", "USE_POLICY.md",
          "MODEL_LICENSE.pdf", "Qianwen LICENSE AGREEMENT", "COPYING", "LICENSES/MIT.txt"}
LOADED = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
NOT_BESIDE = {"pytorch_model.bin", "model.gguf", "preprocessor_config.json", "own.py", "data.txt"}


@pytest.fixture
def accompanied(model) -> Path:
    """The built-in model with everything that repositories put beside theirs."""
    for name in BESIDE | NOT_BESIDE:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(name)
    return model


def beside(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in companions(folder)
            if path.read_text(errors="replace") == str(path.relative_to(folder))}


def test_what_goes_with_a_model(accompanied, tmp_path):
    found = {str(path.relative_to(accompanied)) for path in companions(accompanied)}
    assert found == BESIDE | LOADED
    (tmp_path / "there").mkdir()
    write_companions(accompanied, tmp_path / "there")
    assert beside(tmp_path / "there") == BESIDE
    files = {p for p in (tmp_path / "there").rglob("*") if p.is_file()}
    assert {str(p.relative_to(tmp_path / "there")) for p in files} == BESIDE | LOADED


def test_it_goes_with_what_is_written_and_copied(accompanied, tmp_path):
    assert beside(rewrite(accompanied, tmp_path / "written")) == BESIDE
    copy_checkpoint(Checkpoint(accompanied), tmp_path / "copied")
    assert beside(tmp_path / "copied") == BESIDE
    arch = architecture_of(accompanied)
    config = Checkpoint(accompanied).config
    with CheckpointWriter(tmp_path / "empty", config, accompanied):
        pass
    assert beside(tmp_path / "empty") == BESIDE and len(arch.blocks) == 7


@pytest.mark.slow
def test_it_goes_with_all_that_a_run_makes(accompanied, tmp_path):
    pytest.importorskip("onnx_ir")
    for name in ("tokenizer.model", "tekken.json", "spiece.model", "vocab.json", "merges.txt",
                 "special_tokens_map.json", "added_tokens.json", "vocab.txt", "qwen.tiktoken",
                 "tokenizer.model.v3"):  # which transformers would read
        (accompanied / name).unlink()
    expected = beside(accompanied)
    assert {"LICENSE", "additional_chat_templates/tools.jinja"} <= expected
    made = api.run(SMOKE, [f"model.id={accompanied}", "export.onnx.enabled=true",
                           "tune.enabled=true", "tune.steps=1", "tune.batch=2",
                           "tune.accumulation=1", "tune.validation.windows=2",
                           *short_calibration(tmp_path)], tmp_path, until="export").folder
    target.write(Checkpoint(made / "tune/model"), made / "vllm", tensor_parallel=1)
    removed = write_sliced(made / "tune/model", made / "removed", draw_kept(
        architecture_of(made / "tune/model"), [(0, 32)] + [(1, 0)] * 6))
    target.write(Checkpoint(removed), made / "vllm-per-block", tensor_parallel=1)
    (made / "quantised").mkdir()
    onnx_folder.carry(made / "export/onnx", made / "quantised")
    for place in ("prune/model", "recover/model", "tune/model", "export/transformers",
                  "export/onnx", "quantised", "vllm", "vllm-per-block"):
        assert beside(made / place) == expected, place
