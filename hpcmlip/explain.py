"""Pydantic's complaints in the words of somebody who edits a YAML file."""

from collections.abc import Sequence
from typing import Any, get_args, get_origin

from hpcmlip import plugins

MOST = 5
"""Complaints that are reported at once."""

_EXPECTED = {
    "string_type": "text (quote it if it looks like a number, yes, no or null)",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list [...]",
    "dict_type": "a section of keys {...}",
    "model_type": "a section of keys {...}",
}


def explain(cls: type, errors: Sequence[dict], prefix: str = "") -> str:
    """One clause for each wrong key of a config of type `cls`; `prefix`: dotted path of the section in the file."""
    by_key: dict[tuple, list[dict]] = {}
    for error in errors:
        by_key.setdefault(_key(error["loc"]), []).append(error)
    # a value that may be text or a section is refused once as text and once for what is wrong inside
    keys = [key for key in by_key if not (_is_wrong_type(by_key[key]) and any(_is_inside(k, key) for k in by_key))]
    return "; ".join(_clause(cls, key, by_key[key], prefix) for key in keys[:MOST])


def _key(loc: Sequence) -> tuple:
    """Place in the file: without the names that pydantic gives to the alternatives of a union."""
    return tuple(part for part in loc if isinstance(part, int) or not _is_alternative(part))


def _is_alternative(part: str) -> bool:
    return part in ("str", "int", "float", "bool", "[key]") or part.startswith(("function-", "LevelSource", "tuple["))


def _is_wrong_type(errors: Sequence[dict]) -> bool:
    return all(error["type"] in _EXPECTED for error in errors)


def _is_inside(key: tuple, outer: tuple) -> bool:
    return len(key) > len(outer) and key[: len(outer)] == outer


def _clause(cls: type, key: tuple, errors: Sequence[dict], prefix: str) -> str:
    where = prefix + ".".join(map(str, key))
    specific = [error for error in errors if error["type"] not in _EXPECTED]
    error = (specific or errors)[0]
    if error["type"] == "extra_forbidden":
        known = _fields(cls, key[:-1])
        return f"unknown key '{where}'" + (plugins.suggest(key[-1], known) if known else "")
    if error["type"] == "missing":
        return f"the key '{where}' is missing" if isinstance(key[-1], str) else f"{where}: this item is missing"
    if error["type"].endswith("too_short") and error["ctx"]["min_length"] == 1:
        message = "must not be empty"
    elif specific:
        message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        message = message.replace("expected greater", "must be greater").replace("expected less", "must be less")
    else:
        message = "expected " + " or ".join(dict.fromkeys(_EXPECTED[e["type"]] for e in errors))
    # our own checks name what they refuse; of a section the whole content would be printed
    got = "" if error["type"] == "value_error" or isinstance(error["input"], dict) else f", got {error['input']!r}"
    where = where.rstrip(".")
    return f"{where}: {message}{got}" if where else message


def _fields(annotation: Any, key: Sequence) -> list[str]:
    """Keys of the section that `key` leads to, from a config class or the type of a field; empty for none."""
    fields = getattr(annotation, "model_fields", None)
    if fields is not None:
        if not key:
            return list(fields)
        return _fields(fields[key[0]].annotation, key[1:]) if key[0] in fields else []
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (dict, tuple, list):
        return _fields(arguments[-1] if origin is dict else arguments[0], key[1:]) if key else []
    return next((found for argument in arguments if (found := _fields(argument, key))), [])
