"""What all work runs in: folders written whole or not at all, this machine, progress."""
