"""Weights of a hippynn run (its `state_dict`s) in our HIP-NN. Checked against hippynn 0.1.3."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpcmlip.errors import DataError
from hpcmlip.models.hipnn import Interaction, Net, Residual


def load_hippynn_state(net: Net, network: Mapping[str, Any], heads: Sequence[Mapping[str, Tensor]]) -> None:
    """Copy the weights of a hippynn network and of one energy head per level into `net`, in place.

    The elements must stand in the same order as in hippynn's species list (less its padding species 0). Heads are taken
    to give kcal/mol, as in hippynn's examples. Raises DataError if a weight is missing, left over or of another shape.
    """
    if len(heads) != net.offset.e0.shape[0]:
        raise DataError(f"expected the state of {net.offset.e0.shape[0]} energy heads, one a level, got {len(heads)}")
    rest = dict(network)
    with torch.no_grad():
        for b, block in enumerate(net.blocks):
            for k, layer in enumerate(block):
                _copy_layer(layer, rest, f"blocks.{b}.{k}.")
        for level, state in enumerate(heads):
            _copy_head(net, level, dict(state))
    if rest:
        raise DataError(f"the hippynn state holds '{min(rest)}', for which this network has no place")


def _copy_layer(layer: nn.Module, rest: dict[str, Any], prefix: str) -> None:
    inner = prefix
    if isinstance(layer, Residual):
        inner = prefix + "base_layer."
        _copy_linear(layer.out, rest, prefix + "res_layer.")
        if isinstance(layer.skip, nn.Linear):
            _copy_linear(layer.skip, rest, prefix + "adjust_layer.")
    if not isinstance(layer.base, Interaction):
        _copy_linear(layer.base, rest, inner)
        return
    base = layer.base
    _copy(base.weight, rest, inner + "int_weights")
    _copy(base.mu, rest, inner + "sensitivity.mu")
    _copy(base.sigma, rest, inner + "sensitivity.sigma")
    _copy_linear(base.own, rest, inner + "selfint.")
    for row, name in zip(base.scales, ("vecscales", "quadscales"), strict=False):
        _copy(row, rest, inner + name)
    if len(base.scales):
        base.cusp = float(rest.pop(inner + "_extra_state", {"cusp_reg": base.cusp})["cusp_reg"])


def _copy_head(net: Net, level: int, state: dict[str, Tensor]) -> None:
    _copy(net.offset.e0[level], state, "layers.0.weight")
    for n, head in enumerate(net.heads, start=1):
        _copy(head.weight[level], state, f"layers.{n}.weight")
        _copy(head.bias[level : level + 1], state, f"layers.{n}.bias")
    if state:
        raise DataError(f"the hippynn head holds '{min(state)}', for which this network has no place")


def _copy_linear(layer: nn.Linear, rest: dict[str, Any], prefix: str) -> None:
    _copy(layer.weight, rest, prefix + "weight")
    if layer.bias is not None:
        _copy(layer.bias, rest, prefix + "bias")


def _copy(target: Tensor, rest: dict[str, Any], name: str) -> None:
    if name not in rest:
        raise DataError(f"the hippynn state lacks '{name}'")
    source = rest.pop(name)
    if source.numel() != target.numel() or source.squeeze().shape != target.squeeze().shape:
        raise DataError(f"'{name}' of the hippynn state has shape {list(source.shape)}, expected {list(target.shape)}")
    target.copy_(source.reshape(target.shape))
