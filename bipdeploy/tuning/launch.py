"""Training in several processes: started here, by torchrun, as `bipdeploy.tuning.worker`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bipdeploy.errors import BAD_INPUT, InputError, StageError, says_no_memory
from bipdeploy.running.reporter import Reporter

if TYPE_CHECKING:
    import torch

    from bipdeploy.tuning.checkpoints import State
    from bipdeploy.tuning.training import Task

SPEC, WINDOWS, LOG = "spec.json", "windows.safetensors", "log.txt"
GRACE = 40  # seconds until torchrun is killed; it gives its workers 30 to end
MARK = "bipdeploy: "  # what the lines that a worker means for us begin with


def require_devices(processes: int, device: torch.device) -> None:
    """Raise InputError where there are fewer GPUs than processes that want one."""
    import torch

    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise InputError(f"tune.processes: {processes} were asked for, and PyTorch finds "
                         f"{torch.cuda.device_count()} CUDA GPUs; every process takes one, so "
                         "lower it")


def train(task: Task, device: torch.device, reporter: Reporter) -> State:
    """As `training.train`, in `tune.processes` processes; what they write is the checkpoint."""
    from safetensors.torch import save_file

    from bipdeploy.tuning import checkpoints

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_file({f"{name}.{part}": getattr(getattr(task, name), part).contiguous()
                   for name in ("training", "validation") for part in ("ids", "labels")},
                  folder / WINDOWS)
        (folder / SPEC).write_text(json.dumps({
            "section": task.section.model_dump(mode="json"),
            "model": task.model.model_dump(mode="json"), "seed": task.seed,
            "student": str(task.student.resolve()), "dense": str(task.dense.resolve()),
            "checkpoint": str(task.checkpoint.resolve()), "identity": task.identity,
            "device": device.type, "parent": os.getpid()}))
        _run([sys.executable, "-m", "torch.distributed.run", "--standalone",
              f"--nproc-per-node={task.section.processes}", "-m", "bipdeploy.tuning.worker",
              str(folder)], folder / LOG, reporter)
    state = checkpoints.load(task.checkpoint, ["best"])
    assert state is not None  # the workers end well only after they wrote it
    return state


def _run(command: list[str], log: Path, reporter: Reporter) -> None:
    """Run the workers and pass on what they report on stdout; the rest of what they say goes to
    `log`. Raises what the first one raised, MemoryError where it ran out of memory."""
    # What this process imports the package from must also be what the workers import.
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, env={"OMP_NUM_THREADS": "1", **os.environ,
                          "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, text=True,
            errors="replace", start_new_session=True)  # Ctrl-C reaches us alone
    failure: dict[str, Any] | None = None
    try:
        assert process.stdout
        for line in process.stdout:
            if not line.startswith(MARK):
                continue
            event = json.loads(line.removeprefix(MARK))
            if event["call"] == "error":
                failure = failure or event
            else:
                getattr(reporter, event["call"])(*event["arguments"])
        code = process.wait()
    finally:
        process.terminate()  # torchrun then ends its workers, which have sessions of their own
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if failure:
        kind = InputError if failure["exit_code"] == BAD_INPUT else StageError
        raise kind(failure["message"])
    if code:
        cause = _cause(log.read_text("utf-8", "replace").splitlines())
        if says_no_memory(cause):
            raise MemoryError(cause)
        raise StageError(f"a training process ended with status {code}: {cause}")


def _cause(lines: Sequence[str]) -> str:
    """The line that the first traceback ends with; else the last line."""
    causes = [line.strip() for line in lines if "Error: " in line]
    return (causes or [line.strip() for line in lines if line.strip()][-1:]
            or ["it printed nothing"])[0]
