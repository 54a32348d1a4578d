"""GPUs that a plan can be made for: figures of the vendors' data sheets. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes, bandwidth in bytes/s, and FLOP/s: dense bfloat16 tensor products (no
    sparsity), float32, and float64 (by tensor cores where there are such; a 64th of float32 on the
    chips for graphics)."""

    name: str
    memory: float
    bandwidth: float
    flops: float
    single: float
    double: float
    source: str


# NVIDIA prints tensor-core figures with sparsity for some; here are those without, half of that.
GPUS = {gpu.name: gpu for gpu in (
    Gpu("H200", 141e9, 4.8e12, 989e12, 67e12, 67e12,
        "NVIDIA H200 Tensor Core GPU data sheet, SXM"),
    Gpu("H100", 80e9, 3.35e12, 989e12, 67e12, 67e12,
        "NVIDIA H100 Tensor Core GPU data sheet, SXM"),
    Gpu("A100", 80e9, 2.039e12, 312e12, 19.5e12, 19.5e12,
        "NVIDIA A100 80GB Tensor Core GPU data sheet, SXM"),
    Gpu("L40S", 48e9, 864e9, 362e12, 91.6e12, 1.43e12, "NVIDIA L40S data sheet"),
    Gpu("RTX 4090", 24e9, 1.008e12, 165.2e12, 82.6e12, 1.29e12,
        "NVIDIA Ada GPU Architecture whitepaper, RTX 4090, FP32 accumulate"),
)}
