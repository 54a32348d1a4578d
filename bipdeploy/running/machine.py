"""What runs here: versions, hardware, git commit, memory. Imports no torch."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import logging
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy")


@lru_cache(maxsize=1)
def code_version() -> str:
    """The package's version and a hash of its source: results depend on both."""
    hashed = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        hashed.update(path.read_bytes())
    return f"{version_of('bipdeploy')}+{hashed.hexdigest()[:12]}"


def version_of(library: str) -> str | None:
    """An installed library's version, or None. PyTorch's with what it is built for, such as +cu130,
    which not every distribution of it has in its metadata."""
    try:
        known = metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
    spec = importlib.util.find_spec(library) if library == "torch" else None
    own = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    said = (re.search(r"^__version__ = '(.+)'", own.read_text(), re.M)
            if own and own.is_file() else None)
    return said[1] if said else known


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """Versions, hardware and git commit, read without importing torch."""
    return {"python": platform.python_version(), "platform": platform.platform(),
            "code": code_version(), "git_commit": _git_commit(),
            "libraries": {name: version_of(name) for name in _LIBRARIES},
            "hardware": hardware()}


@lru_cache(maxsize=1)
def hardware() -> dict[str, Any]:
    """CPU model, cores, memory in bytes, and the NVIDIA GPUs that CUDA may use here."""
    import psutil

    return {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "gpus": visible_gpus(_driver_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))}


def visible_gpus(names: list[str], visible: str | None) -> list[str]:
    """Those of a machine's GPUs that CUDA_VISIBLE_DEVICES leaves; as CUDA does, the list ends at
    the first number that is none. UUIDs stand for themselves."""
    if visible is None:
        return names
    found = []
    for part in filter(None, (part.strip() for part in visible.split(","))):
        if part.lstrip("-").isdigit():
            if not 0 <= int(part) < len(names):
                break
            found.append(names[int(part)])
        else:
            found.append(part)
    return found


def _driver_gpus() -> list[str]:
    """The NVIDIA GPUs that the driver lists; where it has no files in /proc (WSL), nvidia-smi."""
    listed = [line.split(":", 1)[1].strip()
              for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
              for line in path.read_text().splitlines() if line.startswith("Model")]
    if listed:
        return listed
    try:
        said = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return said.split("\n")[:-1]


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Commit of the working folder, where it is a git checkout; '-dirty' with local changes."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"],
                               capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


class PeakMemory:
    """Peak resident memory of this process from construction on, in bytes, and of its GPUs.

    Linux lets a process reset its own high-water mark; elsewhere the peak is that of the whole
    process so far.
    """

    def __init__(self) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        for number in _gpus_in_use():
            sys.modules["torch"].cuda.reset_peak_memory_stats(number)

    def record(self) -> dict[str, int]:
        """Both as manifests name them; GPUs' where this process has used one."""
        gpus = [sys.modules["torch"].cuda.max_memory_allocated(n) for n in _gpus_in_use()]
        return {"peak_memory_bytes": self.bytes(),
                **({"peak_gpu_memory_bytes": max(gpus)} if any(gpus) else {})}

    def bytes(self) -> int:
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass
        import resource

        scale = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _gpus_in_use() -> range:
    """The numbers of the GPUs, where this process works on them. Loads no torch."""
    torch = sys.modules.get("torch")
    return range(torch.cuda.device_count() if torch and torch.cuda.is_initialized() else 0)


def release_memory() -> None:
    """Give back the GPU memory that earlier stages left cached: the next one, or another process,
    needs it. Loads no torch."""
    if _gpus_in_use():
        gc.collect()
        sys.modules["torch"].cuda.empty_cache()


def quiet_libraries() -> None:
    """Keep the libraries' own bars, hints and retries off the screen; what they raise comes
    through."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # that blocks are on disk is meant
