"""Transfer learning: a run that starts from the weights of a trained model and keeps some of its layers as they are.

As from ANI-1x to ANI-1ccx: Smith et al., Nature Communications 10, 2903 (2019).
"""

import dataclasses
import inspect
import json
import logging

import numpy as np
import torch
from torch import nn

from hpcmlip.batch import DataSpec
from hpcmlip.config import TransferSection
from hpcmlip.errors import ConfigError
from hpcmlip.models.export import load_model
from hpcmlip.models.potential import Potential
from hpcmlip.training.rundir import differing
from hpcmlip.units import SYMBOLS

log = logging.getLogger(__name__)


def freeze(potential: Potential, section: TransferSection) -> None:
    """Make the parameters of the layers in `section.freeze` constants.

    Raises ConfigError if the model has no such layer, does not tell its layers, or nothing would be left to train.
    """
    if not section.freeze:
        return
    kind = potential.config.kind
    # an attribute of this name may as well hold modules
    if not inspect.ismethod(getattr(potential.net, "layers", None)):
        raise ConfigError(f"transfer.freeze: the model '{kind}' does not tell its layers apart; leave freeze out")
    layers = potential.net.layers()
    for index in section.freeze:
        if index >= len(layers):
            raise ConfigError(f"transfer.freeze names layer {index}, but this '{kind}' has 0 to {len(layers) - 1}")
        for parameter in layers[index]:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in potential.parameters()):
        raise ConfigError("transfer.freeze names every layer: nothing would be trained")
    weights = [p for p in potential.parameters() if p.dim() > 1]
    others = [p for p in potential.parameters() if p.dim() <= 1]
    log.info("frozen %s weights and %s biases", _frozen_of(weights), _frozen_of(others))


def _frozen_of(parameters: list[nn.Parameter]) -> str:
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    return f"{frozen:,} of {sum(p.numel() for p in parameters):,}"


def start(potential: Potential, section: TransferSection) -> None:
    """Give a potential the weights of the trained model `section.model`, in place.

    A level that the trained model has keeps its head, any other starts from the head of `section.level`. The constant
    energies of atoms remain those of the new data. Raises ConfigError if settings, elements or levels do not fit.
    """
    old, _ = load_model(section.model)
    _check_same_model(old, potential, section)
    rows = _rows(old.spec, potential.spec, section)
    axes, parameters = level_axes(old), dict(potential.named_parameters())
    state = potential.state_dict()
    for name, value in old.state_dict().items():
        if name not in axes:
            state[name].copy_(value)
        elif name in parameters:
            # what stands before the levels (elements, where a level is a flag among the inputs) is kept
            first = value.shape[axes[name]] - len(old.spec.levels)
            chosen = torch.cat([torch.arange(first), first + rows])
            state[name].copy_(value.index_select(axes[name], chosen))
    heads = ", ".join(
        f"{new} from {old.spec.levels[row]}" for new, row in zip(potential.spec.levels, rows, strict=True)
    )
    log.info("weights of %s; heads: %s", section.model, heads)


def level_axes(potential: Potential) -> dict[str, int]:
    """Parameter or buffer -> the axis at whose end it has one entry a level, found by building a model of one more."""
    spec = potential.spec
    larger = dataclasses.replace(
        spec,
        levels=(*spec.levels, ""),
        reference=np.pad(spec.reference, ((0, 1), (0, 0))),
        residual=np.pad(spec.residual, ((0, 1), (0, 0))),
        isolated=(*spec.isolated, False),
    )
    other = Potential(potential.config, larger, seed=0).state_dict()
    axes = {}
    for name, tensor in potential.state_dict().items():
        grown = [
            axis for axis, pair in enumerate(zip(tensor.shape, other[name].shape, strict=True)) if pair[0] != pair[1]
        ]
        if grown:
            (axes[name],) = grown
            more = other[name].shape[grown[0]] - tensor.shape[grown[0]]
            assert more == 1, f"{name} grows by {more} entries with each level"
    return axes


def _check_same_model(old: Potential, new: Potential, section: TransferSection) -> None:
    settings = [{"model": json.loads(potential.config.model_dump_json())} for potential in (old, new)]
    changed = differing(*settings)
    if changed:
        raise ConfigError(f"the weights of {section.model} are those of another model ({'; '.join(changed[:5])})")
    if old.spec.elements != new.spec.elements:
        symbols = [" ".join(SYMBOLS[z] for z in spec.elements) for spec in (old.spec, new.spec)]
        raise ConfigError(f"{section.model} knows the elements {symbols[0]}, the data have {symbols[1]}: no transfer")


def _rows(old: DataSpec, new: DataSpec, section: TransferSection) -> torch.Tensor:
    """Level of the trained model from which each new level starts."""
    choices = ", ".join(old.levels)
    if section.level is not None and section.level not in old.levels:
        raise ConfigError(f"transfer.level is '{section.level}', {section.model} has {choices}")
    rest = section.level or (old.levels[0] if len(old.levels) == 1 else None)
    unknown = [level for level in new.levels if level not in old.levels]
    if section.level is not None and not unknown:
        raise ConfigError(f"transfer.level has no effect: {section.model} has all levels of the data; leave it out")
    if unknown and rest is None:
        raise ConfigError(f"{section.model} lacks the level {unknown[0]}: give transfer.level, one of {choices}")
    return torch.tensor([old.levels.index(level if level in old.levels else rest) for level in new.levels])
