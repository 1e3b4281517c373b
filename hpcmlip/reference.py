"""All keys of the YAML files with type, default and meaning, from the classes that check them."""

import typing
from collections.abc import Iterator
from typing import Any

from pydantic_core import PydanticUndefined

from hpcmlip import plugins
from hpcmlip.cluster.site import Site
from hpcmlip.config import RunConfig, Section
from hpcmlip.preprocess.config import DataConfig

INTRODUCTION = """# Settings

Written by `hpcmlip configs --keys`: every key of the YAML files, its type, its default and what it does. On the command
line a key is given as `key=value`, nested keys with dots. `LEVEL` stands for a level of theory, by its name.
"""
NAMES = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def render() -> str:
    """The page, in Markdown."""
    found = [INTRODUCTION]
    found += [_part("DATA.yaml, for `shard`", DataConfig)]
    found += [_part("RUN.yaml, for `train` and `submit`; the keys of `model` follow", RunConfig, leave_out="model")]
    for kind in plugins.names("models"):
        module = plugins.find("models", kind)
        found.append(_part(f"`model: {{kind: {kind}}}`: {module.COMPONENT}", module.Config, prefix="model."))
    found.append(_part("SITE.yaml, for `submit --site`", Site))
    return "\n".join(found)


def _part(title: str, cls: type[Section], *, prefix: str = "", leave_out: str = "") -> str:
    return f"## {title}\n\n" + "\n".join(_lines(cls, prefix, leave_out)) + "\n"


def _lines(cls: type[Section], prefix: str, leave_out: str = "") -> Iterator[str]:
    schema = cls.model_json_schema()["properties"]
    for name, field in cls.model_fields.items():
        if name == leave_out or (prefix == "model." and name == "kind"):
            continue
        key, text = prefix + name, " ".join(_description(cls, name).split())
        inner = _section(field.annotation)
        own = _line(key, schema[name], field.default, text)
        if inner is None:
            yield own
            continue
        if text or type(None) in typing.get_args(field.annotation):
            yield own
        yield from _lines(inner, key + (".LEVEL." if typing.get_origin(field.annotation) is dict else "."))


def _description(cls: type[Section], name: str) -> str:
    """Of a field: the class's own or, where that gives another default only, of the class above."""
    fields = (base.model_fields.get(name) for base in cls.__mro__ if issubclass(base, Section))
    return next((field.description for field in fields if field is not None and field.description), "")


def _section(annotation: Any) -> type[Section] | None:
    """The section that a value is, or holds for each level."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = (_section(argument) for argument in typing.get_args(annotation))
    return next((found for found in inner if found is not None), None)


def _line(key: str, schema: dict, default: Any, text: str) -> str:
    facts = [fact for fact in (_type(schema), _default(default)) if fact]
    return f"- `{key}` ({'; '.join(facts)})" + (f": {text}" if text else "")


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, Section) or value in ({}, (), ""):
        return ""
    if isinstance(value, dict):
        inside = ", ".join(f"{key}: {_default(inner).removeprefix('default ')}" for key, inner in value.items())
        return f"default {{{inside}}}"
    if isinstance(value, bool) or value is None:
        return f"default {str(value).lower()}"
    if isinstance(value, tuple):
        return f"default [{', '.join(map(str, value))}]"
    return f"default {value:g}" if isinstance(value, float) else f"default {value}"


def _type(schema: dict) -> str:
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(option) for option in schema["anyOf"] if option.get("type") != "null"))
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("items") or schema["prefixItems"][0]
        return f"list of {_type(items).partition(',')[0]}s"
    if kind not in NAMES:
        return "section"
    name = "path" if schema.get("format") == "path" else NAMES[kind]
    return ", ".join([name, *(f"{words} {schema[key]:g}" for key, words in BOUNDS.items() if key in schema)])
