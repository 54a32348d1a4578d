"""Speed on a CUDA GPU, dense against pruned, at LLaMA shapes of random weights in bfloat16.

    python benchmarks/gpu.py                                    # into benchmarks/results/gpu-….json
    python benchmarks/gpu.py --budget-minutes 9                 # again and again until all is done
    python benchmarks/gpu.py --only '7B/decode/b1/c2048/30%'
    python benchmarks/gpu.py --dry-run                          # anywhere

Measures scoring (time, peak memory, beside a forward pass), slicing, the closed-form repair, and
prefill and decode: in PyTorch (sdpa, static cache; decode through torch.compile and CUDA graphs),
ONNX Runtime and vLLM, where installed. Dense and pruned take turns, and ratios are taken within a
round. Beside each speed-up stands the ideal: the ratio of the bytes a decode step reads at least,
or of a prefill's FLOPs. Speed does not depend on what the weights are, so they are random.

Needs bipdeploy (`pip install -e . --no-deps` beside a machine's own torch and transformers) and a
C compiler for torch.compile.
"""

from __future__ import annotations

from speed import command
from speed.cases import Grid, Sizes

if __name__ == "__main__":
    command.main(__doc__, Grid(("7B", "8B", "13B")), Sizes(), "cuda")
