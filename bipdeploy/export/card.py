"""The model card that goes with exported weights."""

from __future__ import annotations

from bipdeploy import artifacts
from bipdeploy.checkpoint import Checkpoint
from bipdeploy.families import architecture
from bipdeploy.recipe import Recipe

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
base_model: {base}
tags: [pruned, bipdeploy]
---

# {name}: {base}, structurally pruned

{share:.0%} of the parameters of the transformer blocks were removed by `{criterion}`
({layers} widths, repair: {repair}); {parameters:,} parameters remain. Made by bipdeploy {version}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(PATH{arguments})
tokenizer = AutoTokenizer.from_pretrained(PATH)
```

{needs}

| block | attention heads | KV heads | FFN channels |
|---|---|---|---|
{rows}

The licence of {base} applies to these weights too.
"""


def model_card(checkpoint: Checkpoint, recipe: Recipe, *, per_block: bool) -> str:
    """Markdown that says what the model is, how it was made and how it is loaded."""
    arch = architecture(checkpoint.config)
    rows = "\n".join(f"| {i} | {w.heads} | {w.kv_heads} | {w.intermediate} |"
                     for i, w in enumerate(arch.blocks))
    needs = ("Blocks differ in width, so the folder carries its own model class; where bipdeploy "
             "is installed, `trust_remote_code` is not needed." if per_block else
             "The folder is a stock checkpoint: every block has the same widths.")
    return _CARD.format(
        base=recipe.model.id, name=recipe.name, share=recipe.prune.ratio,
        criterion=recipe.score.criterion, layers=recipe.prune.layers,
        repair=recipe.recover.method, parameters=arch.parameters(),
        version=artifacts.version_of("bipdeploy"), rows=rows, needs=needs,
        arguments=", trust_remote_code=True" if per_block else "")
