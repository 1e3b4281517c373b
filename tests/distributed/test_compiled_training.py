"""`engine.compile`: the same run but for rounding, which after a crash goes on like any other."""

import shutil

import pytest
from runs import RunDir, differences

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

MODEL = {"lmax": 0, "features": 4, "sensitivities": 6, "atom_layers": 0}


@pytest.fixture(scope="module")
def runs(write_run, mpirun, tmp_path_factory):
    """Finished runs: eager, compiled, and compiled from a copy of its directory in the first epoch."""
    folder = tmp_path_factory.mktemp("runs")
    eager, compiled, again = (RunDir(folder / name) for name in ("eager", "compiled", "again"))

    def train(run_dir: RunDir, *, is_compiled: bool, **options) -> None:
        config = write_run(folder / f"of_{run_dir.path.name}", model=MODEL, engine={"compile": is_compiled})
        ended = mpirun(1, "train", config, "--run-dir", run_dir.path, timeout=600, **options)
        assert ended.returncode == 0, ended.output

    train(eager, is_compiled=False)
    train(
        compiled,
        is_compiled=True,
        when=lambda: 3 in compiled.steps(),
        act=lambda _: shutil.copytree(compiled.path, again.path),
    )
    assert again.state()["progress"]["epoch"] == 0 and not (again.path / "done.json").exists()
    train(again, is_compiled=True)
    return eager, compiled, again


def test_a_crashed_run_goes_on_bitwise(runs):
    _, compiled, again = runs
    assert "going on from" in again.log()
    assert not differences(again, compiled)


def test_the_numbers_are_those_of_the_eager_run(runs):
    eager, compiled, _ = runs
    assert "compiled energies and forces" in compiled.log() and "compiled" not in eager.log()
    for kind, what in (("train", "loss"), ("validation", "objective")):
        expected, found = ([line[what] for line in run.metrics(kind)] for run in (eager, compiled))
        assert len(expected) > 1 and found == pytest.approx(expected, rel=1e-4)
        assert found != expected, "nothing was compiled"
