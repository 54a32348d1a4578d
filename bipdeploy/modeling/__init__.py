"""Checkpoints whose blocks have different widths: configuration, classes, registration."""
