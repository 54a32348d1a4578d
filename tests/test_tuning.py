"""Training's parts: windows and labels, order, losses, steps, checkpoints, the merge."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from bipdeploy.errors import StageError
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.recipe.model import ModelSection
from bipdeploy.recipe.tune import PROJECTIONS, TuneSection
from bipdeploy.running.reporter import Silent
from bipdeploy.tuning import adapters, checkpoints, data, losses, students, training
from bipdeploy.tuning.checkpoints import State
from bipdeploy.tuning.data import IGNORED, Document, Windows
from tests.sliced import (
    CPU,
    architecture_of,
    draw_kept,
    loaded,
    logits,
    token_windows,
    write_biased,
    write_sliced,
)
from tests.tiny import tiny_model

MODEL = ModelSection(id="none", device="cpu")


# Windows

def letters(text: str, special: bool) -> list[int]:
    return [0] * special + [ord(letter) for letter in text]


def test_packed_windows_hold_the_documents_one_after_another():
    packed = data.pack([data.plain([1, 2, 3]), Document([4, 5, 6, 7], [IGNORED, 5, 6, 7])], 3)
    assert packed.ids.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert packed.labels.tolist() == [[1, 2, 3], [IGNORED, 5, 6]]
    assert (packed.cut, packed.predicted) == (1, 4)


def test_padded_windows_hold_one_document_each_and_padding_has_no_label():
    padded = data.pad([data.plain([1, 2, 3, 4, 5]), data.plain([6, 7])], 4, filler=9)
    assert padded.ids.tolist() == [[1, 2, 3, 4], [6, 7, 9, 9]]
    assert padded.labels.tolist() == [[1, 2, 3, 4], [6, 7, IGNORED, IGNORED]]
    assert (padded.cut, padded.predicted) == (1, 4)


def test_a_window_in_which_nothing_is_predicted_is_left_out():
    hidden = Document([1, 2, 3, 4], [IGNORED] * 3 + [4])
    padded = data.pad([hidden, data.plain([7]), data.plain([8, 9])], 3, filler=0)
    assert padded.ids.tolist() == [[8, 9, 0]]


@pytest.mark.parametrize("response_only", [True, False])
def test_an_instruction_is_put_into_stanford_s_prompt(response_only):
    row = {"instruction": "Add {braces}.", "input": "1 2", "output": "3"}
    made = data.alpaca(row, letters, 0, response_only=response_only)
    text = "".join(map(chr, made.ids[1:-1]))
    assert text == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {braces}.\n\n### Input:\n1 2\n\n### Response:3")
    assert made.ids[-1] == 0
    shown = [label for label in made.labels if label != IGNORED]
    assert shown == ([ord("3"), 0] if response_only else made.ids)


def test_an_instruction_without_input_has_the_shorter_prompt():
    made = data.alpaca({"instruction": "Go.", "input": " ", "output": "Yes"}, letters, None,
                       response_only=True)
    text = "".join(map(chr, made.ids[1:]))
    assert "Input" not in text and text.endswith("### Instruction:\nGo.\n\n### Response:Yes")


def test_tokens_that_reach_into_an_answer_count():
    places = [(0, 2), (2, 4), (4, 7), (7, 7), (7, 9), (9, 9)]  # of empty ones nothing is known
    made = data.answered(range(1, 7), places, [(3, 6), (7, 9)])
    assert made.labels == [IGNORED, 2, 3, IGNORED, 5, IGNORED]
    assert data.before_answer(made) == 1


def test_documents_without_a_token_that_counts_in_a_window_are_counted():
    late = Document([1, 2, 3, 4], [IGNORED, IGNORED, IGNORED, 4])
    padded = data.pad([late, data.plain([7, 8])], 3, filler=0)
    assert (len(padded), padded.empty, padded.documents, padded.lost) == (1, 1, 2, 1)
    packed = data.pack([late, data.plain([7, 8]), late], 4)
    assert (len(packed), packed.empty, packed.documents, packed.lost) == (2, 0, 3, 1)
    hidden = data.pack([Document([1] * 9, [IGNORED] * 8 + [1])], 3)
    assert (len(hidden), hidden.empty, hidden.documents, hidden.lost) == (1, 2, 1, 0)


def test_windows_held_back_are_none_of_those_trained_on():
    windows = data.pack([data.plain(range(60))], 3)
    train, held = data.hold_back(windows, 6, seed=1)
    assert (len(train), len(held)) == (14, 6)
    firsts = train.ids[:, 0].tolist() + held.ids[:, 0].tolist()
    assert sorted(firsts) == list(range(0, 60, 3))
    assert train.ids.tolist() == sorted(train.ids.tolist())
    again = data.hold_back(windows, 6, seed=1)[1].ids
    assert torch.equal(held.ids, again)
    assert not torch.equal(held.ids, data.hold_back(windows, 6, seed=2)[1].ids)


def test_every_epoch_reads_every_window_once_in_an_order_of_its_own():
    rows = torch.cat([data.rows_of_step(step, 4, 10, seed=3) for step in range(5)]).tolist()
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]
    assert rows[8:12] == data.rows_of_step(2, 4, 10, seed=3).tolist()  # without the steps before


# Losses

def test_losses_count_only_tokens_with_a_label_and_add_up():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    labels = torch.randint(7, (2, 5))
    labels[0, 3:] = IGNORED
    p, q = student[:, :-1].double().softmax(-1), teacher[:, :-1].double().softmax(-1)
    counts = labels[:, 1:] != IGNORED
    targets = labels[:, 1:].clamp(min=0)
    nll = -p.gather(-1, targets[..., None])[..., 0].log()
    kl = (q * (q.log() - p.log())).sum(-1)
    expected = float((0.3 * nll[counts] + 0.7 * kl[counts]).sum())
    own, dense = (losses.predicting(logits, labels) for logits in (student, teacher))
    wanted = losses.predicted(labels)
    assert float(losses.mixed(own, dense, wanted, 0.7, 1.0)) == pytest.approx(expected)
    assert float(losses.mixed(own, None, wanted, 0.0, 1.0)) == pytest.approx(
        float(nll[counts].sum()))


def test_temperature_softens_both_models_and_keeps_the_size_of_gradients():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    assert float(losses.divergence(student, teacher, 2.0)) == pytest.approx(
        4 * float(losses.divergence(student / 2, teacher / 2, 1.0)))


def test_the_learning_rate_warms_up_and_falls():
    section = TuneSection(steps=20, warmup=0.2, learning_rate=1.0, schedule="linear")
    rates = training.learning_rates(section)
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert rates[12] == pytest.approx(0.5) and len(rates) == 20
    constant = training.learning_rates(section.model_copy(update={"schedule": "constant"}))
    assert constant[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1]) and constant[-1] == 1


# Training

def task(folder: Path, place: Path, windows: Windows | None = None, **settings) -> training.Task:
    """Training of a tiny model on random windows that is over in a second."""
    section = TuneSection.model_validate({
        "tokens": 16, "steps": 6, "batch": 4, "accumulation": 1, "learning_rate": 5e-3,
        "validation": {"windows": 4, "every": 2}, "checkpoint_every": 100, **settings})
    windows = windows or data.pack([data.plain(token_windows(24, 16).flatten().tolist())], 16)
    train, held = data.hold_back(windows, 4, seed=0)
    return training.Task(section, MODEL, 0, folder, folder, train, held, place, "identity")


def trained(*arguments, **settings) -> State:
    return training.train(task(*arguments, **settings), CPU, Silent())


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys() and a
    return all(torch.equal(a[name], b[name]) for name in a)


def test_training_lowers_the_loss_that_it_minimises(tiny, tmp_path):
    windows = data.pack([data.plain(list(range(1, 17)) * 24)], 16)
    state = trained(tiny, tmp_path / "c", windows)
    assert [step for step, _ in state.history] == [0, 2, 4, 6]
    assert state.history[-1][1] < state.history[0][1] - 0.1
    assert state.best_step == 6 and state.tokens == 6 * 4 * 15


def test_distillation_moves_the_pruned_model_towards_the_dense_one(tiny, tmp_path):
    arch = architecture_of(tiny)
    small = write_sliced(tiny, tmp_path / "small", draw_kept(arch, [(1, 48)] * 3))
    job = task(small, tmp_path / "c", distillation={"weight": 1.0}, steps=8)
    job = training.Task(**{**vars(job), "dense": tiny})
    ids = job.validation.ids
    model = adapters.adapted(small, job.section, torch.float32, CPU, 0)

    before = distance(model, tiny, ids)
    students.load(model, last(job))
    assert distance(model, tiny, ids) < before


# AdamW divides by a gradient's size, so that what rounds to another tiny gradient moves a weight.
ROUNDING = 1e-3


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Distance of all B together (A starts far from zero), relative to their size."""
    first, second = (torch.cat([t.flatten() for n, t in sorted(x.items()) if "lora_B" in n])
                     for x in (a, b))
    return float((first - second).norm() / first.norm())


def distance(model: torch.nn.Module, dense: Path, ids: torch.Tensor) -> float:
    """Divergence of a model's next tokens from the dense one's."""
    with torch.no_grad():
        own, expected = (losses.predicting(logits(m, ids), ids) for m in (model, loaded(dense)))
        return float(losses.divergence(own, expected, 1.0))


def last(job: training.Task) -> dict[str, torch.Tensor]:
    """The adapters after the last step, best or not."""
    training.train(job, CPU, Silent())
    return saved(job.checkpoint).values


def saved(folder: Path) -> State:
    state = checkpoints.load(folder)
    assert state
    return state


@pytest.mark.parametrize("settings", [{"accumulation": 4}, {"gradient_checkpointing": True}])
def test_how_a_step_is_computed_changes_its_result_by_rounding_only(tiny, tmp_path, settings):
    rows = [Document(row, [IGNORED] * first + row[first:]) for first, row in zip(
        (0, 3, 9, 14) * 6, token_windows(24, 16).tolist(), strict=True)]
    windows = data.pad(rows, 16, 0)  # rows count differently, so a mean of means would be wrong
    whole = last(task(tiny, tmp_path / "a", windows))
    split = last(task(tiny, tmp_path / "b", windows, **settings))
    assert apart(whole, split) < ROUNDING


def test_padding_changes_training_by_rounding_only(tiny, tmp_path):
    rows = [data.plain(row) for row in token_windows(24, 12).tolist()]
    short = last(task(tiny, tmp_path / "a", data.pad(rows, 12, 0)))
    padded = last(task(tiny, tmp_path / "b", data.pad(rows, 16, 5)))
    assert apart(short, padded) < ROUNDING


def test_adapters_that_never_help_leave_the_best_step_at_0_and_training_ends_early(tiny, tmp_path):
    windows = data.pack([data.plain(greedy(tiny, 24, 16).flatten().tolist())], 16)
    state = trained(tiny, tmp_path / "c", windows, learning_rate=1.0, steps=40, warmup=0,
                    validation={"windows": 4, "every": 1, "patience": 2})
    assert (state.best_step, state.step) == (0, 2)
    assert all(not tensor.any() for name, tensor in state.best.items() if "lora_B" in name)


def greedy(folder: Path, count: int, tokens: int) -> torch.Tensor:
    """What a model finds likeliest itself, so that training can hardly make it better."""
    model, ids = loaded(folder), token_windows(count, 1)
    while ids.shape[1] < tokens:
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids


def test_training_that_diverges_says_so(tiny, tmp_path):
    with pytest.raises(StageError, match=r"diverged.* lower tune\.learning_rate"):
        trained(tiny, tmp_path / "c", learning_rate=1e30, clip=0, warmup=0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_that_was_interrupted_goes_on_to_the_same_bits(tiny, tmp_path, dropout):
    class Killed(Exception):
        pass

    calls = 0

    def kill() -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Killed

    whole = trained(tiny, tmp_path / "a", dropout=dropout)
    job = task(tiny, tmp_path / "b", dropout=dropout, checkpoint_every=3)
    with pytest.raises(Killed):
        training.train(job, CPU, Silent(), kill)
    reporter = Silent()
    state = training.train(job, CPU, reporter)
    assert reporter.notes == ["goes on from step 3 of a run that was interrupted"]
    assert equal(state.best, whole.best) and equal(*(saved(tmp_path / n).values for n in "ab"))
    assert state.history == whole.history and state.tokens == whole.tokens


def test_training_leaves_the_caller_s_random_numbers_alone(tiny, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    trained(tiny, tmp_path / "c", steps=1, dropout=0.1)
    assert torch.equal(torch.rand(3), expected)


# Checkpoints

def some_state(step: int) -> State:
    parts = [{"a.weight": torch.full((2, 3), float(step + part))} for part in range(4)]
    return State(*parts, step, [(0, 1.5), (step, 1.25)], 10, 0.5)


def test_a_checkpoint_comes_back_as_it_was_and_replaces_the_one_before(tmp_path):
    for step in (5, 10):
        checkpoints.save(tmp_path / "c", "mine", some_state(step))
    back = checkpoints.load(tmp_path / "c")
    assert back is not None and vars(back).keys() == vars(some_state(10)).keys()
    assert (back.step, back.history, back.tokens, back.seconds) == (10, [(0, 1.5), (10, 1.25)],
                                                                    10, 0.5)
    assert equal(back.second, some_state(10).second)
    assert len(list((tmp_path / "c").iterdir())) == 2
    assert checkpoints.fault(tmp_path / "c", "mine") is None
    assert "another recipe" in str(checkpoints.fault(tmp_path / "c", "other"))


@pytest.mark.parametrize("name", ["state.json", "step-00000005.safetensors"])
def test_a_checkpoint_that_is_damaged_is_not_used(tmp_path, name):
    checkpoints.save(tmp_path, "mine", some_state(5))
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    assert checkpoints.fault(tmp_path, "mine")


# The merge

SHAPES = {
    "mha": ({"kv_heads": 4}, None), "gqa": ({"kv_heads": 2}, None),
    "per-block": ({"kv_heads": 2}, [(1, 48), (2, 96), (2, 24)]),
    "no-attention": ({"kv_heads": 2}, [(2, 96), (0, 96), (2, 0)]),
    "biases": ({"kv_heads": 2, "attention_bias": True, "mlp_bias": True}, None),
    "qwen2-biased": ({"family": "qwen2", "kv_heads": 2}, [(1, 48), (2, 48), (2, 96)]),
    "qwen3": ({"family": "qwen3", "kv_heads": 2}, None),
}


@pytest.fixture(scope="module", params=list(SHAPES))
def shaped(request, tmp_path_factory) -> Path:
    """A float32 model of one of the shapes that pruning and repair leave."""
    settings, widths = SHAPES[request.param]
    place = tmp_path_factory.mktemp(request.param)
    folder = tiny_model(place / "model", **settings)
    if widths:
        folder = write_sliced(folder, place / "sliced", draw_kept(architecture_of(folder), widths))
    return write_biased(folder, place / "biased") if "biased" in request.param else folder


def randomised(folder: Path, section: TuneSection):
    model = adapters.adapted(folder, section, torch.float32, CPU, 0)
    torch.manual_seed(1)
    students.load(model, {name: torch.randn_like(p) * 0.1
                          for name, p in students.parameters(model).items()})
    return model.eval()


def test_the_merged_checkpoint_computes_what_the_adapted_model_does(shaped, tmp_path):
    model = randomised(shaped, TuneSection())
    source = Checkpoint(shaped)
    adapters.merge(source, model, tmp_path / "merged")
    ids = token_windows(2, 24)
    expected = logits(model, ids)
    assert (logits(loaded(tmp_path / "merged"), ids) - expected).abs().max() < 1e-4
    assert (logits(loaded(shaped), ids) - expected).abs().max() > 0.1
    before, after = (load_file(f / "model.safetensors") for f in (shaped, tmp_path / "merged"))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()}
    assert Checkpoint(tmp_path / "merged").config == source.config


def test_only_the_projections_that_are_named_change(tiny, tmp_path):
    section = TuneSection(target_modules=["down_proj", "q_proj"])
    assert section.target_modules == ["q_proj", "down_proj"]
    adapters.merge(Checkpoint(tiny), randomised(tiny, section), tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in
                     (tiny, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.{name}.weight" for i in range(3)
                       for name in ("self_attn.q_proj", "mlp.down_proj")}


def test_adapters_that_are_zero_leave_16_bit_weights_bit_for_bit(tmp_path):
    folder = tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    model = adapters.adapted(folder, TuneSection(), torch.float32, CPU, 0)
    adapters.merge(Checkpoint(folder), model, tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "merged"))
    assert equal(before, after)


def test_every_projection_gets_an_adapter_in_float32_and_nothing_else_is_trained(tiny):
    model = adapters.adapted(tiny, TuneSection(rank=2), torch.bfloat16, CPU, 0)
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in students.parameters(model)}
    assert names == set(PROJECTIONS)
    assert {p.dtype for p in students.parameters(model).values()} == {torch.float32}
    assert len(students.parameters(model)) == 3 * 7 * 2


def test_adapters_that_are_kept_load_in_peft(shaped, tmp_path):
    model = randomised(shaped, TuneSection())
    model.save_pretrained(tmp_path / "adapter")
    ids = token_windows(2, 24)
    expected = logits(model, ids)
    again = PeftModel.from_pretrained(loaded(shaped), tmp_path / "adapter").eval()
    assert (logits(again, ids) - expected).abs().max() < 1e-5
    assert math.isfinite(float(expected.abs().max()))


def test_what_is_written_of_all_weights_computes_what_the_trained_model_does(shaped, tmp_path):
    section = TuneSection(method="full")
    model = students.student(shaped, section, torch.float32, CPU, 0)
    torch.manual_seed(1)
    students.load(model, {name: p + 0.02 * torch.randn_like(p)
                          for name, p in students.parameters(model).items()})
    students.write(Checkpoint(shaped), model, section, tmp_path / "made")
    ids = token_windows(2, 24)
    expected = logits(model, ids)
    assert torch.equal(logits(loaded(tmp_path / "made"), ids), expected)
    assert (logits(loaded(shaped), ids) - expected).abs().max() > 0.01
    before, after = (load_file(f / "model.safetensors") for f in (shaped, tmp_path / "made"))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()}
