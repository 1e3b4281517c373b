"""A run that was stopped, killed and continued ends with the same bits as one that was left alone.

Two ranks, ZeRO 0, 1 and 2, averaged weights, warm-up. The run left alone is started by torchrun, the other by mpirun,
so that the launchers are compared too.
"""

import shutil
import signal

import pytest
from runs import RunDir, differences

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def left_alone(write_run, launch, tmp_path_factory):
    """stage -> RunDir of a run on two ranks under torchrun that nobody disturbed."""
    done = {}

    def run(stage: int) -> RunDir:
        if stage not in done:
            folder = tmp_path_factory.mktemp(f"alone{stage}")
            config = write_run(folder, engine={"zero_stage": stage})
            launch("-m", "hpcmlip", "train", config, "--run-dir", folder / "run")
            done[stage] = RunDir(folder / "run")
        return done[stage]

    return run


@pytest.fixture(scope="module")
def stopped(write_run, mpirun, tmp_path_factory):
    """stage -> folder with run.yaml and a run/ that SIGUSR1 stopped in the middle of its first epoch."""
    done = {}

    def run(stage: int):
        if stage not in done:
            folder = tmp_path_factory.mktemp(f"stopped{stage}")
            config, run_dir = write_run(folder, engine={"zero_stage": stage}), RunDir(folder / "run")
            ended = mpirun(
                *(2, "train", config, "--run-dir", run_dir.path),
                when=lambda: 3 in run_dir.steps(),
                send=signal.SIGUSR1,
            )
            assert ended.returncode == 75, ended.output
            progress = run_dir.state()["progress"]
            assert progress["epoch"] == 0 and progress["validated_step"] == 0, "not stopped in mid-epoch"
            assert not (run_dir.path / "done.json").exists()
            done[stage] = folder
        return done[stage]

    return run


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_stopped_and_killed_and_continued_is_bitwise_the_same(stopped, left_alone, mpirun, stage):
    folder = stopped(stage)
    run_dir = RunDir(folder / "run")
    shutil.copytree(run_dir.path, folder / "again")
    again = RunDir(folder / "again")
    killed = mpirun(
        *(2, "train", folder / "run.yaml", "--run-dir", again.path),
        when=lambda: again.steps()[-1] >= 15,
        send=signal.SIGKILL,
    )
    assert killed.returncode != 0
    ended = mpirun(2, "train", folder / "run.yaml", "--run-dir", again.path)
    assert ended.returncode == 0, ended.output
    assert "going on from" in again.log()
    assert {stem for stem, _ in again.tensors()} == {"master", "exp_avg", "exp_avg_sq", "average"}
    assert not differences(again, left_alone(stage))


def test_a_finished_run_says_so_and_stays_as_it_is(left_alone, write_run, cli, tmp_path):
    run_dir = left_alone(1)
    before = run_dir.model_hash()
    config = write_run(tmp_path, engine={"zero_stage": 1})
    ended = cli("train", config, "--run-dir", run_dir.path)
    assert "finished already" in ended.stderr and run_dir.model_hash() == before
