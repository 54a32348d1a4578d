"""README.md and the documentation: every command works, every example is accepted.

`RULES` says for each command what is run. Quick ones run as they stand. `bipdeploy run` and those
that measure are checked instead, with the same settings; the words and options of the others are
parsed as the command line does. A command that no rule knows fails.
"""

from __future__ import annotations

import ast
import fnmatch
import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import typer
import yaml

import bipdeploy
from bipdeploy.cli.commands import app
from tests.documents import PAGES, README, ROOT, anchors, blocks, commands, links
from tests.running import bipdeploy_here

SMOKE = "recipes/smoke.yaml"
HERE = ("recipes", "benchmarks", "docs", "Dockerfile")  # what commands name
LISTS = {"--criteria": "criteria", "--layers": "layers", "--methods": "methods",
         "--ratios": "ratios", "--repairs": "repairs", "--seeds": "seeds"}
NUMBERS = {"--samples": "samples", "--max-perplexity-ratio": "max_perplexity_ratio",
           "--concurrent": "engine.concurrent", "--cpus": "engine.cpus"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Where commands are run: the repository's files, and the reader's own model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    place = tmp_path_factory.mktemp("reader")
    for name in HERE:
        (place / name).symlink_to(ROOT / name)
    LlamaForCausalLM(LlamaConfig(
        hidden_size=64, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=8192,
    )).save_pretrained(place / "my-model")
    return place


def accepted(*words: object) -> None:
    """A `bipdeploy` command that ends with exit code 0."""
    done = bipdeploy_here(*words)
    assert done.returncode == 0, f"bipdeploy {shlex.join(map(str, words))}\n{done.stderr}"


def existing(words: list[str]) -> list[str]:
    """The words with their patterns expanded; files of the repository among them must exist."""
    found = []
    for word in words:
        word = word.removeprefix("/opt/bipdeploy/")  # where the images have the repository
        if word.partition("/")[0] in HERE and "/" in word and "://" not in word:
            matches = sorted(map(str, Path().glob(word)))
            assert matches, f"there is no {word}"
            found += matches
        else:
            found.append(word)
    return found


def parsed(words: list[str]) -> None:
    """The words of a `bipdeploy` command as the command line reads them; nothing is run."""
    group = typer.main.get_command(app)
    if words[0].startswith("-"):
        context = group.make_context("bipdeploy", ["schema"], resilient_parsing=True)
        assert any(words[0] in option.opts for option in group.get_params(context)), (
            f"bipdeploy has no option {words[0]}")
        return
    assert words[0] in group.commands, f"bipdeploy has no command {words[0]}"
    group.commands[words[0]].make_context(words[0], list(words[1:]))


def our_command(words: list[str]) -> None:
    """`bipdeploy WORDS`: parsed; then run where it is quick, else its settings are checked."""
    words = existing(words)
    parsed(words)
    name = words[0]
    if name in ("check", "plan", "schema"):
        return accepted(*words)
    recipe = next((word for word in words if word.endswith(".yaml")), SMOKE)
    settings = _settings(words, name)
    if settings or recipe != SMOKE:
        accepted("check", recipe, *(part for item in settings for part in ("--set", item)))
    return None


def _settings(words: list[str], section: str) -> list[str]:
    """The options of a command as overrides of the recipe."""
    found = []
    for option, value in pairwise(words):
        if option == "--set":
            found.append(value)
        elif option in LISTS:
            found.append(f"{section}.{LISTS[option]}=[{value}]")
        elif option in NUMBERS:
            found.append(f"{section}.{NUMBERS[option]}={value}")
        elif option == "--vary":
            field, _, values = value.partition("=")
            found.append(f"{section}.fields={{{field}: [{values}]}}")
    return found


def make(words: list[str]) -> None:
    """`make TARGET`: the Makefile has it."""
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def pip(words: list[str]) -> None:
    """`pip install '.[EXTRA]'`: the project has the extra."""
    assert words[0] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = re.fullmatch(r"\.\[([\w,-]+)\]", words[-1])
    assert wanted and set(wanted[1].split(",")) <= set(project["optional-dependencies"]), words


def python(words: list[str]) -> None:
    """`python FILE OPTIONS`: the file exists and its help names every option."""
    if words[0] == "-m":
        assert words[1] == "venv"
        return
    known = set(re.findall(r"--[\w-]+", _help(*existing(words[:1]))))
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, words


@cache
def _help(script: str) -> str:
    return subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True,
                          text=True, check=True).stdout


def docker(words: list[str]) -> None:
    """`docker build`: the Dockerfile has the target. `docker run`: our command behind the image."""
    if words[0] == "build":
        target = words[words.index("--target") + 1]
        assert re.search(rf"^FROM .* AS {target}$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    else:
        assert words[0] == "run"
        image = next(i for i, word in enumerate(words) if word.partition(":")[0] == "bipdeploy")
        our_command(words[image + 1:])


RULES: dict[str, Callable[[list[str]], None]] = {
    "bipdeploy": our_command, "make": make, "pip": pip, "python": python, "docker": docker}


def _marked(line: str):
    slow = line.startswith("python benchmarks/")  # each loads torch
    return pytest.param(line, marks=pytest.mark.slow) if slow else line


@pytest.mark.parametrize("line", [_marked(line) for line in commands()])
def test_every_command_of_the_documentation_works(line, folder, monkeypatch):
    monkeypatch.chdir(folder)
    first, *words = shlex.split(line)
    name = first.removeprefix(".venv/bin/")
    assert name in RULES, f"no rule of tests/test_docs.py knows how to check: {line}"
    RULES[name](words)


@pytest.mark.parametrize(("line", "said"), [
    ("run", "(?i)missing"), ("run x.yaml --no-such", "No such option"), ("prune x", "(?i)missing"),
    ("no", "has no command no"), ("--no-such", "has no option --no-such"),
    ("check recipes/none.yaml", "there is no recipes/none.yaml"),
    ("run recipes/smoke.yaml --set prune.no=1", "prune.no: unknown field"),
    ("sweep recipes/smoke.yaml --out x --vary prune.no=1", "prune.no"),
    ("compare recipes/smoke.yaml --out x --criteria flop", "no criterion is called")])
def test_a_command_that_is_written_wrongly_would_be_seen(line, said, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(Exception, match=said):
        our_command(line.split())


def test_commands_and_files_in_running_text_exist():
    group = typer.main.get_command(app)
    for page in [README, *PAGES]:
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"`bipdeploy ([a-z]+)[ `]", text))
        assert named <= set(group.commands), page.name
        for file in re.findall(r"`((?:recipes|benchmarks|docs|tests)/[\w./-]+)`", text):
            assert (ROOT / file).exists(), f"{page.name}: {file}"
        for target in set(re.findall(r"`make ([a-z-]+)`", text)):
            make([target])


def examples() -> list[tuple[str, str]]:
    """Page and text of every YAML example."""
    return [(page.name, text) for page in [README, *PAGES] for text in blocks(page, "yaml")]


@pytest.mark.parametrize(("page", "text"), [e for e in examples() if "script" not in e[1]
                                            and "jobs" not in e[1]])
def test_the_examples_of_recipes_are_accepted(page, text, folder, monkeypatch):
    monkeypatch.chdir(folder)
    settings = [f"{section}.{name}={json.dumps(value)}"
                for section, fields in yaml.safe_load(text).items()
                for name, value in fields.items()]
    if "prune.target" in text.replace("prune:\n  target", "prune.target"):
        settings.append("prune.ratio=null")
    accepted("check", SMOKE, *(part for item in settings for part in ("--set", item)))


def test_the_examples_in_python_call_what_there_is():
    calls = [node for page in [README, *PAGES] for text in blocks(page, "python")
             for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)
             and ast.unparse(node.func).startswith("bipdeploy.")]
    assert len(calls) > 2
    for call in calls:
        function = getattr(bipdeploy, ast.unparse(call.func).removeprefix("bipdeploy."))
        inspect.signature(function).bind(*call.args, **{k.arg: k.value for k in call.keywords})


def test_the_files_for_ci_run_a_recipe_and_keep_its_verdicts():
    github, gitlab = (yaml.safe_load(next(text for _, text in examples() if key in text))
                      for key in ("jobs:", "script:"))
    steps = github["jobs"]["prune"]["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    kept = [path for step in steps for path in step.get("with", {}).get("path", "").split()]
    assert "runs/quickstart/gate/" in kept
    assert any("bipdeploy run recipes/quickstart.yaml" in step.get("run", "") for step in steps)
    job = gitlab["prune"]
    assert "bipdeploy run recipes/quickstart.yaml" in job["script"]
    assert fnmatch.fnmatch("runs/quickstart/gate/junit.xml", job["artifacts"]["reports"]["junit"])
    assert job["artifacts"]["when"] == "always"
    assert job["retry"]["exit_codes"] == [1]


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
    for path, anchor in links(README):
        target = ROOT / path
        assert target.is_file(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def spoken() -> list[str]:
    """Every string of the source, with `…` for what is filled in; adjacent literals are one."""
    found = []
    for path in Path(bipdeploy.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…"
                                     for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [" ".join(text.split()) for text in found]


def messages() -> list[str]:
    """The first column of the tables of the page on troubleshooting."""
    page = next(page for page in PAGES if page.name == "troubleshooting.md")
    return re.findall(r"^\| `([^`]+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_messages_explained_are_those_of_the_source():
    said = spoken()
    assert len(messages()) > 30
    unknown = [message for message in messages() if not any(
        re.search(".*".join(map(re.escape, message.split("…"))), text) for text in said)]
    assert unknown == []
