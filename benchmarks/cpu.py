"""Speed on this CPU, dense against pruned, at LLaMA shapes of random weights in float32.

    python benchmarks/cpu.py                        # into benchmarks/results/cpu-….json
    python benchmarks/cpu.py --only '1B/onnx/*'

What `gpu.py` measures, at shapes that a CPU can hold, one sequence at a time, in PyTorch (eager)
and ONNX Runtime. `cpu_onnx.py` compares the two with each other, and quantised graphs with both.
"""

from __future__ import annotations

from speed import command
from speed.cases import Grid, Sizes

if __name__ == "__main__":
    command.main(__doc__, Grid(("100M", "1B"), batches=(1,), contexts=(128, 512), removed=(30, 50),
                               kinds=("score", "decode", "prefill", "refit", "slice", "onnx")),
                 Sizes("float32", windows=16, new=16, rounds=7), "cpu")
