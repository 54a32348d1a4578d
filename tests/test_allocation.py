"""Allocation: the ratio is met to a rounding unit, or refused with the highest that can be met."""

from __future__ import annotations

import itertools
import math
import random
import re
from functools import lru_cache

import pytest

from bipdeploy.errors import InputError
from bipdeploy.model.families import Architecture, BlockWidths, architecture
from bipdeploy.model.formats import pruned_config
from bipdeploy.pruning.allocation import allocate, global_widths, uniform_widths
from bipdeploy.pruning.depth import unprotected
from bipdeploy.pruning.divisibility import faults, group_faults, head_choices
from bipdeploy.pruning.kept import BlockScores, Kept, keep
from bipdeploy.recipe.prune import PruneSection


def sizes(hidden: int, channels: int, heads: int, kv_heads: int, blocks: int, **more) -> dict:
    return {"model_type": "llama", "hidden_size": hidden, "intermediate_size": channels,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "num_hidden_layers": blocks, "vocab_size": 100, **more}


def already_pruned() -> Architecture:
    dense = sizes(64, 96, 4, 4, 5, head_dim=32)
    widths = [BlockWidths(4, 4, 96), BlockWidths(2, 2, 40), BlockWidths(0, 0, 64),
              BlockWidths(4, 4, 0), BlockWidths(1, 1, 72)]
    return architecture(pruned_config(dense, architecture(dense), widths))


ARCHITECTURES = {
    "heavy-heads": architecture(sizes(64, 96, 4, 2, 3, head_dim=32)),
    "heavy-heads-mha": architecture(sizes(64, 96, 4, 4, 3, head_dim=32)),
    "biases": architecture(sizes(64, 96, 4, 2, 3, head_dim=32, attention_bias=True,
                                 mlp_bias=True)),
    "pico": architecture(sizes(64, 172, 8, 4, 5)),
    "odd-channels": architecture(sizes(256, 683, 8, 8, 4)),
    "one-kv-head": architecture(sizes(128, 344, 8, 1, 6)),
    "many-heads": architecture(sizes(512, 1376, 32, 32, 4)),
    "many-blocks": architecture(sizes(128, 160, 8, 2, 24)),
    "already-pruned": already_pruned(),
}
# All divide by 8 GPUs. `repeated`: KV heads are fewer than GPUs, and copied.
PARALLEL = {
    "mha": architecture(sizes(512, 1376, 32, 32, 4)),
    "gqa": architecture(sizes(512, 1376, 32, 8, 4)),
    "repeated": architecture(sizes(256, 688, 32, 4, 5)),
    "one-kv-head": architecture(sizes(128, 344, 8, 1, 6)),
    "heavy-heads": architecture(sizes(64, 96, 16, 16, 3, head_dim=32)),
}
RATIOS = (0.01, 0.1, 0.2, 0.25, 0.37, 0.5, 0.66, 0.8, 0.95)
PARTS = {"both": (True, True), "heads": (True, False), "ffn": (False, True)}


def section(ratio: float, layers: str = "uniform", *, round_to: int = 8, parts: str = "both",
            first: int = 0, last: int = 0) -> PruneSection:
    heads, ffn = PARTS[parts]
    return PruneSection.model_validate({
        "ratio": ratio, "layers": layers, "round_to": round_to, "heads": heads, "ffn": ffn,
        "protect": {"first": first, "last": last}})


@lru_cache
def draw_scores(arch: Architecture, seed: int = 0) -> list[BlockScores]:
    """Scores whose scale differs between blocks, so that a global ranking is far from even."""
    draw = random.Random(seed)
    scales = [draw.uniform(0.2, 2) for _ in arch.blocks]
    return [BlockScores([scale * draw.random() for _ in range(w.kv_heads)],
                        [scale * draw.random() for _ in range(w.intermediate)])
            for scale, w in zip(scales, arch.blocks, strict=True)]


def flat_scores(arch: Architecture) -> list[BlockScores]:
    return [BlockScores([1.0] * w.kv_heads, [1.0] * w.intermediate) for w in arch.blocks]


def all_parameters(arch: Architecture) -> int:
    return sum(arch.block_parameters(i) for i in range(len(arch.blocks)))


def removed(arch: Architecture, widths: list[BlockWidths]) -> int:
    return sum(arch.block_parameters(i) - arch.block_parameters(i, w)
               for i, w in enumerate(widths))


def rounding_unit(arch: Architecture, asked: PruneSection) -> int:
    """Parameters of one rounding step: `round_to` channels, or a KV group where FFNs stay.

    A uniform step is taken in every unprotected block, a global one in a single block.
    """
    step = (asked.round_to * arch.channel_parameters() if asked.ffn
            else max(arch.kv_group_parameters(i) for i in unprotected(arch, asked)))
    return step * (len(unprotected(arch, asked)) if asked.layers == "uniform" else 1)


def most(arch: Architecture, asked: PruneSection, parallel: int = 1) -> int:
    """What is removed where every unprotected block keeps one KV group and one rounding unit.

    With tensor parallelism: the fewest groups and channels that divide.
    """
    widths, unit = list(arch.blocks), math.lcm(asked.round_to, parallel)
    for i in unprotected(arch, asked):
        w = arch.blocks[i]
        fewest = min([own.kv for own in head_choices(w, parallel) if own.kv], default=0)
        groups = fewest if asked.heads else w.kv_heads
        channels = min(unit, w.intermediate) if asked.ffn else w.intermediate
        widths[i] = BlockWidths(groups * w.group, groups, channels)
    return removed(arch, widths)


def stated_maximum(message: str) -> float:
    found = re.search(r"at most ([\d.]+) can be removed", message)
    assert found
    return float(found[1])


@lru_cache
def outcomes(arch: Architecture, layers: str) -> list[tuple[PruneSection, list[BlockWidths] | str]]:
    """Many requests, each with the widths it gets or the message with which it is refused."""
    found: list[tuple[PruneSection, list[BlockWidths] | str]] = []
    for ratio, unit, parts, (first, last) in itertools.product(
            RATIOS, (1, 8, 128), PARTS, ((0, 0), (1, 1), (2, 0))):
        asked = section(ratio, layers, round_to=unit, parts=parts, first=first, last=last)
        try:
            found.append((asked, allocate(arch, asked, draw_scores(arch), comparable=True)[0]))
        except InputError as error:
            found.append((asked, str(error)))
    return found


def met(arch: Architecture, layers: str) -> list[tuple[PruneSection, list[BlockWidths]]]:
    return [(asked, widths) for asked, widths in outcomes(arch, layers)
            if not isinstance(widths, str)]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def arch(request) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="module", params=["uniform", "global", "adaptive"])
def layers(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def cases(arch, layers) -> list[tuple[PruneSection, list[BlockWidths]]]:
    found = met(arch, layers)
    assert len(found) > 20
    return found


def test_the_ratio_is_met_within_one_rounding_unit(arch, cases):
    for asked, widths in cases:
        miss = removed(arch, widths) - asked.ratio * all_parameters(arch)
        assert abs(miss) <= rounding_unit(arch, asked), asked


def test_widths_never_grow_and_never_vanish(arch, cases):
    for asked, widths in cases:
        for dense, own in zip(arch.blocks, widths, strict=True):
            assert min(1, dense.kv_heads) <= own.kv_heads <= dense.kv_heads, asked
            assert min(1, dense.intermediate) <= own.intermediate <= dense.intermediate, asked


def test_ffn_widths_are_multiples_or_dense(arch, cases):
    for asked, widths in cases:
        for dense, own in zip(arch.blocks, widths, strict=True):
            assert own.intermediate in (0, dense.intermediate) or (
                own.intermediate % asked.round_to == 0), asked


def test_query_heads_leave_with_their_kv_head(arch, cases):
    for asked, widths in cases:
        for dense, own in zip(arch.blocks, widths, strict=True):
            assert own.heads == own.kv_heads * dense.group, asked


def test_protected_blocks_and_parts_stay_dense(arch, cases):
    for asked, widths in cases:
        for i, (dense, own) in enumerate(zip(arch.blocks, widths, strict=True)):
            if i not in unprotected(arch, asked):
                assert own == dense, asked
            if not asked.heads:
                assert own.kv_heads == dense.kv_heads, asked
            if not asked.ffn:
                assert own.intermediate == dense.intermediate, asked


@pytest.mark.parametrize("name", [name for name, a in ARCHITECTURES.items() if a.uniform])
def test_uniform_widths_are_equal_in_all_unprotected_blocks(name):
    arch = ARCHITECTURES[name]
    for asked, widths in met(arch, "uniform"):
        assert len({widths[i] for i in unprotected(arch, asked)}) == 1, asked


def test_a_ratio_is_refused_where_it_is_out_of_reach_and_only_there(arch, layers):
    for asked, widths in outcomes(arch, layers):
        out_of_reach = asked.ratio * all_parameters(arch) > most(arch, asked)
        assert isinstance(widths, str) == out_of_reach, asked
        if out_of_reach:
            assert widths.startswith("prune.ratio: ")


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("unit", [1, 8, 128])
def test_the_maximum_that_a_refusal_states_is_the_true_one(arch, layers, parts, unit):
    asked = section(0.999, layers, round_to=unit, parts=parts, first=1)
    with pytest.raises(InputError, match=r"prune\.ratio") as caught:
        allocate(arch, asked, draw_scores(arch), comparable=True)
    stated = stated_maximum(str(caught.value))
    true = most(arch, asked) / all_parameters(arch)
    assert true - 0.001 <= stated <= true
    if stated:
        feasible = asked.model_copy(update={"ratio": stated})
        widths, _ = allocate(arch, feasible, draw_scores(arch), comparable=True)
        assert removed(arch, widths) > 0


def test_protection_that_leaves_nothing_is_refused(layers):
    arch = ARCHITECTURES["pico"]
    with pytest.raises(InputError, match=r"prune\.protect.*no block of 5"):
        allocate(arch, section(0.1, layers, first=3, last=2), draw_scores(arch), comparable=True)


def test_heads_of_a_single_kv_head_cannot_be_pruned_alone(layers):
    arch = ARCHITECTURES["one-kv-head"]
    with pytest.raises(InputError, match="at most 0 can be removed"):
        allocate(arch, section(0.1, layers, parts="heads"), draw_scores(arch), comparable=True)


def test_a_higher_ratio_removes_no_less(arch, layers):
    scores = draw_scores(arch)
    last = 0
    for percent in range(2, 60, 2):
        try:
            widths, _ = allocate(arch, section(percent / 100, layers), scores, comparable=True)
        except InputError:
            break
        assert removed(arch, widths) >= last
        last = removed(arch, widths)
    assert last > 0


@pytest.mark.parametrize("comparable", [True, False])
def test_constant_scores_meet_the_ratio_too(arch, comparable):
    asked = section(0.2, "global")
    widths = global_widths(arch, asked, flat_scores(arch), comparable=comparable)
    miss = removed(arch, widths) - 0.2 * all_parameters(arch)
    assert abs(miss) <= rounding_unit(arch, asked)


def test_global_pruning_spares_the_blocks_with_high_scores():
    arch = ARCHITECTURES["pico"]
    scores = [BlockScores([i + 1.0] * w.kv_heads, [i + 1.0] * w.intermediate)
              for i, w in enumerate(arch.blocks)]
    widths = global_widths(arch, section(0.3, "global"), scores, comparable=True)
    assert [w.kv_heads for w in widths] == sorted(w.kv_heads for w in widths)
    assert [w.intermediate for w in widths] == sorted(w.intermediate for w in widths)
    assert (widths[0].kv_heads, widths[0].intermediate) == (1, 8)
    assert widths[-1] == arch.blocks[-1]


@pytest.mark.parametrize("name", ["pico", "heavy-heads", "many-blocks", "already-pruned"])
def test_scores_that_are_not_comparable_are_standardised(name):
    arch = ARCHITECTURES[name]
    scores = draw_scores(arch)
    rescaled = [BlockScores([3.0 ** i * s + i for s in b.heads],
                            [3.0 ** i * s + i for s in b.ffn]) for i, b in enumerate(scores)]
    asked = section(0.3, "global")
    plain = global_widths(arch, asked, scores, comparable=False)
    assert global_widths(arch, asked, rescaled, comparable=False) == plain
    assert global_widths(arch, asked, rescaled, comparable=True) != plain


@pytest.mark.parametrize("seed", range(8))
def test_a_block_with_higher_scores_is_cut_no_more(arch, seed):
    draw = random.Random(seed)
    scores = draw_scores(arch, seed)
    raised = draw.randrange(len(scores))
    lift = draw.uniform(0, 1)
    higher = list(scores)
    higher[raised] = BlockScores([s + lift * draw.random() for s in scores[raised].heads],
                                 [s + lift * draw.random() for s in scores[raised].ffn])
    for ratio, unit in itertools.product((0.1, 0.3), (1, 8, 32)):
        asked = section(ratio, "global", round_to=unit)
        before = global_widths(arch, asked, scores, comparable=True)[raised]
        after = global_widths(arch, asked, higher, comparable=True)[raised]
        assert after.kv_heads >= before.kv_heads
        assert after.intermediate >= before.intermediate


def test_keep_takes_the_best():
    scores = BlockScores([0.3, 0.1, 0.9, 0.5], [5.0, -1.0, 4.0, 0.0, 7.0, 6.0])
    assert keep(scores, BlockWidths(4, 2, 3)) == Kept((2, 3), (0, 4, 5))
    assert keep(scores, BlockWidths(0, 0, 0)) == Kept((), ())
    assert keep(scores, BlockWidths(8, 4, 6)) == Kept((0, 1, 2, 3), (0, 1, 2, 3, 4, 5))


def test_keep_gives_ties_to_the_lower_index():
    scores = BlockScores([1.0, 2.0, 1.0, 1.0], [0.0] * 6)
    assert keep(scores, BlockWidths(3, 3, 4)) == Kept((0, 1, 2), (0, 1, 2, 3))


def test_allocate_keeps_as_many_as_the_widths_say(arch, layers):
    widths, kept = allocate(arch, section(0.2, layers), draw_scores(arch), comparable=True)
    for scores, own, choice in zip(draw_scores(arch), widths, kept, strict=True):
        assert (len(choice.groups), len(choice.channels)) == (own.kv_heads, own.intermediate)
        for values, chosen in ((scores.heads, choice.groups), (scores.ffn, choice.channels)):
            left = [s for i, s in enumerate(values) if i not in chosen]
            assert not left or not chosen or max(left) <= min(values[i] for i in chosen)


def test_uniform_widths_need_no_scores(arch):
    asked = section(0.2)
    widths, _ = allocate(arch, asked, draw_scores(arch), comparable=True)
    assert uniform_widths(arch, asked) == widths


# Tensor parallelism

def steps_of(arch: Architecture, asked: PruneSection, parallel: int) -> tuple[int, int, int]:
    """Parameters of the largest step of heads, of a step of channels, and of all that FFNs give.

    A uniform step is taken in every unprotected block, a global one in a single block.
    """
    inner, unit = unprotected(arch, asked), math.lcm(asked.round_to, parallel)
    heads = max(((b - a) * arch.kv_group_parameters(i) for i in inner
                 for (a, _), (b, _) in itertools.pairwise(
                     head_choices(arch.blocks[i], parallel)[1:])),
                default=0)
    room = sum(max(arch.blocks[i].intermediate - unit, 0) for i in inner)
    at_once = len(inner) if asked.layers == "uniform" else 1
    weight = arch.channel_parameters()
    return heads * at_once, unit * weight * at_once, room * weight


@pytest.fixture(scope="module", params=[1, 2, 4, 8])
def parallel(request) -> int:
    return request.param


@pytest.mark.parametrize("name", PARALLEL)
def test_widths_divide_and_meet_the_ratio_at_every_tensor_parallel(name, layers, parallel):
    arch, met_requests = PARALLEL[name], 0
    for ratio, unit, parts, first in itertools.product(RATIOS, (1, 8, 12), PARTS, (0, 1)):
        asked = section(ratio, layers, round_to=unit, parts=parts, first=first)
        wanted = ratio * all_parameters(arch)
        try:
            widths, _ = allocate(arch, asked, draw_scores(arch), comparable=False,
                                 tensor_parallel=parallel)
        except InputError:
            assert wanted > most(arch, asked, parallel), asked
            continue
        met_requests += 1
        assert wanted <= most(arch, asked, parallel), asked
        assert faults(widths, parallel) == [], asked
        for dense, own in zip(arch.blocks, widths, strict=True):
            assert 0 < own.kv_heads <= dense.kv_heads, asked
            assert own.heads == own.kv_heads * dense.group, asked
            assert 0 < own.intermediate <= dense.intermediate, asked
            assert own.intermediate == dense.intermediate or own.intermediate % unit == 0, asked
        heads, channels, room = steps_of(arch, asked, parallel)
        # Heads are coarser; where channels can make up for a step of them, they do.
        coarsest = channels if asked.ffn and (room >= heads or not asked.heads) else heads
        assert abs(removed(arch, widths) - wanted) <= max(coarsest, channels * asked.ffn), asked
    assert met_requests > 20


def test_a_tensor_parallel_of_one_changes_nothing(arch, layers):
    for asked, widths in met(arch, layers):
        assert allocate(arch, asked, draw_scores(arch), comparable=True,
                        tensor_parallel=1)[0] == widths, asked


@pytest.mark.parametrize(("heads", "kv_heads", "parallel", "counts"), [
    (4, 4, 1, [0, 1, 2, 3, 4]),
    (8, 8, 2, [0, 2, 4, 6, 8]),
    (8, 8, 8, [0, 8]),
    (32, 8, 4, [0, 1, 2, 4, 8]),   # one or two KV heads are copied
    (32, 8, 8, [0, 2, 4, 8]),      # a single one has too few query heads
    (12, 3, 2, [0, 1, 2]),         # the dense block itself does not divide
    (0, 0, 2, [0])])
def test_the_numbers_of_kv_heads_that_divide(heads, kv_heads, parallel, counts):
    dense = BlockWidths(heads, kv_heads, 8)
    assert head_choices(dense, parallel) == [(k, dense.group if k else 0) for k in counts]


def test_faults_name_the_block_and_the_width():
    widths = [BlockWidths(8, 2, 64), BlockWidths(7, 7, 64), BlockWidths(12, 3, 65),
              BlockWidths(0, 0, 64), BlockWidths(1, 1, 0)]
    assert faults(widths, 1) == []
    assert faults(widths, 2) == ["block 1: 7 query heads", "block 1: 7 KV heads",
                                 "block 2: 3 KV heads", "block 2: 65 channels",
                                 "block 4: 1 query head"]


def test_group_faults_name_every_input_that_is_no_multiple():
    arch = architecture(sizes(192, 256, 6, 6, 3, head_dim=32))
    widths = [BlockWidths(4, 4, 128), BlockWidths(3, 3, 192), BlockWidths(0, 0, 0)]
    assert group_faults(arch, widths, 32) == []
    assert group_faults(arch, widths, 64) == ["block 1: 3 query heads of size 32"]
    assert group_faults(arch, widths, 128) == [
        "hidden size 192", "block 1: 3 query heads of size 32", "block 1: 192 channels"]
    assert group_faults(arch, widths, 64, 2) == [
        "block 1: 3 query heads of size 32", "block 1: 192 channels"]


@pytest.mark.parametrize(("name", "parallel", "reason"), [
    ("many-heads", 3, r"\(block 0: 32 query heads\); use 1, 2, 4, 8 or 16$"),
    ("pico", 8, r"\(block 0: 172 channels\); use 1, 2 or 4$"),
    ("odd-channels", 2, r"\(block 0: 683 channels\); use 1$"),
    ("already-pruned", 2, r"\(block 4: 1 query head\); use 1$")])
def test_a_model_that_does_not_divide_is_refused(name, parallel, reason, layers):
    arch = ARCHITECTURES[name]
    with pytest.raises(InputError, match=rf"^hardware\.tensor_parallel: {parallel} .*{reason}"):
        allocate(arch, section(0.2, layers), draw_scores(arch), comparable=True,
                 tensor_parallel=parallel)


def test_a_ratio_that_is_too_high_for_tensor_parallel_names_what_stays(layers):
    arch = PARALLEL["mha"]
    with pytest.raises(InputError, match="each keeps 8 KV heads and 24 channels"):
        allocate(arch, section(0.95, layers, round_to=12), draw_scores(arch), comparable=True,
                 tensor_parallel=8)


def test_groups_leave_together_by_their_mean_score():
    arch = architecture(sizes(128, 64, 4, 4, 2, head_dim=32))
    scores = [BlockScores([0.0, 9.0, 8.0, 4.0], [1.0] * 64),   # its worst two: mean 2
              BlockScores([3.0, 9.0, 8.0, 1.5], [1.0] * 64)]   # mean 2.25
    half = arch.kv_group_parameters(0) * 2 / all_parameters(arch)
    widths, kept = allocate(arch, section(half, "global", parts="heads"), scores, comparable=True,
                            tensor_parallel=2)
    assert [w.kv_heads for w in widths] == [2, 4]
    assert kept[0].groups == (1, 2)


def test_odd_channels_leave_first_where_all_scores_are_equal():
    arch = ARCHITECTURES["odd-channels"]
    scores = [BlockScores([0.1] * w.kv_heads, [0.1] * w.intermediate) for w in arch.blocks]
    widths = global_widths(arch, section(0.01, "global", parts="ffn"), scores, comparable=True)
    assert any(w.intermediate != 683 for w in widths)
    assert all(w.intermediate == 683 or w.intermediate % 8 == 0 for w in widths)
