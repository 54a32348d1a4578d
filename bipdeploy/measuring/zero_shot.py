"""Accuracy on multiple-choice tasks by EleutherAI's lm-eval, dense beside pruned.

Both models answer the same documents, so their difference is judged document by document: its
standard error is smaller than what the two accuracies' own would give.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bipdeploy.data import windows
from bipdeploy.errors import InputError, StageError
from bipdeploy.measuring import tasks
from bipdeploy.measuring.tasks import Task
from bipdeploy.model import loading
from bipdeploy.model.blocks import compute_device, compute_dtype
from bipdeploy.planning.job import Job
from bipdeploy.recipe.evaluate import ZeroShotSection
from bipdeploy.recipe.figures import CHANCE, accuracy_names
from bipdeploy.running.machine import version_of

if TYPE_CHECKING:
    import torch

Z95 = 1.959964  # two-sided 95% of the normal distribution


@dataclass(frozen=True)
class Answers:
    """What one model did on one task, by document: a score for each metric that the task has.

    chance: what guessing would get; documents: hashes that identify what was asked.
    """

    scores: dict[str, list[float]]
    chance: list[float]
    documents: list[str]


def measure(job: Job) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures and protocol of dense and pruned accuracy on the same documents."""
    recipe, section = job.recipe, job.recipe.evaluate.zero_shot
    wanted = tasks.find(section.tasks)
    device = compute_device(recipe.model)
    dtype = compute_dtype(recipe.model, job.dense.config, device)
    with quiet():
        loaded = load(wanted, section)
    answers = {}
    for which, name in (("dense", "dense"), ("pruned", "exported")):
        model = loading.load_model(job.inputs[name], dtype, device,
                                   trust_remote_code=recipe.model.trust_remote_code)
        answers[which] = evaluate(model, job.inputs["dense"], loaded, section, job,
                                  first=which == "dense")
        del model
    figures, record = summarise({task: (answers["dense"][task.name], answers["pruned"][task.name])
                                 for task in wanted})
    for name, task in loaded.items():
        record["tasks"][name] |= {"few_shot": task.get_config("num_fewshot"),
                                  "version": task.VERSION}
    return figures, {"engine": f"lm-eval {version_of('lm_eval')}", "few_shot": section.few_shot,
                     "limit": section.limit, "seed": section.seed, "dtype": str(dtype),
                     "device": str(device), **record}


def evaluate(model: torch.nn.Module, tokenizer: Path, loaded: dict[str, Any],
             section: ZeroShotSection, job: Job, *, first: bool = True) -> dict[str, Answers]:
    """One model's answers by task. `first`: of the two models that `job.reporter` counts."""
    from lm_eval import evaluator

    with quiet():
        for task in loaded.values():  # both models are shown the same examples
            task.set_fewshot_seed(section.seed)
        wrapped = _wrapped(model, tokenizer, section.batch, job.reporter.advance,
                           partial(_started, job, first))
        # Not simple_evaluate: it asks git and pip about this machine, seconds each time.
        results: Any = evaluator.evaluate(wrapped, loaded, limit=section.limit, bootstrap_iters=0,
                                          log_samples=True)
    return {name: _answers(results["samples"][name]) for name in loaded}


def load(wanted: Sequence[Task], section: ZeroShotSection) -> dict[str, Any]:
    """lm-eval's task objects by name, with their documents. Raises InputError where these cannot
    be had."""
    from lm_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager(include_path=sorted({str(task.file.parent) for task in wanted}),
                          include_defaults=False)  # its own index takes twelve seconds
    loaded: dict[str, Any] = {}
    for task in wanted:
        try:
            loaded |= get_task_dict([task.name], manager)
        except Exception as error:  # data libraries and the tasks' own code raise what they like
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"evaluate.zero_shot.tasks: {task.name} could not be loaded: "
                             f"{line[:160]}; offline, use builtin:pydocs_choice or a folder of "
                             "tasks whose data is here") from error
    for found in loaded.values():
        if found.get_config("num_fewshot") != 0:  # as lm-eval: a task may insist on none
            found.set_config("num_fewshot", section.few_shot)
    return loaded


def summarise(answers: Mapping[Task, tuple[Answers, Answers]]
              ) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures, and the record of every task and of their unweighted mean, from the answers of
    dense and pruned."""
    whole, *single = accuracy_names([task.name for task in answers])
    figures: dict[str, float] = {}
    records, everything, chances = {}, [], []
    spread: dict[str, dict[str, float]] = {}
    for base, (task, (dense, pruned)) in zip(single, answers.items(), strict=True):
        assert dense.documents == pruned.documents
        if task.metric not in dense.scores:
            raise InputError(f"evaluate.zero_shot.tasks: {task.name} reports no {task.metric}; "
                             "leave it out")
        pairs = list(zip(dense.scores[task.metric], pruned.scores[task.metric], strict=True))
        chance = _mean(dense.chance)
        records[task.name] = {
            "metric": task.metric, "documents": len(pairs), "chance": chance,
            **{which: _described(found, task.metric)
               for which, found in (("dense", dense), ("pruned", pruned))}, **paired([pairs])}
        everything.append(pairs)
        chances.append(chance)
        _add(figures, spread, base, records[task.name], chance)
    mean = paired(everything)
    _add(figures, spread, whole, mean, _mean(chances))
    return figures, {"tasks": records, "mean": mean, "spread": spread}


def paired(scores: Sequence[Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """Dense minus pruned and pruned / dense, each with its standard error and 95% interval, from
    the scores (dense, pruned) of every document of every task; tasks count alike.

    The ratio's error is linearised: that of pruned − ratio × dense, document by document.
    """
    dense, pruned = (_mean([_mean([pair[side] for pair in task]) for task in scores])
                     for side in (0, 1))

    def error(ratio: float) -> float:
        return math.sqrt(sum(stderr([p - ratio * d for d, p in task])**2
                             for task in scores)) / len(scores)

    found = {"accuracy": {"dense": dense, "pruned": pruned},
             "difference": _interval(dense - pruned, error(1.0))}
    if dense:
        found["ratio"] = _interval(pruned / dense, error(pruned / dense) / dense)
    return found


def _interval(value: float, error: float) -> dict[str, Any]:
    return {"value": value, "stderr": error,
            "interval": [value - Z95 * error, value + Z95 * error]}


def _described(answers: Answers, metric: str) -> dict[str, Any]:
    scores = answers.scores[metric]
    return {**{name: _mean(values) for name, values in answers.scores.items()},
            "value": _mean(scores), "stderr": stderr(scores),
            "interval": wilson(_mean(scores), len(scores))}


def _add(figures: dict[str, float], spread: dict[str, dict[str, float]], name: str,
         record: Mapping[str, Any], chance: float) -> None:
    """The figures of a task or of the mean; there is no ratio to a dense accuracy of zero."""
    figures |= {f"{name}.{which}": value for which, value in record["accuracy"].items()}
    figures[f"{name}.{CHANCE}"] = chance
    if "ratio" in record:
        figures[f"{name}.ratio"] = record["ratio"]["value"]
        spread[f"{name}.ratio"] = {"half_width_95": Z95 * record["ratio"]["stderr"]}


def wilson(share: float, count: int) -> list[float]:
    """The 95% interval of a share of `count` documents (Wilson's, which stays within 0 and 1)."""
    middle = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * math.sqrt(share * (1 - share) / count
                                                 + Z95**2 / (4 * count**2))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def stderr(values: Sequence[float]) -> float:
    """Standard error of the mean, as lm-eval computes it; of a single value none is known: 0."""
    mean, count = _mean(values), len(values)
    return math.sqrt(sum((v - mean)**2 for v in values) / max(1, count - 1) / count)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _answers(samples: Sequence[dict[str, Any]]) -> Answers:
    """From lm-eval's log of one task: an entry per document, in the task's order."""
    ordered = sorted(samples, key=lambda s: s["doc_id"])
    if any(math.isnan(float(reply[0])) for s in ordered for reply in s["filtered_resps"]):
        raise StageError("evaluate.zero_shot: log-likelihoods are not numbers: the model's type "
                         "overflows; set model.dtype to float32")
    known = [m for m in ("acc", "acc_norm") if m in ordered[0]]
    # With acc_mutual_info every answer is asked about twice.
    twice = 2 if "acc_mutual_info" in ordered[0] else 1
    return Answers({m: [float(s[m]) for s in ordered] for m in known},
                   [twice / len(s["filtered_resps"]) for s in ordered],
                   [s["doc_hash"] for s in ordered])


def _started(job: Job, first: bool, answers: int, too_long: int) -> None:
    if first:
        job.reporter.total(2 * answers, "answers")
        if too_long:
            job.reporter.note(f"{too_long / answers:.1%} of the zero-shot questions are longer "
                              "than the model's maximum; their beginnings are cut off")


def _wrapped(model: torch.nn.Module, tokenizer: Path, batch: int, advance: Callable[[], None],
             started: Callable[[int, int], None]) -> Any:
    """The model as lm-eval takes it, without its progress bars: progress goes to `advance`."""
    from lm_eval.models.huggingface import HFLM

    class Hook:
        """lm-eval tells its cache of every answer; here it is only counted."""

        def add_partial(self, *_: Any) -> None:
            advance()

    class Wrapped(HFLM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True,
                                  override_bs: int | None = None) -> Any:
            started(len(requests), sum(len(context) + len(answer) > self.max_length + 1
                                       for _, context, answer in requests))
            return super()._loglikelihood_tokens(requests, True, override_bs)

    tokens, config = windows.tokenizer(tokenizer), cast(Any, model.config)
    if (tokens.pad_token_id or 0) >= config.vocab_size:  # what pads is masked, so any will do
        tokens.pad_token = tokens.eos_token
    # In 16 bits the sum over the vocabulary would round away what separates two answers.
    wrapped = Wrapped(pretrained=model, backend="causal", tokenizer=tokens,
                      batch_size=batch, softmax_dtype="float32")
    wrapped.cache_hook = Hook()
    return wrapped


@contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's log and the one progress bar that it has no switch for off the screen."""
    from lm_eval.api import task
    from tqdm import tqdm

    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.CRITICAL)
    task.tqdm = partial(tqdm, disable=True)
    try:
        yield
    finally:
        log.setLevel(level)
        task.tqdm = tqdm
