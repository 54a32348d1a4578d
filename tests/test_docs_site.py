"""The documentation site: builds strictly, whole and without the network; what is generated."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.documents import DOCS, ROOT

CONFIG = "docs/mkdocs.yml"
SCHEMA = ROOT / "recipes" / "schema.json"


def build(tree: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` runs, in a tree, into a folder."""
    return subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file",
                           CONFIG, "--site-dir", str(site)],
                          cwd=tree, capture_output=True, text=True)


def generate(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(DOCS / "generate.py"), *map(str, words)],
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site."""
    out = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the documentation that a test may spoil, beside the code that it is made from."""
    shutil.copytree(DOCS, tmp_path / "docs")
    (tmp_path / "recipes").mkdir()
    shutil.copy(SCHEMA, tmp_path / "recipes")
    (tmp_path / "bipdeploy").symlink_to(ROOT / "bipdeploy")
    return tmp_path


def test_make_docs_builds_strictly():
    done = subprocess.run(["make", "-n", "docs"], cwd=ROOT, capture_output=True, text=True)
    assert f"mkdocs build --strict --config-file {CONFIG}" in done.stdout


def test_the_site_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 12
    for page in pages:
        text = page.read_text(encoding="utf-8")
        tags = re.findall(r"<(?:script|img|iframe|source|link)\b[^>]*>", text)
        assert [tag for tag in tags if re.search(r"(?:src|href)=[\"']?(?:https?:)?//", tag)] == []
    for sheet in site.rglob("*.css"):
        assert re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//",
                          sheet.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(("line", "said"), [
    ("[x](nowhere.md)", "nowhere.md"), ("[x](#nothing)", "#nothing"),
    ("[x](recipe.md#prune-nothing)", "#prune-nothing"), ("![x](images/none.png)", "none.png")])
def test_a_dead_link_fails_the_build(line, said, tree, tmp_path):
    with (tree / "docs" / "pages" / "contributing.md").open("a") as page:
        page.write(f"\n{line}\n")
    done = build(tree, tmp_path / "site")
    assert done.returncode != 0 and said in done.stderr


def test_a_page_that_the_navigation_lacks_fails_the_build(tree, tmp_path):
    (tree / "docs" / "pages" / "lost.md").write_text("# Lost\n")
    done = build(tree, tmp_path / "site")
    assert done.returncode != 0 and "lost.md" in done.stderr


def test_packages_in_a_circle_fail_the_build(tree, tmp_path):
    (tree / "bipdeploy").unlink()
    rooms(tree / "bipdeploy", {"cli": ["errors"], "errors": ["cli"]})
    done = build(tree, tmp_path / "site")
    assert done.returncode != 0 and "cli → errors → cli" in done.stderr


def test_the_reference_has_every_field_of_the_schema(site):
    page = generate("recipe").stdout
    schema = json.loads(SCHEMA.read_text())
    for section in [schema, *schema["$defs"].values()]:
        for name, field in section["properties"].items():
            rows = re.findall(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
            said = " ".join(field.get("description", "").split()).replace("|", "\\|")
            assert any(said in row for row in rows), name
            for value in field.get("enum", []):
                shown = str(value).lower() if isinstance(value, bool) else value
                assert any(f"`{shown}`" in row for row in rows), (name, value)
    assert "## prune.target" in page.replace("###", "##")
    built = (site / "recipe" / "index.html").read_text(encoding="utf-8")
    assert 'id="tune-validation"' in built


def rooms(package: Path, imports: dict[str, list[str]]) -> Path:
    """Write a package whose rooms import each other as told; half of them in functions."""
    package.mkdir()
    (package / "__init__.py").write_text("from . import cli\n")
    for number, (name, others) in enumerate(imports.items()):
        body = [f'"""Room {name}.\n\nMore of it."""', "def late():", "    pass"]
        body += [f"    from {package.name}.{other} import x" if number % 2 else
                 f"    from .. import {other}" for other in others]
        (package / name).mkdir()
        (package / name / "__init__.py").write_text("\n".join(body) + "\n")
    return package


def test_the_picture_has_levels_and_only_the_arrows_that_follow_from_no_others(tmp_path):
    package = rooms(tmp_path / "made", {"cli": ["stages", "errors"], "stages": ["maths", "recipe"],
                                        "maths": ["errors"], "recipe": ["errors"], "errors": []})
    done = generate("packages", package)
    assert done.returncode == 0, done.stderr
    picture, table = done.stdout.split("</svg>")
    svg = ElementTree.fromstring(f"{picture}</svg>")
    boxes = {text.text: float(text.get("y")) for text in svg.iter(_tag("text"))}
    assert set(boxes) == {"cli", "stages", "maths", "recipe", "errors"}
    assert boxes["cli"] < boxes["stages"] < boxes["maths"] == boxes["recipe"] < boxes["errors"]
    arrows = svg.find(_tag("g")).findall(_tag("path"))
    assert len(arrows) == 5  # not cli → errors, which follows from the others
    assert "| `cli` | Room cli. | stages, errors |" in table
    assert "__init__" not in table


def test_an_arrow_past_a_row_goes_around_its_boxes(tmp_path):
    package = rooms(tmp_path / "made", {"cli": ["stages", "maths"], "stages": ["errors"],
                                        "errors": ["recipe"], "recipe": [], "maths": ["recipe"]})
    done = generate("packages", package)
    svg = ElementTree.fromstring(done.stdout.split("</svg>")[0] + "</svg>")
    past = [path.get("d") for path in svg.find(_tag("g")).findall(_tag("path"))
            if " V" in path.get("d")]
    assert len(past) == 1  # cli → maths, in the row of stages


def _tag(name: str) -> str:
    return f"{{http://www.w3.org/2000/svg}}{name}"


def test_packages_in_a_circle_are_not_drawn(tmp_path):
    done = generate("packages", rooms(tmp_path / "made", {
        "cli": ["stages"], "stages": ["maths"], "maths": ["stages"]}))
    assert done.returncode == 1
    assert done.stderr.strip() == ("error: packages that import each other cannot be drawn: "
                                   "stages → maths → stages")


def test_the_real_packages_are_all_there(site):
    names = {path.name.removesuffix(".py") for path in (ROOT / "bipdeploy").iterdir()
             if path.suffix == ".py" or (path / "__init__.py").is_file()}
    built = (site / "architecture" / "index.html").read_text(encoding="utf-8")
    assert set(re.findall(r"<text[^>]*>(\w+)</text>", built)) == names - {"__init__", "__main__"}
