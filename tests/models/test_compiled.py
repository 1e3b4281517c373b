"""What the compiler must not get away with."""

import pytest
import torch
from molecules import batch, real
from torch import Tensor, nn

from hpcmlip.config import RunConfig, load
from hpcmlip.errors import ConfigError
from hpcmlip.graph import DenseTopology
from hpcmlip.models.compiled import Compiled


class Net(nn.Module):
    """A minimal network of atomic energies."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, species: Tensor, graph) -> Tensor:
        near = torch.exp(-self.weight * graph.dist.square()) * graph.mask
        return self.scale(species) * near.sum(dim=1)[:, None, None]

    def scale(self, species: Tensor) -> float | Tensor:
        return 1.0


class OfOneSize(Net):
    """It takes the number of atoms of the example for its own."""

    def scale(self, species):
        return float(len(species))


class Hiding(Net):
    """It has no derivative where the eager one has one: a detach of its own is lost."""

    def scale(self, species):
        return 1.0 + self.weight.detach()


class Looking(Net):
    """It looks at its values."""

    def scale(self, species):
        return float(species.sum())


def call(net: nn.Module) -> tuple[Tensor, ...]:
    molecules = batch(real("C2H6O1", slice(0, 3)))
    compiled = Compiled(net.double(), 6.5, 4)
    return compiled(molecules.species, molecules.pos, molecules.topology, (0,))


def test_a_network_that_is_not_the_compiled_one_is_refused():
    with pytest.raises(ConfigError, match=r"the compiled model differs from the eager one by .*; set it to false"):
        call(Hiding())


@pytest.mark.parametrize("net", [OfOneSize, Looking])
def test_a_network_that_cannot_be_compiled_is_refused(net):
    with pytest.raises(ConfigError, match=r"engine.compile: .*; set it to false"):
        call(net())


def test_single_molecules_and_lists_stay_eager():
    assert Compiled.takes(DenseTopology(2, 3))
    assert not Compiled.takes(DenseTopology(1, 3)) and not Compiled.takes(DenseTopology(2, 1))
    assert not Compiled.takes(batch(real("C2H6O1", slice(0, 3)), reach=7.0).topology)


def test_a_run_without_anything_to_compile_is_refused(write_run, tmp_path):
    config = write_run(tmp_path, engine={"compile": True})
    assert load(RunConfig, config).engine.compile
    with pytest.raises(ConfigError, match=r"engine.compile is true, but model 'ani' is not compiled: how many"):
        load(RunConfig, config, ["model={kind: ani}"])
    with pytest.raises(ConfigError, match=r"engine.compile is true, but no level in data.levels has forces"):
        load(RunConfig, config, ["data.levels={cc: E}"])
