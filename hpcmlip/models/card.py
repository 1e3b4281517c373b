"""`model.json` and the weights that it names, read and checked without torch."""

import hashlib
from pathlib import Path

from hpcmlip.errors import DataError
from hpcmlip.sealing import SchemaError, unseal

SCHEMA = 2
CARD = "model.json"
WEIGHTS = "model.safetensors"


def read_model(path: Path) -> tuple[Path, dict, bytes]:
    """(model.json, its contents, the weights) from a run directory or the path of a model.json.

    Raises DataError if a file is absent or damaged, the weights are not those that model.json names, or the files are
    of another version's schema.
    """
    path = Path(path)
    card_path = path / CARD if path.is_dir() else path
    card = _read_card(card_path)
    weights_path = card_path.with_name(WEIGHTS)
    try:
        weights = weights_path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the weights {weights_path}: {error.strerror}") from None
    if hashlib.sha256(weights).hexdigest() != card["weights_sha256"]:
        raise DataError(
            f"{weights_path} is not the file that {card_path} describes (sha256 differs): "
            "it was changed, damaged or half copied; copy both files again or train again"
        )
    return card_path, card, weights


def _read_card(path: Path) -> dict:
    try:
        card = unseal(path.read_bytes(), SCHEMA)
    except OSError as error:
        raise DataError(
            f"there is no model at {path} ({error.strerror}): train it first, or name its run directory"
        ) from None
    except SchemaError as error:
        way = "upgrade hpcmlip" if error.is_newer else "use it with the hpcmlip that made it, or train it again"
        raise DataError(f"the model {path} {error}: {way}") from None
    except ValueError as error:
        raise DataError(
            f"{path} is no model of hpcmlip, or a damaged or changed one ({error}): copy it again or train again"
        ) from None
    missing = {"config", "spec", "weights_sha256"} - set(card)
    if missing:
        raise DataError(f"{path} is no model of hpcmlip: it lacks '{sorted(missing)[0]}'")
    return card
