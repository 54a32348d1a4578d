"""Speed of dense and pruned models of random weights: what `gpu.py` and `cpu.py` share."""
