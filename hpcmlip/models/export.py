"""A trained model on disk: `model.safetensors` (weights) beside `model.json` (all that is needed to use them).

Nothing is ever unpickled. `model.json` is written last, names the sha256 of the weights it belongs to, and is sealed.
"""

import hashlib
import json
from pathlib import Path

import safetensors.torch
import torch

import hpcmlip
from hpcmlip.batch import DataSpec
from hpcmlip.config import RunConfig, from_values
from hpcmlip.errors import ConfigError, DataError
from hpcmlip.files import write_atomic
from hpcmlip.models.potential import Potential
from hpcmlip.sealing import SchemaError, seal, unseal

SCHEMA = 2
CARD = "model.json"
WEIGHTS = "model.safetensors"


def save_model(folder: Path, potential: Potential, *, config: RunConfig, card: dict) -> None:
    """Write weights and `model.json` into `folder`; `card` adds what training knows (best step, data, versions).

    Each file appears under its name complete or not at all. Raises OSError if the disk refuses.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in potential.state_dict().items()}
    weights = safetensors.torch.save(state)
    values = {
        "hpcmlip": hpcmlip.__version__,
        "config": json.loads(config.model_dump_json()),
        "spec": potential.spec.as_json(),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        **card,
    }
    text = seal(values, SCHEMA)
    write_atomic(folder / WEIGHTS, weights)
    write_atomic(folder / CARD, text)


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Potential, dict]:
    """(potential in evaluation mode, contents of model.json) from a run directory or the path of a model.json.

    Raises DataError if a file is absent or damaged, the weights are not those that model.json names, or the files are
    of another version's schema.
    """
    card_path, card, weights = read_model(path)
    return _rebuild(card, weights, card_path, dtype), card


def read_model(path: Path) -> tuple[Path, dict, bytes]:
    """(model.json, its contents, the weights) as `load_model` reads and checks them, without building the model."""
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


def _rebuild(card: dict, weights: bytes, path: Path, dtype: torch.dtype) -> Potential:
    try:
        config = from_values(RunConfig, card["config"], path.parent, where=str(path))
        spec = DataSpec.from_json(card["spec"])
        potential = Potential(config.model, spec, seed=0).to(dtype)
        potential.load_state_dict(safetensors.torch.load(weights))
    except ConfigError as error:
        raise DataError(str(error)) from None
    except (KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{path} does not describe the weights beside it ({type(error).__name__}: {reason})") from None
    return potential.eval()
