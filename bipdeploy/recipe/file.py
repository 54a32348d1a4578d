"""Reading recipes from YAML: overrides, all faults at once with their lines, JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from bipdeploy.errors import InputError, RecipeError, did_you_mean
from bipdeploy.recipe import old_names
from bipdeploy.recipe.old_names import Location
from bipdeploy.recipe.recipe import Recipe


def load(path: Path | str, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file, with `section.field=value` overrides laid over it.

    Raises RecipeError that lists every fault with its line, InputError where there is no file.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"recipe {str(path)!r} cannot be read: {reason}") from error
    return parse(text, str(path), overrides)


def parse(text: str, source: str, overrides: list[str] | None = None) -> Recipe:
    """As `load`, from text. `source` names it in messages."""
    lines: dict[Location, int] = {}
    faults: list[str] = []
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        if tree is not None:
            _note_lines(tree, (), lines, faults, ())
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise RecipeError(source, [f"{where}not YAML: {problem}"]) from error
    if not isinstance(data, dict):
        raise RecipeError(source, ["line 1: a recipe is a mapping of sections, such as `model:`"])
    return build(data, source, overrides, lines, faults)


def build(data: dict[str, Any], source: str, overrides: list[str] | None = None,
          lines: dict[Location, int] | None = None, faults: list[str] | None = None) -> Recipe:
    """As `parse`, from data that YAML gave. `lines` says where its keys stand."""
    lines, faults = lines or {}, list(faults or [])
    old_names.rename(data, lines, faults)
    for item in overrides or []:
        _override(data, item, lines)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        for detail in error.errors():
            faults += _explain(detail, lines)
    if faults:
        raise RecipeError(source, faults)
    return recipe


def schema() -> dict[str, Any]:
    """The recipe's JSON Schema, for editor completion."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _note_lines(node: yaml.Node, at: Location, lines: dict[Location, int],
                faults: list[str], within: tuple[yaml.Node, ...]) -> None:
    """Record the line of every key below `node`; duplicate keys are faults."""
    if any(node is outer for outer in within):
        raise yaml.MarkedYAMLError(problem="an alias that stands for what it is part of",
                                   problem_mark=node.start_mark)
    within = (*within, node)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, str(key.value))
            line = key.start_mark.line + 1
            if here in lines:
                faults.append(f"line {line}: {_dotted(here)}: given twice, first on line "
                              f"{lines[here]}; keep one")
            lines[here] = line
            _note_lines(value, here, lines, faults, within)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, index)] = value.start_mark.line + 1
            _note_lines(value, (*at, index), lines, faults, within)


def _override(data: dict, item: str, lines: dict[Location, int]) -> None:
    path, equals, text = item.partition("=")
    if not equals or not path.strip():
        raise InputError(f"--set {item!r} is not of the form section.field=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {item!r}: the value is not YAML") from error
    keys = old_names.current(path.strip()).split(".")
    if keys[0] == "gates" and len(keys) > 2:  # the names of figures have dots in them
        bound = [] if isinstance(value, dict) else [keys.pop()]
        keys = ["gates", old_names.current(".".join(keys[1:])), *bound]
    section = data
    for depth, key in enumerate(keys[:-1]):
        if not isinstance(section.get(key), dict):
            if section.get(key) is not None:
                raise InputError(f"--set {item!r}: {_dotted(tuple(keys[:depth + 1]))} is a value, "
                                 "not a section")
            section[key] = {}
        section = section[key]
    section[keys[-1]] = value
    lines.pop(tuple(keys), None)  # a fault in what was overridden has no line in the file


def _explain(detail: Any, lines: dict[Location, int]) -> list[str]:
    """One fault of pydantic's as one line (or several, where a validator found several)."""
    # Some parts say where it is in a type (the last two: `calibration.py`), not in the recipe.
    at: Location = tuple(part for part in detail["loc"]
                         if part not in ("[key]", "[one]", "[several]"))
    kind, name = detail["type"], _dotted(at)
    prefix = f"line {lines[at]}: " if at in lines else ""
    if kind == "extra_forbidden":
        return [f"{prefix}{name}: unknown field{did_you_mean(str(at[-1]), fields(at[:-1]))}"]
    if kind == "missing":
        parent = f"line {lines[at[:-1]]}: " if at[:-1] in lines else ""
        return [f"{parent}{name}: required, and missing"]
    message = detail["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return [_with_line(line, lines) if line.startswith("gates.")
                else f"{prefix}{name + ': ' if name else ''}{line}" for line in message.split("\n")]
    if kind == "model_type":
        message = f"this is a section, with the fields {', '.join(fields(at))}"
    return [f"{prefix}{name}: {_shown(detail['input'])} is not accepted: {message[0].lower()}"
            f"{message[1:]}"]


def _with_line(line: str, lines: dict[Location, int]) -> str:
    figure = line.partition(":")[0].removeprefix("gates.")
    at = ("gates", figure)
    return f"line {lines[at]}: {line}" if at in lines else line


def fields(at: Location) -> list[str]:
    """The field names of the section at a location; of a mapping of sections, those of each."""
    section: Any = Recipe
    named = False  # the part is a name in a mapping
    for part in at:
        if named or isinstance(part, int):
            named = False
            continue
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        named = get_origin(annotation) is dict
        section = next(_sections(annotation), None)
        if section is None:
            return []
    return list(section.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections in a field's type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def _dotted(at: Location) -> str:
    return ".".join(str(part) for part in at)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
