"""Checkpoints that are no plain ones, written out as such once, in the user's cache.

Quantised weights are dequantised by transformers' own readers, with the whole model in memory;
names that a wrapper has put a prefix before lose it, tensor by tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bipdeploy.errors import InputError
from bipdeploy.model import weights
from bipdeploy.model.checkpoint import Checkpoint, CheckpointWriter
from bipdeploy.model.families import DEQUANTIZED, architecture
from bipdeploy.running import artifacts, cache, machine

SOURCE = "source.json"  # beside the weights: what they were made from
# What transformers can dequantise while it loads: method → its class and the options for that.
METHODS: dict[str, tuple[str, dict[str, Any]]] = dict(zip(DEQUANTIZED, (
    ("FineGrainedFP8Config", {"dequantize": True}),
    ("CompressedTensorsConfig", {"run_compressed": False})), strict=True))


def method(config: Mapping[str, Any]) -> str | None:
    """How a config says that its weights are quantised; None where they are not."""
    stated = config.get("quantization_config")
    if not stated:
        return None
    return str(stated.get("quant_method") if isinstance(stated, Mapping) else stated)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of what `written` writes: without the quantisation, in bfloat16."""
    return {**{k: v for k, v in config.items()
               if k not in ("quantization_config", "compression_config", "torch_dtype")},
            "dtype": "bfloat16"}


def written(folder: Path, config: Mapping[str, Any], key: Callable[[], str], *,
            dequantize: bool) -> Path:
    """The folder itself where it is plain; else the plain checkpoint made of it, now or before.

    `key`: a digest of the folder's content. Quantised weights are left to be refused unless
    `dequantize`. Raises InputError where they cannot be dequantised, or transformers does not find
    all of them.
    """
    known, wrapper = method(config), weights.wrapper(folder)
    if wrapper and not known:
        make = partial(_unwrap, folder, config, wrapper)
    elif known and dequantize:
        make = partial(_dequantize, folder, config, known)
    else:
        return folder
    versions = [machine.version_of(name) for name in ("transformers", "compressed-tensors")]

    def write(place: Path) -> None:
        artifacts.write_json(place / SOURCE, make(place / "model"))
        (place / SOURCE).rename(place / "model" / SOURCE)

    digest = artifacts.digest([key(), known and versions])[:24]
    return cache.made("plain", digest, folder, write) / "model"


def _unwrap(folder: Path, config: Mapping[str, Any], wrapper: str, out: Path) -> dict[str, Any]:
    weights.require_own(folder, config)
    found = weights.stored(folder)
    with CheckpointWriter(out, config, folder) as writer:
        for name, entry in found.items():
            writer.add({name.removeprefix(wrapper): entry.read()})
    Checkpoint(out).verify()
    return {"unwrapped": {"prefix": wrapper}}


def _dequantize(folder: Path, config: Mapping[str, Any], known: str, out: Path
                ) -> dict[str, Any]:
    import torch
    import transformers

    if known not in METHODS:
        raise InputError(f"model.dequantize: {folder} is quantised by {known}, which is not "
                         f"dequantised here (known: {', '.join(METHODS)}); give the model that it "
                         "was made from")
    weights.entries(folder, config)  # no pickles, no adapters
    name, options = METHODS[known]
    stated = {k: v for k, v in config["quantization_config"].items() if k != "quant_method"}
    quantization = getattr(transformers, name)(**{**stated, **options})
    loaded: Any
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the options go before the config's
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, quantization_config=quantization,
                output_loading_info=True,
                use_safetensors=True, trust_remote_code=False,
                generation_config=transformers.GenerationConfig())
    except Exception as error:  # the quantisers raise what they like
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"model.dequantize: {folder} ({known}) cannot be read by transformers "
                         f"{transformers.__version__}: {line[:160]}; give the model that it was "
                         "made from") from error
    model, said = loaded
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    lost = sorted({*said["missing_keys"], *map(str, said["mismatched_keys"])} - tied)
    if lost:
        raise InputError(f"model.dequantize: transformers {transformers.__version__} does not find "
                         f"{lost[0]} ({len(lost)} tensors) in {folder} ({known}); give the model "
                         "that it was made from")
    tensors = model.state_dict()
    with CheckpointWriter(out, plain_config(config), folder) as writer:
        for wanted, _ in architecture(plain_config(config)).tensors():
            if wanted not in tensors:
                raise InputError(f"model.dequantize: {folder}: tensor {wanted} is missing")
            writer.add({wanted: tensors[wanted].to(torch.bfloat16)})
    Checkpoint(out).verify()
    return {"dequantized": {"method": known, "transformers": transformers.__version__}}
