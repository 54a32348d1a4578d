"""A checkpoint of random weights, with the sizes that a recipe's `model.shape` gives.

    python benchmarks/random_model.py recipes/gpu-random-7b.yaml
    bipdeploy run recipes/gpu-random-7b.yaml

Written to the folder that `model.id` names, below the current one, with the built-in tokenizer. For
what does not depend on what the weights are: whether a machine can do a recipe, and how long it
takes, without a download.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bipdeploy.errors import BipdeployError, InputError
from bipdeploy.model.blocks import compute_device
from bipdeploy.recipe import file as recipe_file
from speed.models import random_checkpoint


def made(recipe: Path, settings: list[str]) -> Path:
    """The folder of the recipe's model, written. Raises InputError where it is there already, or
    the recipe gives no sizes."""
    section = recipe_file.load(recipe, settings).model
    if section.shape is None:
        raise InputError(f"{recipe}: model.shape is missing; it says how large the model is")
    folder = Path(section.id)
    if folder.exists():
        raise InputError(f"model.id: {folder} is there already; remove it, or set another")
    device = compute_device(section)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return random_checkpoint(folder, section.shape.config, device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    asked = parser.parse_args()
    try:
        print(made(asked.recipe, asked.set))
        return 0
    except BipdeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
