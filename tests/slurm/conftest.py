"""One private Slurm for all tests of this folder, and `submit` on it."""

import pytest
from private_slurm import PrivateSlurm, missing


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A running two-node Slurm (`PrivateSlurm`); skips where Slurm is not installed."""
    if missing():
        pytest.skip(missing())
    with PrivateSlurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def queue(slurm):
    """The private Slurm with an empty queue and idle nodes, before and after the test."""
    slurm.wait_idle(60)
    yield slurm
    for job in slurm.jobs():
        slurm.run("scancel", job.split()[0], check=False)
    slurm.wait_empty(60)
    slurm.wait_idle(60)
