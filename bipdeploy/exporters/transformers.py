"""Target `transformers`: a safetensors folder, verified by loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bipdeploy.errors import StageError
from bipdeploy.model import loading
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.model.folder import add_code, copy_checkpoint
from bipdeploy.model.formats import is_per_block
from bipdeploy.planning.job import Job
from bipdeploy.reporting.card import model_card

# Both sides compute in the same type; what differs is the order of sums.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
PROBE_TOKENS = 64


def export(job: Job, out: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Write the folder and load it back; its logits must equal those of the repaired model."""
    source = Checkpoint(job.inputs["pruned"])
    copy_checkpoint(source, out)
    per_block = is_per_block(source.config)
    if per_block:
        add_code(out)
    (out / "README.md").write_text(model_card(
        source, job.recipe if "prune" in job.inputs else None))
    difference = logits_difference(job, source.folder, out)
    return {}, {"architecture": source.config["architectures"][0],
                "needs": "trust_remote_code=True, or bipdeploy installed" if per_block
                else "nothing besides transformers",
                "verified": {"by": "AutoModelForCausalLM.from_pretrained",
                             "largest_logit_difference": difference}}


@torch.no_grad()
def logits_difference(job: Job, source: Path, written: Path) -> float:
    """Largest absolute difference of logits between the model as repaired and as loaded back.

    The first is computed block by block from `source`, the second by transformers from `written`,
    which reads each block as it comes to it. Raises StageError where they differ by more than the
    type's rounding.
    """
    walker = BlockWalker(source, job.recipe.model)
    tokens = min(PROBE_TOKENS, walker.architecture.max_positions)
    generator = torch.Generator().manual_seed(job.recipe.seed)
    ids = torch.randint(walker.architecture.vocabulary, (1, tokens), generator=generator)
    hidden = walker.embed([ids])[0]
    for block in walker.blocks(tokens):
        hidden = block(hidden)
        del block
    expected = walker.head()(hidden).float()
    model = loading.open_model(written, walker.dtype, walker.device)
    found = model(ids.to(walker.device), use_cache=False).logits.float()
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE[walker.dtype]:
        raise StageError(f"the exported model does not agree with the one it was made from: logits "
                         f"differ by {difference:.3g}, allowed {TOLERANCE[walker.dtype]:g}")
    return difference
