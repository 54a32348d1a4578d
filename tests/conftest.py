"""Fixtures that several test files share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny; more threads only wait
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # tests run side by side

from pathlib import Path

import pytest

from tests.running import SMOKE
from tests.tiny import VARIANTS, tiny_model


@pytest.fixture(scope="session", params=list(VARIANTS))
def variant(request, tmp_path_factory) -> Path:
    """A tiny random model of every family and head layout, in turn."""
    return tiny_model(tmp_path_factory.mktemp(request.param) / "model", **VARIANTS[request.param])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """One tiny random LLaMA with GQA."""
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """One finished run of recipes/smoke.yaml. Tests that change a run work on a copy of it."""
    from bipdeploy import api

    return api.run(SMOKE, runs=tmp_path_factory.mktemp("runs"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM takes as long as the machine lets it: what it waits for gives up when nothing moves
    (`serving.server`), long before this."""
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.timeout(1800), append=False)
