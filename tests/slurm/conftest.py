"""One private Slurm for all tests of a process, `submit` on it, and an ensemble that nobody disturbed."""

import fcntl

import pytest
from experiments import Submitted, run_yaml
from private_slurm import PrivateSlurm, missing

EPOCHS = 8


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


@pytest.fixture(scope="session")
def ensemble_run(xtb_store, tmp_path_factory):
    """RUN.yaml of the ensembles that are compared with `undisturbed_ensemble`."""
    return run_yaml(tmp_path_factory.mktemp("ensemble"), xtb_store, epochs=EPOCHS, log_seconds=0.05)


@pytest.fixture(scope="session")
def undisturbed_ensemble(ensemble_run, xtb_store, cli, tmp_path_factory, worker_id):
    """`undisturbed_ensemble(members)` -> Submitted: trained and evaluated by --local with two processes each, once for
    all processes that run tests side by side."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared if worker_id == "master" else shared.parent

    def make(members: int) -> Submitted:
        folder = shared / f"undisturbed-{members}"
        with (shared / f"undisturbed-{members}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            arguments = ["--members", members, "--evaluate", xtb_store, "--run-dir", folder]
            if not (folder / "evaluation" / "metrics.json").exists():
                cli("submit", ensemble_run, *arguments, "--local", "--ranks", 2, timeout=2000)
        return Submitted(folder)

    return make
