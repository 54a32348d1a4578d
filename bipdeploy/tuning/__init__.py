"""Training of adapters or of all weights: windows, losses, the loop, its checkpoints, several
processes, what is written."""
