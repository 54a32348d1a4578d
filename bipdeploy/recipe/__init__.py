"""What a person asks for: every section of a recipe, its names and figures, and reading it.

All that can be known without torch, without the model, and without seeing what carries it out.
"""
