"""A whole run: what is refused, which stages are due, in what order, what is reused."""
