"""One of several training processes: `python -m bipdeploy.tuning.worker FOLDER`, under torchrun.

FOLDER is what `launch.train` wrote. Reports to the process that started it, line by line.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bipdeploy.errors import BipdeployError
from bipdeploy.recipe.model import ModelSection
from bipdeploy.recipe.tune import TuneSection
from bipdeploy.running import artifacts, machine, reporter
from bipdeploy.tuning import training
from bipdeploy.tuning.data import Windows
from bipdeploy.tuning.launch import MARK, SPEC, WINDOWS


class Lines:
    """A reporter that sends every call to the process that started this one."""

    def total(self, steps: int, what: str = "") -> None:
        tell("total", steps, what)

    def advance(self, steps: int = 1) -> None:
        tell("advance", steps)

    def note(self, text: str) -> None:
        tell("note", text)


def tell(call: str, *arguments: Any, **more: Any) -> None:
    # One write: lines of several processes go through one pipe.
    sys.stdout.write(MARK + json.dumps({"call": call, "arguments": arguments, **more}) + "\n")
    sys.stdout.flush()


def main(folder: Path) -> int:
    spec = artifacts.read_json(folder / SPEC)
    held = load_file(folder / WINDOWS)
    windows = {name: Windows(held[f"{name}.ids"], held[f"{name}.labels"])
               for name in ("training", "validation")}
    task = training.Task(
        TuneSection.model_validate(spec["section"]), ModelSection.model_validate(spec["model"]),
        spec["seed"], Path(spec["student"]), Path(spec["dense"]), windows["training"],
        windows["validation"], Path(spec["checkpoint"]), spec["identity"])
    first = os.environ.get("RANK", "0") == "0"

    def check() -> None:
        """End with the process that started this one, which may have been killed."""
        try:
            os.kill(spec["parent"], 0)
        except ProcessLookupError:
            os._exit(1)

    try:
        training.train(task, torch.device(spec["device"]),
                       Lines() if first else reporter.Silent(), check)
    except BipdeployError as error:
        tell("error", message=str(error), exit_code=error.exit_code)
        return 1
    return 0


if __name__ == "__main__":
    machine.quiet_libraries()
    sys.exit(main(Path(sys.argv[1])))
