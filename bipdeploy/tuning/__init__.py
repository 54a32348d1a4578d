"""LoRA: windows, losses, the training loop, its checkpoints, several processes, merging."""
