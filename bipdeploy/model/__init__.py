"""A model on disk and block by block: families, sizes and what they cost, tensors, classes."""
