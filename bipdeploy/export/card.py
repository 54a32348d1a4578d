"""The model card that goes with exported weights."""

from __future__ import annotations

from bipdeploy import artifacts
from bipdeploy.checkpoint import Checkpoint
from bipdeploy.families import architecture
from bipdeploy.recipe import Recipe

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [pruned, bipdeploy]
---

# {title}

{story}{parameters:,} parameters. Made by bipdeploy {version}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(PATH{arguments})
tokenizer = AutoTokenizer.from_pretrained(PATH)
```

{needs}

| block | attention heads | KV heads | FFN channels |
|---|---|---|---|
{rows}

The licence of the dense model applies to these weights too.
"""

_STORY = """{share:.0%} of the parameters of the transformer blocks of {base} were removed by
`{criterion}` ({layers} widths, repair: {repair}).

"""


def model_card(checkpoint: Checkpoint, recipe: Recipe | None, *, per_block: bool) -> str:
    """Markdown that says what the model is, how it was made (by `recipe`, where one is known) and
    how it is loaded."""
    arch = architecture(checkpoint.config)
    rows = "\n".join(f"| {i} | {w.heads} | {w.kv_heads} | {w.intermediate} |"
                     for i, w in enumerate(arch.blocks))
    needs = ("Blocks differ in width, so the folder carries its own model class; where bipdeploy "
             "is installed, `trust_remote_code` is not needed." if per_block else
             "The folder is a stock checkpoint: every block has the same widths.")
    title, story = "A structurally pruned language model", ""
    if recipe is not None:
        title = f"{recipe.name}: {recipe.model.id}, structurally pruned"
        story = _STORY.format(base=recipe.model.id, share=recipe.prune.ratio,
                              criterion=recipe.score.criterion, layers=recipe.prune.layers,
                              repair=recipe.recover.method)
    return _CARD.format(
        title=title, story=story, parameters=arch.parameters(),
        version=artifacts.version_of("bipdeploy"), rows=rows, needs=needs,
        arguments=", trust_remote_code=True" if per_block else "")
