"""Text from any artefact, streamed: what a person looks at to see what pruning did.

To add an engine, write its function here and add a line to `ENGINES`.
"""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bipdeploy.errors import InputError, StageError, did_you_mean
from bipdeploy.model import loading, sources
from bipdeploy.model.checkpoint import read_config
from bipdeploy.model.families import architecture
from bipdeploy.recipe.model import ModelSection
from bipdeploy.running import artifacts


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt. Temperature 0 takes the likeliest token each time."""

    new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def generate(folder: Path, prompt: str, sampling: Sampling, engine: str | None = None,
             device: str = "auto", *, trust_remote_code: bool = False) -> Iterator[str]:
    """Pieces of text as they are made. `engine`: a name in `ENGINES`; by default the one that
    the folder was written for. `trust_remote_code`: run the code that its tokenizer is of.
    Raises InputError for what cannot be continued."""
    name = engine or ("onnx" if (folder / "model.onnx").is_file() else "transformers")
    if name not in ENGINES:
        raise InputError(f"--engine: no engine is called {name!r}{did_you_mean(name, ENGINES)}")
    tokens = loading.load_tokenizer(folder, trust_remote_code=trust_remote_code)
    ids = tokens(prompt)["input_ids"]
    if not ids:
        raise InputError("the prompt is empty; give it at least one word")
    longest = architecture(read_config(folder)).max_positions
    if len(ids) + sampling.new_tokens > longest:
        raise InputError(f"the prompt has {len(ids)} tokens and --new-tokens asks for "
                         f"{sampling.new_tokens}, more than the model's maximum of {longest}; "
                         "shorten one of them")
    return ENGINES[name](folder, tokens, ids, sampling, device)


def pair(path: str) -> tuple[Path, Path]:
    """The dense and the pruned model of a run, by the run's folder or one below it."""
    for folder in (Path(path), *Path(path).resolve().parents):
        manifest = artifacts.read_run(folder)
        if manifest:
            return sources.model_folder(manifest["model"]), artefact(path)
    raise InputError(f"--compare: {path} is not of a run, so its dense model is not known; give a "
                     "run's folder such as runs/quickstart")


def artefact(path: str) -> Path:
    """The model to generate from: of a run the exported one, else what the path names. Raises
    InputError where a run of an earlier version ended with training."""
    folder = Path(path).expanduser()
    places = (("export/transformers", "export/vllm", "tune/model", "recover/model", "prune/model")
              if artifacts.read_run(folder) else ())
    found = next((folder / place for place in places if (folder / place).is_dir()), None)
    if found in (folder / "recover/model", folder / "prune/model") and (
            folder / "lora/model").is_dir() and not (folder / "tune").is_dir():
        raise InputError(f"{folder} is of an earlier version, whose stage lora is tune now; run "
                         f"its recipe again, or name {folder / 'lora/model'}")
    return found or sources.model_folder(path)


def stop_tokens(folder: Path) -> list[int]:
    """The tokens that end a text. Of all that `generation_config.json` says these alone are read:
    how to continue a prompt is what `Sampling` says, in every engine."""
    ends = loading.generation_settings(folder).get("eos_token_id", [])
    return ends if isinstance(ends, list) else [ends]


def _in_transformers(folder: Path, tokens: Any, ids: list[int], sampling: Sampling, device: str
                     ) -> Iterator[str]:
    import torch
    from transformers import GenerationConfig, TextIteratorStreamer

    from bipdeploy.model.blocks import compute_device, compute_dtype

    section = ModelSection.model_validate({"id": str(folder), "device": device})
    where = compute_device(section)
    model = loading.load_model(folder, compute_dtype(section, read_config(folder), where), where)
    ends = stop_tokens(folder)
    options: dict[str, Any] = {"max_new_tokens": sampling.new_tokens, "do_sample": False,
                               "eos_token_id": ends or None, "pad_token_id": 0}
    if sampling.temperature > 0:
        options |= {"do_sample": True, "temperature": sampling.temperature,
                    "top_p": sampling.top_p, "top_k": 0}
    model.generation_config = choice = GenerationConfig(**options)  # and nothing of the folder's

    class Streamer(TextIteratorStreamer):
        def put(self, value: torch.Tensor) -> None:
            if self.next_tokens_are_prompt or int(value) not in ends:  # an end is not said
                super().put(value)

    streamer = Streamer(tokens, skip_prompt=True, timeout=600)
    torch.manual_seed(sampling.seed)
    asked = torch.tensor([ids], device=where)
    failures: list[Exception] = []

    def work() -> None:
        try:
            model.generate(asked, generation_config=choice, streamer=streamer,
                           attention_mask=torch.ones_like(asked))
        except Exception as error:  # raised again below; the reader must not wait for more
            failures.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failures:
        raise failures[0]


def _in_onnx(folder: Path, tokens: Any, ids: list[int], sampling: Sampling, device: str
             ) -> Iterator[str]:
    import torch

    from bipdeploy.ort.runtime import OnnxModel
    from bipdeploy.ort.sampling import Sampling as Choice

    model, ends = OnnxModel(folder, device), stop_tokens(folder)
    choice = Choice(sampling.temperature, top_p=sampling.top_p)
    draws = torch.Generator().manual_seed(sampling.seed)
    logits, cache = model.prefill(torch.tensor([ids]), room=sampling.new_tokens)
    said: list[int] = []
    shown = ""
    while len(said) < sampling.new_tokens:
        token = choice.choose(logits, draws)
        if int(token) in ends:
            break
        said.append(int(token))
        text = tokens.decode(said)
        if not text.endswith("\ufffd"):  # else a character is not whole yet
            yield text.removeprefix(shown)
            shown = text
        logits = model.step(token, cache)


def _in_vllm(folder: Path, tokens: Any, ids: list[int], sampling: Sampling, device: str
             ) -> Iterator[str]:
    from bipdeploy.serving import engine as engines
    from bipdeploy.serving import server

    engine = engines.find()
    server.checked(folder, engine)
    options = {"served_model_name": "model", "enforce_eager": True, "generation_config": "vllm",
               "dtype": "float32" if engine.device == "cpu" else "auto",
               "max_model_len": len(ids) + sampling.new_tokens}
    body = {"model": "model", "prompt": ids, "max_tokens": sampling.new_tokens, "stream": True,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed,
            "stop_token_ids": stop_tokens(folder)}
    with (engines.environment(engine, cache_gib=1) as variables,
          server.Server(folder, variables, "127.0.0.1", server.free_port(),
                        engines.flags(options)) as running):
        running.wait_healthy()
        request = urllib.request.Request(f"{running.url}/v1/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            for line in answer:
                data = line.decode().strip().removeprefix("data: ")
                if data.startswith("{"):
                    said = json.loads(data)
                    if "choices" not in said:
                        raise StageError(f"vLLM stopped generating: {said.get('error', said)}")
                    yield said["choices"][0]["text"]


ENGINES: dict[str, Callable[[Path, Any, list[int], Sampling, str], Iterator[str]]] = {
    "transformers": _in_transformers,
    "onnx": _in_onnx,
    "vllm": _in_vllm,
}
