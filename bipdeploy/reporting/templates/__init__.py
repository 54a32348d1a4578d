"""The pages that bipdeploy writes, as Jinja templates."""

from __future__ import annotations

from importlib import resources
from typing import Any


def render(name: str, **context: Any) -> str:
    """The page `name` with its context; a name that the context lacks is an error. What goes into
    HTML is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=name.endswith(".html"), undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    source = (resources.files(__name__) / f"{name}.j2").read_text("utf-8")
    return environment.from_string(source).render(**context)
