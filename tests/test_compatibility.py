"""What earlier versions wrote still loads, and what they ran is reused or rerun, never misread.

`fixtures/NAME-VERSION/` are exported checkpoints as that version wrote them, with the logits that
it computed from them in float32.
"""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch

from bipdeploy import api
from bipdeploy.model import modeling_bipdeploy
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.recipe.model import ModelSection
from bipdeploy.running import artifacts
from bipdeploy.stages.table import STAGES
from tests.running import SMOKE, bipdeploy, python
from tests.sliced import loaded

FIXTURES = Path(__file__).parent / "fixtures"
WRITTEN = sorted(FIXTURES.iterdir())


@pytest.fixture(params=WRITTEN, ids=[path.name for path in WRITTEN])
def written(request) -> Path:
    return request.param


def expected(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [1, T] and the logits [V] behind the last of them."""
    data = json.loads((folder / "expected.json").read_text())
    return torch.tensor([data["ids"]]), torch.tensor(data["last_logits"])


def test_an_earlier_checkpoint_loads_where_bipdeploy_is_installed(written):
    ids, logits = expected(written)
    with torch.no_grad():
        found = loaded(written)(ids).logits[0, -1]
    torch.testing.assert_close(found, logits, atol=1e-4, rtol=0)


def test_an_earlier_checkpoint_loads_by_the_code_that_it_carries(written):
    ids, logits = expected(written)
    code = ("import json, sys, torch\nfrom transformers import AutoModelForCausalLM\n"
            "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True,\n"
            "                                             dtype=torch.float32)\n"
            "assert 'bipdeploy' not in sys.modules\n"
            "ids = torch.tensor([json.loads(sys.argv[2])])\n"
            "with torch.no_grad(): print(model(ids).logits[0, -1].tolist())")
    said = python(code, written, json.dumps(ids[0].tolist())).stdout.splitlines()[-1]
    torch.testing.assert_close(torch.tensor(json.loads(said)), logits, atol=1e-4, rtol=0)


def test_an_earlier_checkpoint_is_walked_and_exported_again(written, tmp_path):
    ids, logits = expected(written)
    Checkpoint(written).verify()
    walker = BlockWalker(written, ModelSection(id=str(written), device="cpu"))
    hidden = walker.embed([ids])[0]
    for block in walker.blocks(ids.shape[1]):
        hidden = block(hidden)
        del block
    torch.testing.assert_close(walker.head()(hidden)[0, -1], logits, atol=1e-4, rtol=0)
    again = api.export(written, tmp_path / "again", ["model.device=cpu"]) / "transformers"
    assert (again / "model.safetensors").read_bytes() == (
        written / "model.safetensors").read_bytes()
    assert json.loads((again / "config.json").read_text()) == json.loads(
        (written / "config.json").read_text())


def test_the_code_that_checkpoints_carry_is_still_the_same():
    here = Path(modeling_bipdeploy.__file__).read_bytes()
    assert {(path / "modeling_bipdeploy.py").read_bytes() == here for path in WRITTEN} == {True}


def test_a_run_of_other_code_is_run_again_and_not_read_as_this_one_s(smoke, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(smoke.folder, runs / "smoke")
    for name in STAGES:
        path = runs / "smoke" / name / "manifest.json"
        manifest = artifacts.read_json(path)
        artifacts.write_json(path, {**manifest, "key": "0" * 64})
    figures = runs / "smoke" / "evaluate" / "figures.json"
    artifacts.write_json(figures, {"perplexity.ratio": 0.5})
    result = api.run(SMOKE, runs=runs)
    assert result.reused == [] and result.ran == list(STAGES)
    assert result.figures["perplexity.ratio"] == pytest.approx(
        smoke.figures["perplexity.ratio"], abs=0)


def test_the_command_is_found_by_both_of_its_names():
    assert bipdeploy("--version").stdout == python(
        "import runpy, sys; sys.argv = ['bipdeploy', '--version']; "
        "runpy.run_module('bipdeploy', run_name='__main__')").stdout != ""


def test_vllm_finds_the_plugin_under_the_name_that_it_had():
    found = [entry for entry in metadata.entry_points(group="vllm.general_plugins")
             if entry.name == "bipdeploy"]
    assert [callable(entry.load()) for entry in found] == [True]
