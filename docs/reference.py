"""The recipe reference: a recipe's JSON Schema as Markdown, a heading per section."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

OPENING = """# Recipe reference

Every field of a recipe, made from the schema that `bipdeploy schema` prints. Unknown fields are
refused. `--set section.field=value` overrides any field on the command line; the value is YAML.
Editors complete from the schema where a recipe starts with the line
`# yaml-language-server: $schema=schema.json`.
"""
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most",
          "exclusiveMaximum": "below"}
TYPES = {"string": "text", "integer": "whole number", "number": "number", "null": "null",
         "boolean": "true or false", "array": "list", "object": "mapping", "any": "any value"}


def page(schema: Schema) -> str:
    """The whole page."""
    parts = [OPENING, "## Top level\n", _table(schema, schema["properties"], schema)]
    for path, section in _sections(schema, schema, ""):
        parts += [f"{'#' * min(4, 2 + path.count('.'))} {path} {{#{_anchor(path)}}}\n",
                  " ".join(section.get("description", "").split()) + "\n",
                  _table(section, section["properties"], schema, path)]
    return "\n".join(parts)


def fields(schema: Schema) -> Iterator[str]:
    """The dotted path of every field that is no section."""
    for path, section in [("", schema), *_sections(schema, schema, "")]:
        for name, field in section["properties"].items():
            if not _inner(field, schema):
                yield f"{path}.{name}".lstrip(".")


def _sections(section: Schema, schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    """Sections below one, depth first, by dotted path."""
    for name, field in section["properties"].items():
        found = _inner(field, schema)
        if found:
            inner = f"{path}.{name}".lstrip(".")
            yield inner, found
            yield from _sections(found, schema, inner)
        elif "$ref" in (entries := field.get("additionalProperties") or {}):
            yield f"{path}.{name}.NAME".lstrip("."), _resolved(entries, schema)
        for option in _options(field):
            if "$ref" in (entries := option.get("items") or {}):
                yield f"{path}.{name}.NUMBER".lstrip("."), _resolved(entries, schema)


def _inner(field: Schema, schema: Schema) -> Schema | None:
    """The section that a field is, or None."""
    for option in [field, *_options(field)]:
        found = _resolved(option, schema)
        if "properties" in found:
            return found
    return None


def _options(field: Schema) -> list[Schema]:
    return field.get("anyOf", field.get("oneOf", []))


def _resolved(field: Schema, schema: Schema) -> Schema:
    reference = field.get("$ref")
    return schema["$defs"][reference.rpartition("/")[2]] if reference else field


def _table(section: Schema, properties: Schema, schema: Schema, path: str = "") -> str:
    rows = ["| field | value | default | meaning |", "|---|---|---|---|"]
    for name, field in properties.items():
        inner = _inner(field, schema)
        value = _value(field, schema, f"{path}.{name}".lstrip("."))
        default = _default(name, field, section, inner)
        text = field.get("description") or (inner or {}).get("description", "")
        rows.append(f"| `{name}` | {value} | {default} | {_cell(text)} |")
    return "\n".join(rows) + "\n"


def _default(name: str, field: Schema, section: Schema, inner: Schema | None) -> str:
    if "default" in field:
        return f"`{json.dumps(field['default'], ensure_ascii=False)}`"
    if name in section.get("required", []):
        return "required"
    return "" if inner else "`{}`"


def _value(field: Schema, schema: Schema, path: str) -> str:
    """Type, allowed values and bounds in words."""
    if _inner(field, schema):
        optional = any(o.get("type") == "null" for o in _options(field))
        return f"[section](#{_anchor(path)})" + (" or null" if optional else "")
    if _options(field):
        return " or ".join(_value(option, schema, path) for option in _options(field))
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value if isinstance(value, str) else json.dumps(value)}`"
                         for value in field["enum"])
    words = TYPES[field.get("type", "any")]
    if "items" in field:
        inside = path + ".NUMBER" if "$ref" in field["items"] else path
        words += f" of: {_value(field['items'], schema, inside)}"
    if isinstance(entries := field.get("additionalProperties"), dict):
        inner = (f"[section](#{_anchor(path + '.NAME')})" if "$ref" in entries
                 else _value(entries, schema, path))
        words += f" of names to: {inner}"
    if "minItems" in field:
        words += f", at least {field['minItems']}"
    if "pattern" in field:
        words += f" like `{field['pattern']}`"
    bounds = [f"{word} {field[key]:g}" for key, word in BOUNDS.items() if key in field]
    return ", ".join([words, *bounds])


def _anchor(path: str) -> str:
    return path.lower().replace(".", "-")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
