"""Stage `tune`: train the repaired model, write what came of it, prove what was written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bipdeploy.data import chat, sampling, text
from bipdeploy.data.calibration import training_split
from bipdeploy.data.windows import require_known, token_ids, tokenizer, written
from bipdeploy.errors import InputError, StageError
from bipdeploy.model import loading, sources
from bipdeploy.model.blocks import compute_device
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.planning.job import Job
from bipdeploy.planning.resolved import Resolved
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.recipe.tune import TuneSection, slice_tokens
from bipdeploy.running import artifacts, machine
from bipdeploy.tuning import checkpoints, data, launch, students, training
from bipdeploy.tuning.checkpoints import State
from bipdeploy.tuning.data import Document, Windows
from bipdeploy.tuning.losses import cross_entropy, predicted, predicting
from bipdeploy.tuning.training import Task

LOST_LIMIT = 0.05  # share of documents none of whose tokens counts, above which it is said
MERGE_TOLERANCE = 0.02  # nats: what rounding trained weights to 16 bits may cost
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "accelerate")


def run(job: Job) -> None:
    """Write `model/`, `tune.json` and the figures; with `keep_adapter` also `adapter/`. Where the
    section is not enabled, only `tune.json`."""
    recipe, section = job.recipe, job.recipe.tune
    if not section.enabled:
        job.reporter.total(1)
        job.write("tune.json", {"enabled": False})
        return
    device = compute_device(recipe.model)
    launch.require_devices(section.processes, device)
    source = Checkpoint(job.inputs["repaired"])
    limit = source.architecture.max_positions
    if section.tokens > limit:
        raise InputError(f"tune.tokens: {section.tokens} is longer than the model's maximum of "
                         f"{limit}; lower it")
    task, provenance = prepare(job)
    checkpoints.start(task.checkpoint, task.identity, job.reporter)
    machine.release_memory()  # the first training process takes this one's GPU
    if section.processes == 1:
        state = training.train(task, device, job.reporter)
    else:
        state = launch.train(task, device, job.reporter)
    machine.release_memory()
    figures = finish(job, source, task, state, device)
    if state.best_step == 0:
        job.reporter.note("no step lowered the validation loss: the model is left as it was")
    job.write("tune.json", {
        "enabled": True, "method": section.method, "data": provenance,
        "best_step": state.best_step, "steps": state.step,
        "stopped_early": state.step < section.steps, "tokens": state.tokens,
        "epochs": state.step * section.batch / len(task.training),
        "seconds": round(state.seconds, 3), "processes": section.processes,
        "device": str(device), "dtype": str(training.compute_type(section, device)),
        "trained_parameters": sum(t.numel() for t in state.best.values()),
        "history": [{"step": step, "loss": loss} for step, loss in state.history],
        "loss": {"before": state.history[0][1],
                 "best": min(loss for _, loss in state.history),
                 "after": figures["tune.loss.after"]},
        "largest_logit_difference": figures["tune.merge.max_logit_difference"]})
    job.write_figures(figures)


def rehearse(resolved: Resolved) -> None:
    """Refuse, before the stages that come first, what training could not start with."""
    recipe = resolved.recipe
    if recipe.tune.enabled:
        assert resolved.folder is not None
        launch.require_devices(recipe.tune.processes, compute_device(recipe.model))
        read_windows(recipe, resolved.folder)


def prepare(job: Job) -> tuple[Task, dict[str, Any]]:
    """The task, its text read and cut, and where that came from."""
    recipe, section = job.recipe, job.recipe.tune
    windows, provenance = read_windows(recipe, job.inputs["dense"])
    if windows.lost > LOST_LIMIT * windows.documents:
        job.reporter.note(f"{_lost(windows)}: they are not trained on; raise tune.tokens"
                          + ("" if section.packing else " or set tune.packing: true"))
    training_windows, held = data.hold_back(windows, section.validation.windows, recipe.seed)
    provenance |= {"windows": [len(windows), section.tokens], "held_back": len(held),
                   "tokens_left_out": windows.cut, "seed": recipe.seed}
    device = compute_device(recipe.model)
    identity = artifacts.digest({
        "section": section.model_dump(mode="json", exclude={"checkpoint_every", "keep_adapter"}),
        "model": recipe.model.model_dump(mode="json"), "seed": recipe.seed,
        "student": sources.fingerprint(job.inputs["repaired"]),
        "dense": sources.fingerprint(job.inputs["dense"]) if section.taught else "",
        "text": provenance["text_sha256"], "device": device.type,
        "code": machine.code_version(),
        "libraries": {name: machine.version_of(name) for name in LIBRARIES}})
    return Task(section, recipe.model, recipe.seed, job.inputs["repaired"], job.inputs["dense"],
                training_windows, held, artifacts.checkpoint_folder(job.out), identity), provenance


def read_windows(recipe: Recipe, model: Path) -> tuple[Windows, dict[str, Any]]:
    """All windows of the text to train on, by the model's tokenizer, and their provenance.

    Running text is packed as perplexity reads it: documents joined by blank lines. Of a text that
    is much larger than what the steps can read only parts are tokenised (see `sampling.parts`).
    Raises InputError where there are too few windows.
    """
    section, split = recipe.tune, training_split(recipe)
    source: text.Text | text.Records = (
        text.records(section.data, split, data.ALPACA_COLUMNS, "tune")
        if section.format == "alpaca" else text.read(section.data, split, section.field, "tune"))
    tokens = tokenizer(model)
    wanted = section.steps * section.batch + section.validation.windows
    for part in sampling.parts(source, wanted * section.tokens, recipe.seed,
                               section.tokens if section.packing else None):
        documents = _documents(part, section, model, tokens)
        windows = (data.pack(documents, section.tokens) if section.packing else
                   data.pad(documents, section.tokens, tokens.eos_token_id or 0))
        if len(windows) >= wanted:
            break
    if len(windows) < section.validation.windows + section.batch:
        raise InputError(f"tune.data: {section.data} gives {len(windows)} windows of "
                         f"{section.tokens} tokens, and tune.validation.windows + tune.batch need "
                         f"{section.validation.windows} + {section.batch}; "
                         f"{_more_windows(section, documents, windows)}")
    require_known(windows.ids, model)
    conversations = isinstance(source, text.Text) and source.conversations
    return windows, {"data": source.name, "split": source.split,
                     "format": "conversations" if conversations else section.format,
                     "text_sha256": source.sha256,
                     "tokenised": sampling.described(source, part),
                     "documents": len(part.sizes()), "documents_lost": windows.lost}


def _documents(source: text.Text | text.Records, section: TuneSection, model: Path,
               tokens: Any) -> list[Document]:
    """What is put into windows, with the tokens that count."""
    response_only = section.loss_on == "response"

    def encode(part: str, special: bool) -> list[int]:
        return tokens(part, add_special_tokens=special, verbose=False)["input_ids"]

    if isinstance(source, text.Records):
        return [data.alpaca(row, encode, tokens.eos_token_id, response_only=response_only)
                for row in source.rows]
    if source.conversations:
        found = [_conversation(messages, said, tokens, response_only)
                 for messages, said in zip(source.conversations, written(source, tokens),
                                           strict=True)]
        answered = [document for document in found if data.before_answer(document)
                    < len(document.ids)]
        if not answered:
            raise InputError(f"tune.data: no conversation in {source.name} has a message of the "
                             "assistant, and tune.loss_on: response trains on these alone; give "
                             "others, or set tune.loss_on: all")
        return answered
    if section.packing:
        return [data.plain(token_ids(source, model).tolist())]
    return [data.plain(encode(part, True)) for part in source.documents if part.strip()]


def _conversation(messages: chat.Conversation, said: str, tokens: Any,
                  response_only: bool) -> Document:
    if not response_only:
        return data.plain(tokens(said, add_special_tokens=False, verbose=False)["input_ids"])
    if not tokens.is_fast:
        raise InputError("tune.loss_on: response, and the model's tokenizer does not tell which of "
                         "a conversation's tokens are the answers'; set tune.loss_on: all")
    found = tokens(said, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return data.answered(found["input_ids"], found["offset_mapping"],
                         chat.answers(messages, tokens))


def _more_windows(section: TuneSection, documents: Sequence[Document], windows: Windows) -> str:
    """What to change where a text gives too few windows."""
    if not section.packing and windows.lost:
        longest = max(map(data.before_answer, documents))
        return (f"{_lost(windows)}: raise tune.tokens (the longest prompt has {longest}) or set "
                "tune.packing: true")
    if windows.empty:
        share = windows.empty / (windows.empty + len(windows))
        return (f"{share:.0%} of all windows hold prompts alone, and {_lost(windows)}: raise "
                "tune.tokens, so that windows reach the responses, and give more rows or lower "
                "tune.batch and tune.validation.windows")
    if not section.packing:
        return "lower them, set tune.packing: true, or give more documents"
    return "lower them or tune.tokens, or give a longer text"


def _lost(windows: Windows) -> str:
    return (f"of {windows.lost} of {windows.documents} documents "
            f"({windows.lost / max(1, windows.documents):.0%}) no window holds a token that counts")


def finish(job: Job, source: Checkpoint, task: Task, state: State,
           device: torch.device) -> dict[str, float]:
    """Write the best of what was trained to `model/`, adapters merged, and compare it, loaded anew,
    with the model that was trained.

    Returns the figures. Raises StageError where writing made the model worse.
    """
    section = task.section
    dtype, code = training.compute_type(section, device), task.model.trust_remote_code
    trained = students.student(task.student, section, dtype, device, task.seed,
                               trust_remote_code=code)
    students.load(trained, state.best)
    trained.eval()
    out = job.out / "model"
    students.write(source, trained, section, out)
    if section.keep_adapter:
        trained.save_pretrained(job.out / "adapter")
    saved = loading.load_model(out, dtype, device, trust_remote_code=code)
    batch = min(section.batch // (section.accumulation * section.processes),
                max(1, slice_tokens(source.architecture.vocabulary) // section.tokens))
    difference, before, after = compare(trained, saved, task.validation, batch, device)
    if not after <= before + MERGE_TOLERANCE:
        raise StageError(f"the model as written is worse than as trained: validation loss "
                         f"{after:.4f} against {before:.4f} nats, allowed {MERGE_TOLERANCE:g} more")
    return {"tune.loss.before": state.history[0][1], "tune.loss.after": after,
            "tune.merge.max_logit_difference": difference}


@torch.no_grad()
def compare(trained: Any, saved: Any, windows: Windows, batch: int,
            device: torch.device) -> tuple[float, float, float]:
    """Largest absolute difference of logits, and the mean loss in nats of either model."""
    difference, sums = 0.0, [0.0, 0.0]
    for start in range(0, len(windows), batch):
        ids = windows.ids[start:start + batch].to(device)
        labels = windows.labels[start:start + batch].to(device)
        with torch.autocast(device.type, torch.bfloat16,
                            enabled=saved.dtype == torch.bfloat16):
            first, second = (model(input_ids=ids, use_cache=False).logits.float()
                             for model in (trained, saved))
        difference = max(difference, float((first - second).abs().max()))
        for place, logits in enumerate((first, second)):
            sums[place] += float(cross_entropy(predicting(logits, labels), predicted(labels)))
    if not math.isfinite(difference):
        raise StageError("the logits of the model as trained or as written are not finite; "
                         "lower tune.learning_rate, or set tune.dtype: float32")
    return difference, sums[0] / windows.predicted, sums[1] / windows.predicted
