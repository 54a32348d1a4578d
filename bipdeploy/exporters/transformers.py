"""Target `transformers`: a safetensors folder, verified by loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bipdeploy.errors import StageError
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.model.folder import add_code, copy_checkpoint, require_own_code
from bipdeploy.model.formats import is_per_block
from bipdeploy.model.walk import TOLERANCE, logits_difference
from bipdeploy.planning.job import Job
from bipdeploy.reporting.card import model_card

PROBE_TOKENS = 64


def export(job: Job, out: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Write the folder and load it back; its logits must equal those of the repaired model."""
    source = Checkpoint(job.inputs["pruned"])
    require_own_code(source.config, trusted=job.recipe.model.trust_remote_code)
    copy_checkpoint(source, out)
    per_block = is_per_block(source.config)
    if per_block:
        add_code(out)
    (out / "README.md").write_text(model_card(
        source, job.recipe if "prune" in job.inputs else None))
    walker = BlockWalker(source, job.recipe.model)
    difference = logits_difference(walker, out, job.recipe.seed, PROBE_TOKENS)
    if not difference <= TOLERANCE[walker.dtype]:
        raise StageError(f"the exported model does not agree with the one it was made from: logits "
                         f"differ by {difference:.3g}, allowed {TOLERANCE[walker.dtype]:g}")
    return {}, {"architecture": source.config["architectures"][0],
                "needs": "trust_remote_code=True, or bipdeploy installed" if per_block
                else "nothing besides transformers",
                "verified": {"by": "AutoModelForCausalLM.from_pretrained",
                             "largest_logit_difference": difference}}
