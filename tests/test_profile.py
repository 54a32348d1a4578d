"""`bipdeploy profile`: what is timed is the model at its widths, and a table is made once."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import asdict

import pytest
import torch

from bipdeploy import api
from bipdeploy.errors import InputError, StageError
from bipdeploy.measuring import profile
from bipdeploy.measuring.graphs import RecordedDecoder, recordable
from bipdeploy.measuring.torch_bench import how
from bipdeploy.model.checkpoint import read_config
from bipdeploy.model.families import BlockWidths, architecture
from bipdeploy.planning import latency
from bipdeploy.planning.latency import Curve
from bipdeploy.recipe.model import ModelSection
from tests.running import SMOKE, bipdeploy_here, refused
from tests.sliced import (
    CPU,
    architecture_of,
    draw_kept,
    loaded,
    token_windows,
    write_sliced,
)
from tests.tiny import PICO, tiny_model

HERE = ModelSection(id="here", device="cpu")


def key_of(config, section, batch, context):
    return latency.key(config, architecture(config), section, batch, context)


@pytest.fixture
def quick(monkeypatch):
    """Few rounds and widths: these tests look at what is timed, not at how long it takes."""
    for name, value in (("ROUNDS", 2), ("WARMUP", 0), ("POINTS", 2), ("STEPS", 1)):
        monkeypatch.setattr(profile, name, value)


def test_every_variant_is_a_whole_model_of_its_widths_on_shared_memory(variant):
    arch, config = architecture_of(variant), read_config(variant)
    stack = profile.Stack(config, arch, 3, torch.float32, CPU)
    for widths in profile._variants(arch.blocks[0], queries=True).values():
        model = stack.model(widths)
        assert sum(p.numel() for p in model.parameters()) == arch.parameters([widths] * 3)
        with torch.no_grad():
            assert torch.isfinite(model(token_windows(1, 12)).logits).all()
        for name, parameter in model.named_parameters():
            assert parameter.data_ptr() == stack.regions[name].data_ptr()
            assert parameter.is_contiguous()
    places = {region.data_ptr() for region in stack.regions.values()}
    assert len(places) == len(stack.regions)


def test_widths_are_evenly_spread():
    assert profile.spread(12, 12) == [1, 3, 5, 8, 10, 12]
    assert profile.spread(4, 4) == [1, 2, 3, 4]
    assert profile.spread(1, 1) == [1]
    assert profile.spread(1600, 16) == [100, 400, 700, 1000, 1300, 1600]


def test_curves_are_what_differs_from_the_model_without_the_part():
    dense = BlockWidths(4, 4, 64)
    variants = profile._variants(dense)

    def seconds(w: BlockWidths) -> float:
        return 5 + 2 * (3 * w.kv_heads + (w.kv_heads > 0) + w.intermediate / 16)

    noise = (1.0, 1.0, 1.0, 3.0)  # one round in four was disturbed
    phase = profile.summarise({n: [seconds(w) * f for f in noise] for n, w in variants.items()},
                              variants, 2)
    assert phase.rest == pytest.approx(5)
    for kv_heads, channels in ((4, 64), (3, 40), (1, 4)):
        widths = BlockWidths(kv_heads, kv_heads, channels)
        assert phase.cost.whole([widths] * 2) == pytest.approx(seconds(widths))
    assert phase.cost.whole([BlockWidths(0, 0, 64)] * 2) == pytest.approx(5 + 2 * 4)
    assert phase.check["predicted"] == pytest.approx(phase.check["measured"])


def test_a_curve_never_falls_and_goes_on_in_lines():
    curve = Curve((2, 4, 6, 8), (1.0, 3.0, 2.0, 5.0))
    assert curve.rising == (1.0, 2.5, 2.5, 5.0)
    assert [curve.at(w) for w in (0, 1, 2, 3, 5, 7, 8)] == [0, 0.25, 1, 1.75, 2.5, 3.75, 5]
    assert Curve((1,), (2.0,)).at(1) == 2.0
    assert Curve((1, 2), (-1.0, 2.0)).rising == (0.0, 2.0)


def test_a_table_is_measured_once_and_again_when_asked(quick, tmp_path):
    model = tiny_model(tmp_path / "m", blocks=2)
    (model / "model.safetensors").unlink()  # the config is enough
    settings = ["model.device=cpu"]
    first = api.profile(model, settings, context=16, cache=tmp_path / "c")
    assert set(first.phases) == {"prefill", "decode"} and first.depth == 2
    assert first.phases["decode"].heads.widths == (1, 2)
    again = api.profile(model, settings, context=16, cache=tmp_path / "c")
    assert again == first and again.digest == first.digest
    assert len(list((tmp_path / "c").iterdir())) == 1
    other = api.profile(model, settings, context=16, batch=2, cache=tmp_path / "c")
    assert other.key["batch"] == 2 and len(list((tmp_path / "c").iterdir())) == 2
    forced = api.profile(model, settings, context=16, cache=tmp_path / "c", force=True)
    assert forced.digest != first.digest
    assert api.profile(model, settings, context=16, cache=tmp_path / "c") == forced


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"device": "cuda"}])
def test_the_key_holds_what_times_depend_on(change, monkeypatch):
    config = read_config(PICO)
    key = key_of(config, HERE, 1, 128)
    assert key != key_of({**config, "intermediate_size": 392}, HERE, 1, 128)
    assert key != key_of(config, HERE, 1, 64)
    other = key_of(config, HERE.model_copy(update=change), 1, 128)
    assert other != key
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert key_of(config, HERE, 1, 128) != key


def test_a_damaged_table_is_as_good_as_none(tmp_path):
    key = key_of(read_config(PICO), HERE, 1, 128)
    tmp_path.joinpath(latency._path(key, tmp_path).name).write_text("{")
    assert latency.lookup(key, tmp_path) is None


def test_a_target_makes_the_table_that_is_missing(quick, smoke, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(smoke.folder / "score", tmp_path / "runs" / "smoke" / "score")
    overrides = ["prune.ratio=null", "prune.target={decode_speedup: 1.00001, context: 16}"]
    with suppress(InputError):  # so few rounds may find nothing to gain
        api.run(SMOKE, overrides, tmp_path / "runs", until="prune")
    (stored,) = (tmp_path / "cache" / "bipdeploy" / "profiles").iterdir()
    made = json.loads(stored.read_text())
    assert made["key"]["context"] == 16
    assert api.profile(SMOKE, overrides).key == made["key"]


def test_the_table_is_shown_and_comes_as_json(quick, tmp_path):
    arguments = ("profile", "builtin:pico", "--context", 16, "--cache", tmp_path)
    shown = bipdeploy_here(*arguments)
    assert shown.returncode == 0, shown.stderr
    for words in ("attention of a block, KV heads", "FFN, channels", "rest of the model",
                  "dense, 7 blocks", "batch 1, context 16"):
        assert words in shown.stdout
    as_json = json.loads(bipdeploy_here(*arguments, "--json").stdout)
    (stored,) = tmp_path.iterdir()
    assert as_json == json.loads(stored.read_text())


def test_a_context_that_is_too_long_is_refused():
    refused(bipdeploy_here("profile", "builtin:pico", "--context", 300), 2,
            "a context of 300 tokens", "maximum of 256")


def test_a_table_survives_the_cache(tmp_path):
    phase = latency.Phase(Curve((1, 2), (1.0, 2.0)), Curve((8,), (1.0,)), 0.5, {}, {})
    table = latency.Table({"format": 1}, {"decode": phase}, 2, 9, 1.0, {"a": 1})
    latency.store(table, tmp_path)
    assert latency.lookup(table.key, tmp_path) == table
    assert asdict(table)["phases"]["decode"]["rest"] == 0.5


def test_out_of_memory_says_what_to_lower(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 4 GB")

    monkeypatch.setattr("bipdeploy.measuring.profile.obtain", full)
    for asked in (lambda: api.profile("builtin:pico", cache=tmp_path),
                  lambda: api.run(SMOKE, ["prune.ratio=null", "prune.target={decode_speedup: 1.01,"
                                          " context: 17}"], tmp_path)):
        with pytest.raises(StageError, match=r"^stage profile ran out of memory; lower the batch"):
            asked()


@pytest.mark.parametrize("widths", [None, [(1, 40), (0, 96), (2, 24)], [(0, 40), (2, 0), (2, 24)]])
def test_decoding_with_a_static_cache_gives_the_tokens_of_generate(tmp_path, widths):
    folder = tiny_model(tmp_path / "m")
    if widths:
        folder = write_sliced(folder, tmp_path / "s", draw_kept(architecture_of(folder), widths))
    model, ids = loaded(folder), token_windows(2, 9)
    told = model.generate(ids, max_new_tokens=7, min_new_tokens=7, do_sample=False)[:, 9:]
    decoder = RecordedDecoder(model, ids, 6)
    assert decoder.tokens() == told[:, 1:].tolist() == decoder.tokens()
    assert decoder.seconds() > 0


def test_a_step_is_recorded_only_where_no_window_is_outgrown(tmp_path):
    model = loaded(tiny_model(tmp_path / "m", "mistral", sliding_window=12))
    assert recordable(model, 12) and not recordable(model, 13)
    ids = token_windows(2, 5)
    told = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)[:, 5:]
    decoder = RecordedDecoder(model, ids, 7)
    assert decoder.tokens() == told[:, 1:].tolist() == decoder.tokens()
    assert how({"decode": [], "decode_eager": []}) != how({"decode": []}) == "eager"
