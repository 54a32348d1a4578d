"""Reading README.md and the pages of the documentation: their code blocks, commands and links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted((DOCS / "pages").glob("*.md"))
README = ROOT / "README.md"

_FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_SCRIPTS = ("run", "script", "before_script", "after_script")
TOOLS = {"bipdeploy", "make", "pip", "python", "docker"}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return [text for _, found, text in _FENCE.findall(page.read_text(encoding="utf-8"))
            if found == language]


def commands() -> list[str]:
    """Every command of a shell block, and every one of ours in a script of a YAML block."""
    found = [line for page in [README, *PAGES] for text in blocks(page, "sh")
             for line in lines(text)]
    found += [line for page in PAGES for text in blocks(page, "yaml")
              for script in scripts(yaml.safe_load(text)) for line in lines(script)
              if shlex.split(line)[0] in TOOLS]
    return list(dict.fromkeys(found))


def lines(script: str) -> Iterator[str]:
    """Single commands of a script: no comments, no continuations, nothing behind a `||`."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield shlex.join(words[:words.index("||")] if "||" in words else words)


def scripts(data: Any) -> Iterator[str]:
    """The shell scripts of a CI file."""
    if isinstance(data, list):
        for item in data:
            yield from scripts(item)
    elif isinstance(data, dict):
        for key, value in data.items():
            if key in _SCRIPTS and isinstance(value, str):
                yield value
            elif key in _SCRIPTS and isinstance(value, list):
                yield from value
            else:
                yield from scripts(value)


def links(page: Path) -> list[tuple[str, str]]:
    """Path and anchor of every link and picture that is no address on the web."""
    found = re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)", page.read_text(encoding="utf-8"))
    return [(path, anchor) for path, anchor in found if "://" not in path]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", h).strip().lower().replace(" ", "-") for h in headings}
