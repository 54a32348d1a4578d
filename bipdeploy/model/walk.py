"""What the walk over blocks computes against what transformers computes from the same folder."""

from __future__ import annotations

from pathlib import Path

import torch

from bipdeploy.errors import StageError
from bipdeploy.model import finite, loading
from bipdeploy.model.blocks import BlockWalker

# Both sides compute in the same type; what differs is the order of sums.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}


@torch.no_grad()
def logits_difference(walker: BlockWalker, folder: Path, seed: int, tokens: int) -> float:
    """Largest absolute difference of logits for `tokens` random tokens: of the walker's checkpoint,
    block by block, and of a folder as transformers loads it, which reads each block as it comes to
    it. Raises InputError where the walk's are not finite."""
    count = min(tokens, walker.architecture.max_positions)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(walker.architecture.vocabulary, (1, count), generator=generator)
    hidden = walker.embed([ids])[0]
    for block in walker.blocks(count):
        hidden = block(hidden)
        del block
    expected = walker.head()(hidden).float()
    finite.require(f"logits of {walker.checkpoint.folder}", [expected], walker.dtype)
    model = loading.open_model(folder, walker.dtype, walker.device,
                               trust_remote_code=walker.trusted)
    found = model(ids.to(walker.device), use_cache=False).logits.float()
    return float((found - expected).abs().max())


def require_agreement(walker: BlockWalker, seed: int, tokens: int = 16) -> float:
    """The same of one folder read in both ways: the dense model that is pruned has to be the one
    that is measured. Raises StageError where they differ by more than their type's rounding."""
    difference = logits_difference(walker, walker.checkpoint.folder, seed, tokens)
    allowed = TOLERANCE.get(walker.dtype, 1e-3)
    if not difference <= allowed:
        raise StageError(f"{walker.checkpoint.folder} is not read as transformers reads it: logits "
                         f"differ by {difference:.3g}, allowed {allowed:g}, so what would be "
                         "pruned is not what would be measured; save the model again with "
                         "save_pretrained, in an empty folder")
    return difference
