"""Importance criteria, each a pure function on one block, and what they are given."""
