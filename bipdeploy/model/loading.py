"""The one place that loads configurations, tokenizers and models with transformers.

It knows our classes before it is asked, code that a checkpoint ships is run where the caller says
so and nobody is asked whether to, and whatever fails is one line.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bipdeploy.errors import BipdeployError, InputError, says_no_memory
from bipdeploy.model.checkpoint import Checkpoint, read_config, tokenizer_code
from bipdeploy.model.families import PER_BLOCK_PREFIX, Family
from bipdeploy.running.machine import version_of

if TYPE_CHECKING:
    import torch

GENERATION = "generation_config.json"
# The files of a tokenizer's vocabulary: those of any line are a whole one.
_VOCABULARIES = (("tokenizer.json",), ("*.model",), ("*.model.v[0-9]*",), ("*.tiktoken",),
                 ("tekken.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@lru_cache(maxsize=1)
def register() -> None:
    """Tell transformers' Auto classes about the per-block models. Safe to call again."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from bipdeploy.model.modeling_bipdeploy import FAMILIES

    for config, _, model, causal in FAMILIES.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a checkpoint folder."""
    from transformers import AutoConfig

    register()
    with _in_one_line(f"{folder}/config.json is not accepted by", ["transformers"],
                      "correct it, or update transformers"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder.

    Raises InputError where there is none (transformers would make an empty one for some models),
    where these libraries do not know it, and where it is code of its own that is not to be run
    (transformers would take another tokenizer for some).
    """
    from transformers import AutoTokenizer

    register()
    code, missing = tokenizer_code(folder), f"{folder} has no tokenizer that can be loaded"
    if code and not trust_remote_code:
        raise InputError(f"{missing}: it is code of its own ({code}); if you trust it, set "
                         "model.trust_remote_code: true (generate: --trust-remote-code)")
    if code:
        fix = "mend that code, or install what it needs"
    elif not any(all(any(folder.glob(name)) for name in files) for files in _VOCABULARIES):
        raise InputError(f"{missing}: there is no tokenizer.json, tokenizer.model or other "
                         "vocabulary; copy it from where the model came from")
    else:
        fix = "update both if it was written by later ones, else copy its files again"
    with _in_one_line(f"{missing} by", ["transformers", "tokenizers"], fix):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def load_model(folder: Path, dtype: torch.dtype, device: torch.device, *,
               trust_remote_code: bool = False) -> Any:
    """A whole model in evaluation mode, as `AutoModelForCausalLM` gives it. Raises InputError for
    weights that are not those of its config: transformers would draw what is missing."""
    return _model(folder, dtype, trust_remote_code).to(device).eval()


def open_model(folder: Path, dtype: torch.dtype, device: torch.device, *,
               trust_remote_code: bool = False) -> Any:
    """A model as `load_model` gives it, whose blocks stay on the disk: transformers reads each
    when it comes to it, and lets go of it again. For a forward pass or two."""
    outside = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(outside, str(device)), "model.layers": "disk"}
    with TemporaryDirectory() as unused:  # safetensors are read where they are
        return _model(folder, dtype, trust_remote_code, device_map=places,
                      offload_folder=unused).eval()


def _model(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False, **options: Any
           ) -> Any:
    from transformers import AutoModelForCausalLM, GenerationConfig

    Checkpoint(folder).verify()
    config = load_config(folder, trust_remote_code=trust_remote_code)
    try:
        GenerationConfig.from_pretrained(folder)
    except OSError:
        pass  # there is none, and transformers takes what config.json says
    except Exception:  # it is not accepted, and only `generate` would need it
        options["generation_config"] = GenerationConfig.from_model_config(config)
    with _in_one_line(f"{folder} cannot be loaded by", ["transformers", "torch"],
                      "correct its config.json, or update them if it was written by later ones"):
        return AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=trust_remote_code, **options)


def generation_settings(folder: Path) -> dict[str, Any]:
    """What `generation_config.json` says, if there is one, and for the ids of tokens where it says
    nothing what `config.json` does. Ids that are none are left out, as are those of no token.

    Raises InputError where a file cannot be read.
    """
    path = folder / GENERATION
    try:
        stated = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; correct it, or remove it") from error
    if not isinstance(stated, dict):
        raise InputError(f"{path} cannot be read: it holds no JSON object; correct it, or remove "
                         "it")
    config = read_config(folder)
    size = config.get("vocab_size")
    ids = {name: found for name in _IDS for said in (config, stated)
           if (found := _token_ids(said, name, size)) is not None}
    return {**{k: v for k, v in stated.items() if k not in _IDS}, **ids}


def _token_ids(said: Mapping[str, Any], name: str, size: Any) -> int | list[int] | None:
    given = said.get(name)
    ids = [i for i in (given if isinstance(given, list) else [given])
           if isinstance(i, int) and not isinstance(i, bool)
           and 0 <= i < (size if isinstance(size, int) else i + 1)]
    if not ids:
        return None
    return ids if isinstance(given, list) else ids[0]


@contextmanager
def _in_one_line(what: str, libraries: list[str], fix: str) -> Iterator[None]:
    """Turn what a library raises into one InputError, but for a machine without memory."""
    try:
        yield
    except BipdeployError:
        raise
    except Exception as error:  # libraries raise all kinds, tokenizers plain Exceptions
        if isinstance(error, MemoryError) or says_no_memory(str(error)):
            raise
        by = " and ".join(f"{name} {version_of(name)}" for name in libraries)
        words = " ".join((str(error) or type(error).__name__).split())
        raise InputError(f"{what} {by}: {words[:240]}; {fix}") from error


def layer_class(family: Family, config: Any) -> type:
    """The decoder-layer class for a configuration of this family."""
    if config.model_type.startswith(PER_BLOCK_PREFIX):
        from bipdeploy.model.modeling_bipdeploy import FAMILIES

        return FAMILIES[family.model_type][1]
    return getattr(family_module(family), f"{family.class_prefix}DecoderLayer")


def family_module(family: Family) -> Any:
    """transformers' modeling module of a family."""
    name = family.model_type
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")
