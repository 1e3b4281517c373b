"""JSON records that notice a change of themselves: each carries the sha256 of its own content.

A seal tells damage and tampering by hand from what was written. It is no signature: whoever changes a record on purpose
can seal it again.
"""

import hashlib
import json
from typing import Any

DIGEST = "digest"


class SchemaError(ValueError):
    """A record of another version of hpcmlip."""

    def __init__(self, found: int, schema: int):
        super().__init__(f"has schema {found}, this hpcmlip reads {schema}")
        self.is_newer = found > schema


def seal(values: dict[str, Any], schema: int) -> str:
    """JSON text of a record of this schema with its digest. Raises ValueError for what JSON cannot hold (NaN)."""
    plain = json.loads(json.dumps({"schema": schema, **values}, allow_nan=False))
    return json.dumps({**plain, DIGEST: _digest(plain)}, indent=1, ensure_ascii=False)


def unseal(text: bytes | str, schema: int) -> dict[str, Any]:
    """The values of a sealed record. Raises SchemaError, or ValueError saying what is wrong."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no valid JSON: {error}") from None
    if not isinstance(values, dict) or type(values.get("schema")) is not int:
        raise ValueError("it has no schema number")
    told = values.pop(DIGEST, None)
    if told is None and values["schema"] < schema:  # the first schemas had no seal
        raise SchemaError(values["schema"], schema)
    if told != _digest(values):
        raise ValueError("it does not match its own digest")
    if values["schema"] != schema:
        raise SchemaError(values["schema"], schema)
    return values


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
