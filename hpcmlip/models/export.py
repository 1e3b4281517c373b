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
from hpcmlip.models.card import CARD, SCHEMA, WEIGHTS, read_model
from hpcmlip.models.potential import Potential
from hpcmlip.sealing import seal


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
    """(potential in evaluation mode, contents of model.json); path and errors are those of `read_model`."""
    card_path, card, weights = read_model(path)
    return _rebuild(card, weights, card_path, dtype), card


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
