"""Energies and forces recorded as one graph, which `engine.compile` compiles: right for all sizes, with gradients."""

import molecules
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hpcmlip.errors import ConfigError
from hpcmlip.models.compiled import Compiled
from hpcmlip.models.potential import Potential


def structures(formula: str, num: int) -> tuple[Tensor, Tensor]:
    """(positions [B, N, 3] Å, elements [B, N])."""
    block = molecules.batch(molecules.real(formula, slice(0, num)))
    return block.topology.by_structure(block.pos), block.topology.by_structure(block.species)


def with_gradients(potential: Potential, outputs: tuple[Tensor, ...]) -> list[Tensor]:
    weights = [p for p in potential.parameters() if p.requires_grad]
    total = sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(total, weights, allow_unused=True, materialize_grads=True)]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_recorded_graph_serves_all_sizes(potential, config):
    if config.not_compiled:
        with pytest.raises(ConfigError, match="is not compiled"):
            potential.compile_forces()
        return
    compiled = Compiled(potential.net, config.cutoff, len(molecules.ELEMENTS))
    levels = (0, 1)
    graph = compiled.record(levels, *structures("C2H6O1", 7))
    for formula, num in (("C2H6O1", 7), ("H2O1", 5), ("C3H8", 2)):
        pos, species = structures(formula, num)
        found = with_gradients(potential, graph(pos, species))
        expected = with_gradients(potential, compiled.eager(levels, pos, species))
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.abs().max()))
        (prediction,) = potential([molecules.batch(molecules.real(formula, slice(0, num)))])
        assert_close(found[0], prediction.energy)
        assert_close(-torch.stack(found[2:4], dim=1), prediction.forces)
