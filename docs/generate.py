"""What of the site is made from the code: the recipe reference and the picture of the packages.

A hook of MkDocs, so that both are made anew with every build and neither is a file to keep:
`recipe.md` is added to the pages, and `<!-- packages -->` in a page is replaced. Imports nothing
of bipdeploy. By itself it prints them:

    python docs/generate.py recipe
    python docs/generate.py packages [PACKAGE_FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import packages
import reference

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "recipes" / "schema.json"
PACKAGE = ROOT / "bipdeploy"
PLACE = "<!-- packages -->"


def recipe_page() -> str:
    """The reference of every recipe field, as Markdown."""
    return reference.page(json.loads(SCHEMA.read_text(encoding="utf-8")))


def packages_section(package: Path = PACKAGE) -> str:
    """The picture of a package's rooms and the table of them, as Markdown."""
    rooms = packages.read(package)
    return f"{packages.picture(rooms)}\n\n{packages.table(rooms)}"


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the recipe reference to the pages."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "recipe.md", content=recipe_page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the packages where a page asks for them. A cycle among them ends the build."""
    if PLACE not in markdown:
        return markdown
    from mkdocs.exceptions import PluginError

    try:
        return markdown.replace(PLACE, packages_section())
    except packages.CycleError as error:
        raise PluginError(str(error)) from error


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["recipe"]:
            print(recipe_page())
        case ["packages", *folder]:
            try:
                print(packages_section(*map(Path, folder)))
            except packages.CycleError as error:
                sys.exit(f"error: {error}")
        case _:
            sys.exit(__doc__)
