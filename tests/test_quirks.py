"""Checkpoints as people have them: read as transformers reads them, or refused in one line."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bipdeploy import api
from bipdeploy.errors import BipdeployError, InputError, StageError
from bipdeploy.measuring.perplexity import perplexity
from bipdeploy.model import agreement, sources, walk
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.model.families import family_of
from bipdeploy.pruning.criteria import flap
from bipdeploy.recipe.model import ModelSection
from tests import quantized
from tests.running import SMOKE, bipdeploy_here, refused
from tests.tiny import VOCABULARY, tiny_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path, tiny) -> Path:
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture
def other(tmp_path) -> Path:
    return tiny_model(tmp_path / "other", seed=1)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def store(folder: Path, found: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    save_file({key: value.contiguous() for key, value in found.items()}, folder / name,
              metadata={"format": "pt"})


def shard(folder: Path, found: dict[str, torch.Tensor]) -> None:
    """Two shards and their index instead of the one file."""
    names = sorted(found)
    files = {name: f"model-0000{1 + (n % 2)}-of-00002.safetensors" for n, name in enumerate(names)}
    for file in sorted(set(files.values())):
        store(folder, {name: found[name] for name in names if files[name] == file}, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "model.safetensors").unlink(missing_ok=True)


def restate(folder: Path, file: str = "config.json", **changes: Any) -> None:
    path = folder / file
    stated = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**stated, **changes}))


def check(model: Path, *settings: str):
    recipe = model.parent / "recipe.yaml"
    recipe.write_text(f"name: x\nmodel: {{id: {model}}}\nprune: {{ratio: 0.3, round_to: 8}}\n")
    return bipdeploy_here("check", recipe, *(w for s in settings for w in ("--set", s)))


def walker_of(folder: Path) -> BlockWalker:
    return BlockWalker(folder, ModelSection(id=str(folder), device="cpu"))


def same_as_transformers(folder: Path) -> None:
    """Fails where the walk's logits are not transformers' own."""
    ids = torch.randint(VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(3))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    walker = walker_of(folder)
    hidden = walker.embed([ids])[0]
    for block in walker.blocks(24):
        hidden = block(hidden)
        del block
    with torch.no_grad():
        torch.testing.assert_close(walker.head()(hidden), theirs(ids).logits, atol=1e-4, rtol=1e-4)


# Which file counts

def test_the_single_file_goes_before_an_older_index(model, other):
    own = tensors(model)
    shard(model, tensors(other))
    store(model, own)
    Checkpoint(model).verify()
    assert torch.equal(Checkpoint(model).tensors(["lm_head.weight"])["lm_head.weight"],
                       own["lm_head.weight"])
    same_as_transformers(model)


def test_a_tensor_in_two_shards_is_refused(model, other):
    shard(model, tensors(model))
    path = model / "model-00002-of-00002.safetensors"
    mixed = load_file(path) | {"model.norm.weight": tensors(other)["model.norm.weight"],
                               "lm_head.weight": tensors(other)["lm_head.weight"]}
    store(model, mixed, path.name)
    with pytest.raises(InputError, match=r"stands in model-00001\S+ and in model-00002"):
        Checkpoint(model)


def test_a_tensor_that_the_index_forgot_is_read_as_transformers_reads_it(model):
    shard(model, tensors(model))
    stated = json.loads((model / INDEX).read_text())
    del stated["weight_map"]["model.norm.weight"]
    (model / INDEX).write_text(json.dumps(stated))
    Checkpoint(model).verify()
    same_as_transformers(model)


@pytest.mark.parametrize(("change", "words"), [
    (lambda f: (f / "adapter_config.json").write_text("{}"), ("adapter_config.json", "merge")),
    (lambda f: restate(f, transformers_weights="other.safetensors"), ("transformers_weights",)),
    (lambda f: (f / "model.safetensors").rename(f / "weights.safetensors"),
     ("no model.safetensors", "weights.safetensors", "rename it")),
])
def test_what_transformers_would_load_otherwise_is_refused(model, change, words):
    change(model)
    refused(bipdeploy_here("evaluate", model, model, "--out", model.parent / "out"), 2, *words)


def test_a_walk_that_differs_from_transformers_stops_the_run(model):
    walker = walker_of(model)
    assert walk.require_agreement(walker, 0) < 1e-4
    rows = walker.checkpoint.entries
    rows["model.layers.0.mlp.up_proj.weight"] = rows["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(StageError, match="is not read as transformers reads it: logits differ by"):
        walk.require_agreement(walker, 0)


@pytest.mark.slow
def test_scoring_looks_whether_it_reads_what_transformers_reads(model, tmp_path, monkeypatch):
    asked = []
    original = walk.logits_difference
    monkeypatch.setattr(walk, "logits_difference", lambda *a: asked.append(a) or original(*a))
    api.score(str(model), tmp_path / "out", ["calibration.samples=2", "calibration.tokens=32"])
    assert len(asked) == 1


# Names

def test_a_base_model_s_names_get_their_prefix_back(model):
    store(model, {name.removeprefix("model."): value for name, value in tensors(model).items()})
    Checkpoint(model).verify()
    same_as_transformers(model)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_names_behind_a_wrapper_s_prefix_are_read_without_it(model, cache, prefix):
    own = tensors(model)
    store(model, {f"{prefix}{name}": value for name, value in own.items()})
    found = sources.model_folder(str(model))
    assert found.is_relative_to(cache) and found == sources.model_folder(str(model))
    assert {name: value.tolist() for name, value in tensors(found).items()} == {
        name: value.tolist() for name, value in own.items()}
    same_as_transformers(found)
    with pytest.raises(InputError, match=r"names begin with"):
        Checkpoint(model)
    assert check(model).returncode == 0


def test_names_of_which_some_have_a_prefix_are_refused(model, cache):
    own = tensors(model)
    store(model, {**{f"module.{name}": value for name, value in own.items()},
                  "lm_head.weight": own["lm_head.weight"].clone()})
    refused(bipdeploy_here("evaluate", model, model, "--out", model.parent / "out"), 2,
            "'module.'", "not all of them", "save the model inside")


# Quantised weights

@pytest.mark.parametrize("kind", ["fp8_blocks", "packed_int4"])
def test_quantised_weights_are_refused_or_read_whole(tmp_path, tiny, cache, kind):
    pytest.importorskip("compressed_tensors")
    folder = tmp_path / "quantised"
    whole = getattr(quantized, kind)(tiny, folder)
    refused(check(folder), 2, "quantization_config", "set model.dequantize: true")
    assert check(folder, "model.dequantize=true").returncode == 0
    found = sources.model_folder(str(folder), dequantize=True)
    assert found.is_relative_to(cache)
    for name, value in tensors(found).items():
        torch.testing.assert_close(value.float(), whole[name].float(), atol=0, rtol=2 ** -7)
    same_as_transformers(found)
    assert "quantised" in str(sources.provenance(found))


def test_quantised_weights_that_transformers_misreads_are_refused(tmp_path, tiny, cache):
    pytest.importorskip("compressed_tensors")
    quantized.int8_channels(tiny, tmp_path / "int8")
    with pytest.raises(InputError, match=r"transformers \S+ does not find .*weight_packed"):
        sources.model_folder(str(tmp_path / "int8"), dequantize=True)
    assert not any(cache.rglob("*.safetensors"))


def test_a_quantised_checkpoint_that_lacks_its_head_is_refused(tmp_path, tiny, cache):
    quantized.fp8_blocks(tiny, tmp_path / "fp8")
    found = tensors(tmp_path / "fp8")
    del found["lm_head.weight"]
    store(tmp_path / "fp8", found)
    with pytest.raises(InputError, match=r"does not find lm_head\.weight"):
        sources.model_folder(str(tmp_path / "fp8"), dequantize=True)


def test_a_quantised_checkpoint_in_pickles_is_not_opened(tmp_path, tiny, cache):
    quantized.fp8_blocks(tiny, tmp_path / "fp8")
    torch.save(tensors(tmp_path / "fp8"), tmp_path / "fp8" / "pytorch_model.bin")
    (tmp_path / "fp8" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"only pickled weights"):
        sources.model_folder(str(tmp_path / "fp8"), dequantize=True)


OWN_CODE = """
from transformers import LlamaForCausalLM
class Scaled(LlamaForCausalLM):
    def forward(self, *arguments, **options):
        out = super().forward(*arguments, **options)
        out.logits = out.logits * 0.1
        return out
"""


def test_trusted_code_that_computes_something_else_is_found(model, tmp_path):
    (model / "modeling_own.py").write_text(OWN_CODE)
    restate(model, auto_map={"AutoModelForCausalLM": "modeling_own.Scaled"})
    few = ["calibration.samples=2", "calibration.tokens=32"]
    with pytest.raises(StageError, match="is not read as transformers reads it"):
        api.score(str(model), tmp_path / "out", [*few, "model.trust_remote_code=true"])
    api.score(str(model), tmp_path / "out", few)


def test_code_of_its_own_is_not_run_by_an_export(model, tmp_path):
    ran = tmp_path / "ran"
    (model / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w')\n" + OWN_CODE)
    restate(model, auto_map={"AutoModelForCausalLM": "modeling_own.Scaled"})
    refused(bipdeploy_here("export", model, "--out", tmp_path / "out", "--set",
                           "export.vllm.enabled=true"), 2, "modeling_own.Scaled",
            "trust_remote_code")
    assert not ran.exists()


@pytest.mark.slow
def test_a_quantised_model_is_pruned_whole_and_the_report_says_so(tmp_path, tiny, cache):
    quantized.fp8_blocks(tiny, tmp_path / "fp8")
    settings = [f"model.id={tmp_path / 'fp8'}", "model.dequantize=true", "prune.round_to=8",
                "gates={}", "bench.torch.enabled=false", "evaluate.perplexity.max_tokens=600"]
    result = api.run(SMOKE, settings, runs=tmp_path / "runs")
    page = (result.folder / "report" / "report.md").read_text()
    assert "the dense model was quantised (fp8) and is dequantised" in page


def test_zero_3_s_empty_tensors_are_called_by_their_name(model):
    store(model, {name: torch.empty(0) for name in tensors(model)})
    refused(bipdeploy_here("evaluate", model, model, "--out", model.parent / "out"), 2, "ZeRO-3",
            "zero_to_fp32.py")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe", "gpt2", "phi3"])
def test_another_architecture_is_not_taken_for_a_slip_of_the_pen(name):
    with pytest.raises(InputError, match="known: llama, mistral, qwen2, qwen3") as caught:
        family_of({"model_type": name})
    assert "did you mean" not in str(caught.value)


# What the config says

@pytest.mark.parametrize(("change", "words"), [
    ({"hidden_size": "64"}, ("hidden_size", "'64'")),
    ({"intermediate_size": 96.0}, ("intermediate_size", "96.0")),
    ({"num_hidden_layers": True}, ("num_hidden_layers", "True")),
    ({"vocab_size": -1}, ("vocab_size", "-1")),
    ({"num_key_value_heads": 3}, ("4 query heads", "no multiple", "3 KV heads")),
    ({"head_dim": [32]}, ("head_dim", "[32]")),
    ({"per_layer_config": [1]}, ("per_layer_config",)),
    ({"pad_token_id": VOCABULARY}, ("pad_token_id", str(VOCABULARY), "beyond the vocabulary")),
    ({"eos_token_id": [0, VOCABULARY + 7]}, ("eos_token_id", str(VOCABULARY + 7))),
    ({"bos_token_id": "one"}, ("bos_token_id", "'one'", "no token id")),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("quantization_config", "gptq")),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, ("bitsandbytes",)),
])
def test_check_names_what_is_wrong_in_config_json(model, change, words):
    restate(model, **change)
    refused(check(model), 2, *words)


def test_check_looks_at_the_tokenizer_s_vocabulary(model):
    assert check(model).returncode == 0
    restate(model, "generation_config.json", pad_token_id=VOCABULARY)  # nothing is looked up by it
    assert check(model).returncode == 0
    stated = json.loads((model / "tokenizer.json").read_text())
    stated["model"]["vocab"]["<beyond>"] = VOCABULARY
    (model / "tokenizer.json").write_text(json.dumps(stated))
    refused(check(model), 2, "tokenizer.json", str(VOCABULARY), "'<beyond>'")


def test_an_added_token_beyond_the_rows_is_refused_where_a_text_holds_it(model, tmp_path):
    stated = json.loads((model / "tokenizer.json").read_text())
    stated["added_tokens"].append({**stated["added_tokens"][0], "id": VOCABULARY,
                                   "content": "<pad>"})
    (model / "tokenizer.json").write_text(json.dumps(stated))
    assert check(model).returncode == 0
    text, few = tmp_path / "text.txt", ["calibration.samples=2", "calibration.tokens=32"]
    for words, code in (("A word. " * 99, 0), ("A <pad> word. " * 99, 2)):
        text.write_text(words)
        done = bipdeploy_here("score", model, "--out", tmp_path / f"out-{code}", *(
            w for s in [*few, f"calibration.data={text}"] for w in ("--set", s)))
        assert done.returncode == code, done.stderr
    refused(done, 2, str(VOCABULARY), "'<pad>'", "take that token out")


@pytest.mark.parametrize("kind", ["differs", "longer", "equal"])
def test_a_head_beside_tied_embeddings_has_to_be_equal(tmp_path, kind):
    folder = tiny_model(tmp_path / "model", tie_word_embeddings=True)
    found = tensors(folder)
    table = found["model.embed_tokens.weight"]
    found["lm_head.weight"] = {"differs": table + 1, "equal": table.clone(),
                               "longer": torch.cat([table, table[:3]])}[kind]
    store(folder, found)
    if kind == "equal":
        agreement.require(Checkpoint(folder))
        same_as_transformers(folder)
        return
    with pytest.raises(InputError, match=r"ties the head .* set tie_word_embeddings to false"):
        agreement.require(Checkpoint(folder))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_in_eight_bits_are_refused_by_name(model, dtype):
    found = tensors(model)
    found["model.layers.1.mlp.up_proj.weight"] = found["model.layers.1.mlp.up_proj.weight"].to(
        dtype)
    store(model, found)
    for command in (("evaluate", model, model), ("score", model)):
        refused(bipdeploy_here(*command, "--out", model.parent / "out"), 2,
                "model.layers.1.mlp.up_proj.weight", "quantised weights are not read")


# Numbers that are none

def overflowing(folder: Path) -> Path:
    """A model that is finite in float32, and not in float16."""
    found = tensors(folder)
    found["model.layers.1.mlp.up_proj.weight"] *= 3e4
    store(folder, {name: value.half().float() for name, value in found.items()})
    return folder


@pytest.mark.parametrize("criterion", ["flap", "llm_bip", "wanda_sp", "magnitude", "random",
                                       "taylor", "llm_bip_joint"])
def test_no_criterion_scores_an_overflow(model, tmp_path, criterion):
    overflowing(model)
    settings = ["model.dtype=float16", "calibration.samples=2", "calibration.tokens=32",
                f"score.criterion={criterion}"]
    with pytest.raises(InputError, match=r"not finite in \S+; set model.dtype to float32"):
        api.score(str(model), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_a_spread_that_is_no_number_is_not_taken_for_none():
    values = torch.tensor([1.0, float("nan"), 3.0])
    assert flap.standardised(values).isnan().all()
    assert torch.equal(flap.standardised(torch.ones(3)), torch.zeros(3))


def test_a_perplexity_that_is_no_number_is_an_error():
    def forward(ids):
        return torch.full((*ids.shape, 8), float("nan"))

    with pytest.raises(StageError, match="perplexity is not a number"):
        perplexity(forward, torch.zeros(64, dtype=torch.long), 16, 2)


# Any of them, drawn at random

def _single_and_index(folder: Path, draw: random.Random) -> None:
    own = tensors(folder)
    shard(folder, {name: value + 1 for name, value in own.items()})
    store(folder, own)


def _rename(prefix: str) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, draw: random.Random) -> None:
        store(folder, {f"{prefix}{name}": value for name, value in tensors(folder).items()})
    return change


def _base_names(folder: Path, draw: random.Random) -> None:
    store(folder, {n.removeprefix("model."): value for n, value in tensors(folder).items()})


def _cast(dtype: torch.dtype) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, draw: random.Random) -> None:
        found = tensors(folder)
        for name in draw.sample(sorted(found), draw.randint(1, len(found))):
            found[name] = found[name].to(dtype)
        store(folder, found)
    return change


def _extra(folder: Path, draw: random.Random) -> None:
    found = tensors(folder)
    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    found["model.layers.7.mlp.up_proj.weight"] = torch.ones(2, 2)
    store(folder, found)


def _lost(folder: Path, draw: random.Random) -> None:
    found = tensors(folder)
    del found[draw.choice(sorted(found))]
    store(folder, found)


def _ids(folder: Path, draw: random.Random) -> None:
    restate(folder, draw.choice(["config.json", "generation_config.json"]),
            **{draw.choice(["pad_token_id", "eos_token_id"]):
               draw.choice([0, VOCABULARY - 1, VOCABULARY, -1])})


def _sizes(folder: Path, draw: random.Random) -> None:
    name = draw.choice(["hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size",
                        "num_key_value_heads", "head_dim"])
    value = json.loads((folder / "config.json").read_text())[name]
    restate(folder, **{name: draw.choice([str(value), float(value), value + 1, value * 2, 0])})


def _tied_flag(folder: Path, draw: random.Random) -> None:
    restate(folder, tie_word_embeddings=True)


QUIRKS: dict[str, Callable[[Path, random.Random], None]] = {
    "single and index": _single_and_index, "shards": lambda f, _: shard(f, tensors(f)),
    "compiled": _rename("_orig_mod."), "data parallel": _rename("module."),
    "base names": _base_names, "half": _cast(torch.float16), "bfloat16": _cast(torch.bfloat16),
    "int8": _cast(torch.int8), "float8": _cast(torch.float8_e5m2), "extra": _extra, "lost": _lost,
    "ids": _ids, "sizes": _sizes, "tied": _tied_flag,
    "rope theta": lambda f, draw: restate(f, rope_theta=draw.choice([1e4, 5e5])),
    "adapter": lambda f, _: (f / "adapter_config.json").write_text("{}"),
    "no quirk": lambda f, _: None,
}


# These are read, whatever else is refused.
HARMLESS = {"shards", "half", "bfloat16", "base names", "compiled", "data parallel", "extra",
            "single and index", "rope theta", "no quirk"}


@pytest.mark.parametrize("seed", range(40))
def test_any_quirks_give_transformers_logits_or_one_line(tmp_path, cache, seed):
    draw = random.Random(seed)
    family = draw.choice(["llama", "mistral", "qwen2", "qwen3"])
    folder = tiny_model(tmp_path / "model", family, blocks=2, kv_heads=draw.choice([2, 4]),
                        seed=seed, tie_word_embeddings=draw.random() < 0.3)
    names = draw.sample(sorted(QUIRKS), draw.randint(1, 2))
    for name in names:
        if (folder / "model.safetensors").is_file():
            QUIRKS[name](folder, draw)
    try:
        folder = sources.model_folder(str(folder))
        agreement.require(Checkpoint(folder))
        walk.require_agreement(walker_of(folder), seed)
    except BipdeployError as error:
        assert "\n" not in str(error) and len(str(error)) < 400, names
        assert not set(names) <= HARMLESS
        return
    same_as_transformers(folder)
