"""What is written for others to load, one file per target, each verified by loading it."""
