"""Train `builtin:pico` on the tokens that corpus.py made. CPU, bf16 autocast, resumable.

    python benchmarks/reference_model/train.py --data /tmp/pico --out /tmp/pico/model

Matrices inside the blocks are trained with Muon (K. Jordan 2024; orthogonalised momentum),
which spreads their spectra so that few weights are idle; embeddings and norms with AdamW.
The learning rate rises over the first 1%, stays, and falls linearly over the last 40%.
Writes the model every `--save-every` steps; a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20
CONTEXT = 256  # tokens in a training window


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=384, num_hidden_layers=7,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0})


def rate(step: int, steps: int) -> float:
    warm, fall = max(1, steps // 100), int(steps * 0.6)
    if step < warm:
        return (step + 1) / warm
    return 1.0 if step < fall else max(0.02, (steps - step) / (steps - fall))


def batches(tokens: np.ndarray, batch: int, start: int):
    """Windows in a fresh random order each epoch; the order depends on the seed and step only."""
    windows = (len(tokens) - 1) // CONTEXT
    per_epoch = windows // batch
    step = start
    while True:
        epoch, index = divmod(step, per_epoch)
        order = np.random.default_rng([SEED, epoch]).permutation(windows)
        rows = order[index * batch:(index + 1) * batch] * CONTEXT
        yield torch.from_numpy(np.stack([tokens[r:r + CONTEXT + 1] for r in rows]).astype(np.int64))
        step += 1


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: np.ndarray, windows: int = 128) -> float:
    """Mean nats per token over the first `windows` windows, float32."""
    model.eval()
    ids = torch.from_numpy(tokens[:windows * CONTEXT].astype(np.int64)).view(windows, CONTEXT)
    losses = [model(x, labels=x).loss.item() for x in ids.split(16)]
    model.train()
    return sum(losses) / len(losses)


def state_tensors(model: LlamaForCausalLM, optimisers: tuple) -> dict[str, torch.Tensor]:
    """Everything that a resumed run needs, flat: weights in fp32 and optimiser state."""
    tensors = {f"model.{name}": p.detach().clone() for name, p in model.named_parameters()}
    for number, optimiser in enumerate(optimisers):
        for index, entries in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{index}.{k}": v.clone() for k, v in entries.items()}
    return tensors


def restore(model: LlamaForCausalLM, optimisers: tuple, path: Path) -> dict:
    """Load what `state_tensors` gave into model and optimisers; returns the log so far."""
    with safe_open(path, "pt") as file:
        log = json.loads(file.metadata()["log"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for name, p in model.named_parameters():
        p.data.copy_(tensors[f"model.{name}"])
    for number, optimiser in enumerate(optimisers):
        state = optimiser.state_dict()
        for name, value in tensors.items():
            if name.startswith(f"optimiser.{number}."):
                _, _, index, key = name.split(".")
                state["state"].setdefault(int(index), {})[key] = value
        optimiser.load_state_dict(state)
    return log


def save(model: LlamaForCausalLM, tensors: dict, log: dict, data: Path, out: Path) -> None:
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(partial)
    PreTrainedTokenizerFast(tokenizer_file=str(data / "tokenizer.json"), bos_token="<|endoftext|>",
                            eos_token="<|endoftext|>", pad_token="<|endoftext|>",
                            model_max_length=CONTEXT).save_pretrained(partial)
    (partial / "training.json").write_text(json.dumps(log, indent=1))
    resume = out.with_name("resume.safetensors.partial")
    save_file(tensors, resume, metadata={"log": json.dumps(log)})
    resume.rename(out.with_name("resume.safetensors"))
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def train(data: Path, out: Path, tokens: float, batch: int, save_every: int) -> None:
    torch.manual_seed(SEED)
    train_tokens = np.fromfile(data / "train.bin", dtype=np.uint16)
    heldout = np.fromfile(data / "heldout.bin", dtype=np.uint16)
    model = LlamaForCausalLM(config())
    parameters = sum(p.numel() for p in model.parameters())
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.004, weight_decay=0.1, momentum=0.95,
                            adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    optimisers = (muon, adam)
    peaks = [o.param_groups[0]["lr"] for o in optimisers]
    steps = math.ceil(tokens / (batch * CONTEXT))
    log: dict = {"seed": SEED, "parameters": parameters, "steps": steps, "batch": batch,
                 "context": CONTEXT, "train_tokens_unique": len(train_tokens), "history": []}
    start, spent = 0, 0.0
    resume = out.with_name("resume.safetensors")
    if resume.exists():
        log = restore(model, optimisers, resume)
        log["steps"] = steps
        start, spent = log["history"][-1]["step"], log["history"][-1]["seconds"]

    @torch.compile
    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    began, recent = time.monotonic(), []
    for step, ids in zip(range(start, steps), batches(train_tokens, batch, start), strict=False):
        for optimiser, peak in zip(optimisers, peaks, strict=True):
            optimiser.param_groups[0]["lr"] = peak * rate(step, steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        recent.append(loss.item())
        if (step + 1) % save_every == 0 or step + 1 == steps:
            seconds = spent + time.monotonic() - began
            entry = {"step": step + 1, "tokens": (step + 1) * batch * CONTEXT,
                     "train_loss": round(sum(recent) / len(recent), 4),
                     "heldout_loss": round(held_out_loss(model, heldout), 4),
                     "seconds": round(seconds)}
            log["history"].append(entry)
            recent = []
            print(json.dumps(entry), flush=True)
            save(model, state_tensors(model, optimisers), log, data, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the saved model")
    parser.add_argument("--tokens", type=float, default=45e6, help="tokens to train on, in all")
    parser.add_argument("--batch", type=int, default=16, help="windows of 256 tokens in a step")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    a = parser.parse_args()
    a.out.parent.mkdir(parents=True, exist_ok=True)
    train(a.data, a.out, a.tokens, a.batch, a.save_every)
