"""R3: kill -9 of one rank at any moment, start-up included; the run goes on as if nothing had been."""

import signal

import pytest
from runs import RunDir, differences

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.mark.fault("R3", sample=2, soak=20)
def test_a_killed_rank_ends_all_and_the_run_goes_on_bitwise(undisturbed, mpirun, tmp_path, draw):
    rank, moment = draw.rng.randrange(2), draw.rng.uniform(0, undisturbed.seconds)
    print(f"kill -9 of rank {rank} after {moment:.2f} s")
    arguments = (2, "train", undisturbed.config, "--run-dir", tmp_path / "run")
    ended = mpirun(*arguments, after=moment, send=signal.SIGKILL, to=[rank])
    if ended.was_hit:
        # the signal may reach a process that has done all its work and is about to leave
        had_ended = (tmp_path / "run" / "done.json").exists()
        assert (ended.returncode != 0 or had_ended) and ended.seconds - moment < 30, ended.output
    ended = mpirun(*arguments)
    assert ended.returncode == 0, ended.output
    assert not differences(RunDir(tmp_path / "run"), undisturbed.run_dir)


@pytest.mark.parametrize(
    "mechanism",
    [
        pytest.param("moments", marks=pytest.mark.control("R3", broken="resume without the optimizer's moments")),
        pytest.param("position", marks=pytest.mark.control("R3", broken="resume at the start of the epoch")),
    ],
)
def test_the_comparison_sees_a_resume_that_forgets(undisturbed, mpirun, broken, tmp_path, mechanism):
    run_dir, arguments = RunDir(tmp_path / "run"), (2, "train", undisturbed.config, "--run-dir", tmp_path / "run")
    mpirun(*arguments, when=lambda: 3 in run_dir.steps(), send=signal.SIGKILL)
    ended = mpirun(*arguments, program=broken(mechanism))
    assert ended.returncode == 0, ended.output
    assert differences(run_dir, undisturbed.run_dir)
