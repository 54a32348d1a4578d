"""The table of a real model: its parts are comparisons that can be made, and what is collected."""

from __future__ import annotations

import argparse
import json
from itertools import pairwise

import pytest

import real_tables
from bipdeploy.errors import InputError
from bipdeploy.recipe import file as recipe_file
from bipdeploy.recipe.methods import method
from bipdeploy.running import artifacts


@pytest.fixture
def asked(tmp_path) -> argparse.Namespace:
    """The options of the script, with texts of a few lines."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "c4.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n"
                                            for n in range(10)), encoding="utf-8")
    for name in ("code.txt", "technical.txt"):
        (texts / name).write_text("".join(f"{name} {n}\n" for n in range(10)), encoding="utf-8")
    return argparse.Namespace(model="builtin:pico", texts=texts, test="builtin:pydocs", seed=None,
                              out=tmp_path / "out")


@pytest.mark.parametrize("name", real_tables.PARTS)
def test_every_part_is_a_recipe_with_known_methods(name, asked, tmp_path):
    words = real_tables.command(name, asked, tmp_path / "split")
    settings = [value for option, value in pairwise(words) if option == "--set"]
    recipe = recipe_file.load(real_tables.RECIPE, settings)
    part = real_tables.PARTS[name]
    assert [method(m) for m in recipe.compare.methods] == [method(m) for m in part.methods]
    assert recipe.compare.ratios == list(part.ratios)


def test_what_is_tested_is_not_calibrated_on(asked, tmp_path):
    for name in ("c4.jsonl", "code.txt"):
        whole = (asked.texts / name).read_text(encoding="utf-8").splitlines()
        parts = [path.read_text(encoding="utf-8").splitlines()
                 for path in real_tables.split(asked.texts / name, tmp_path / "split")]
        assert sorted([*parts[0], *parts[1]]) == sorted(whole) and not set(parts[0]) & set(parts[1])
        assert len(parts[1]) == 2


def test_the_table_is_of_what_was_measured(tmp_path, monkeypatch):
    def of(nats: float) -> dict:
        return {"wiki.txt": {"128": {"nats": nats}, "1024": {"nats": nats / 2}}}

    folder = tmp_path / "searched"
    folder.mkdir()
    with pytest.raises(InputError, match="no part has been measured"):
        real_tables.collected(tmp_path)
    artifacts.write_json(folder / "compare.json", {
        "environment": {}, "test": {}, "dense": {"perplexity": of(4.0)}, "records": [{
            "method": "llm_bip_joint@searched", "repair": "refit", "ratio": 0.3, "removed": 0.25,
            "perplexity": of(4.5), "costs": {
                "prune": {"seconds": 2.0, "peak_memory_bytes": 1 << 30},
                "recover": {"seconds": 1.5, "peak_memory_bytes": 1 << 20,
                            "peak_gpu_memory_bytes": 3 << 30}}}]})
    found = real_tables.collected(tmp_path)
    assert list(found["parts"]) == ["searched"]
    assert real_tables.table(found).splitlines()[2] == (
        "| searched | llm_bip_joint@searched | refit | 30% | 0.750 | 0.500 | 0.250 | 3.5 | 3.0 |")
    (tmp_path / "measured").mkdir()
    artifacts.write_json(tmp_path / "measured" / "compare.json", {
        "environment": {}, "test": {}, "dense": {"perplexity": of(4.1)}, "records": []})
    with pytest.raises(InputError, match="measured on other texts"):
        real_tables.collected(tmp_path)
