"""Options that commands share, and the recipe overrides that options stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bipdeploy.errors import InputError

Set = Annotated[list[str] | None, typer.Option(
    "--set", help="Override a recipe field: section.field=value. Repeatable.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]
Force = Annotated[bool, typer.Option(
    "--force", help="Replace OUT, whatever is in it, unless it is read.")]
# What `compare` and `sweep` both vary.
Criteria = Annotated[str | None, typer.Option(help="Criteria, such as llm_bip:measured,flap.")]
Layers = Annotated[str | None, typer.Option(
    help="Spreads of the budget, such as uniform,searched.")]
Ratios = Annotated[str | None, typer.Option(help="Such as 0.2,0.5.")]
Repairs = Annotated[str | None, typer.Option(help="Such as none,bias,refit.")]


def compare_settings(given: dict[str, str | None]) -> list[str]:
    """Options of `compare` as overrides. Methods and repairs that are named stand alone: what the
    recipe lists besides is left out."""
    named = _named(given)
    if "methods" in named:
        named = {"criteria": [], **named}
    if {"criteria", "layers"} & set(named):
        named = {"methods": [], **named}
    if {"methods", "repairs"} & set(named):
        named["also"] = {}
    return [f"compare.{name}={json.dumps(value)}" for name, value in named.items()]


def sweep_settings(lists: Mapping[str, str | None], vary: Sequence[str] | None,
                   values: Mapping[str, Any]) -> list[str]:
    """Options of `sweep` as overrides. `lists`: axes, as words with commas; `vary`: other fields,
    `section.field=value,value`, which stand alone; `values`: single fields of the section."""
    named = {**_named(lists), **{n: v for n, v in values.items() if v is not None}}
    if vary:
        named["fields"] = dict(map(_field, vary))
    return [f"sweep.{name}={json.dumps(value)}" for name, value in named.items()]


def _field(item: str) -> tuple[str, list[object]]:
    name, equals, words = item.partition("=")
    if not (equals and name.strip() and words):
        raise InputError(f"--vary {item!r} is not of the form section.field=value,value")
    whole = _number(f"[{words}]")  # numbers, or JSON with commas of its own
    return name.strip(), whole if isinstance(whole, list) else [
        _number(word) for word in words.split(",")]


def _named(given: Mapping[str, str | None]) -> dict[str, Any]:
    """Lists by name, of those that were given; numbers where the field takes them."""
    named: dict[str, Any] = {name: value.split(",") for name, value in given.items()
                             if value is not None}
    for name in {"ratios", "seeds"} & set(named):
        named[name] = [_number(word) for word in named[name]]
    return named


def _number(word: str) -> object:
    """The number that a word is, or the word, which the recipe then refuses."""
    try:
        return json.loads(word)
    except ValueError:
        return word
