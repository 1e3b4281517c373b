"""R4: a stop of any cause, at any moment, start-up included: exit 75, nothing lost, the same bits at the end."""

import signal
import threading
import time

import psutil
import pytest
from runs import Ended, RunDir, differences

from hpcmlip.training.stopping import SLACK_SECONDS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

CAUSES = ("deadline", "INT", "USR2", "STOP file", "TERM", "USR1")
YOUNG_SECONDS = 0.5
"""Of the processor: a rank may be killed by a signal while Python and the command line load; torch alone takes 2 s."""


class Send:
    """Sends a signal to some ranks, and remembers who did not catch it yet."""

    def __init__(self, number: signal.Signals, to: list[int]):
        self.number, self.to = number, to
        self.not_caught: list[float] = []
        """Seconds of the processor of those."""

    def __call__(self, ranks: list[psutil.Process]) -> None:
        for rank in (ranks[i] for i in self.to):
            with open(f"/proc/{rank.pid}/status") as status:
                caught = next(int(line.split()[1], 16) for line in status if line.startswith("SigCgt"))
            rank.send_signal(self.number)
            # INT is caught by Python itself at first, which then ends by it
            if self.number == signal.SIGINT or not caught >> (self.number - 1) & 1:
                times = rank.cpu_times()
                self.not_caught.append(times.user + times.system)


def complaints(ended: Ended, run_dir: RunDir) -> list[str]:
    """What is wrong about a run that was asked to stop and has not finished."""
    wrong = [] if ended.returncode == 75 else [f"exit code {ended.returncode}"]
    wrong += ["a traceback"] if "Traceback" in ended.output else []
    told = [line["step"] for line in run_dir.metrics("train")] if (run_dir.path / "metrics.jsonl").exists() else []
    saved = run_dir.steps()[-1] if run_dir.steps() else 0
    wrong += [f"{len(told)} steps made, checkpoint of step {saved}"] if (told or [0])[-1] != saved else []
    return wrong


@pytest.mark.fault("R4", sample=2, soak=20 * len(CAUSES))
def test_a_stop_loses_nothing(undisturbed, mpirun, tmp_path, record_property, draw):
    cause, moment = CAUSES[draw.number % len(CAUSES)], draw.rng.uniform(0, undisturbed.seconds)
    to = draw.rng.choice(([0], [1], [0, 1]))
    print(f"{cause} after {moment:.2f} s, signals to {to}")
    run_dir = RunDir(tmp_path / "run")
    arguments, not_caught = (2, "train", undisturbed.config, "--run-dir", run_dir.path), []
    if cause == "deadline":
        ended = mpirun(*arguments, env={"SLURM_JOB_END_TIME": str(round(time.time() + SLACK_SECONDS + moment))})
    elif cause == "STOP file":
        run_dir.path.mkdir()
        timer = threading.Timer(moment, (run_dir.path / "STOP").touch)
        timer.start()
        ended = mpirun(*arguments)
        timer.cancel()
    else:
        send = Send(signal.Signals[f"SIG{cause}"], to)
        ended = mpirun(*arguments, after=moment, act=send)
        not_caught = send.not_caught
    has_ended = (run_dir.path / "done.json").exists()
    if has_ended:
        assert ended.returncode == 0, ended.output
    elif ended.returncode != 75 and not_caught:
        assert max(not_caught) < YOUNG_SECONDS, ended.output
    else:
        assert not complaints(ended, run_dir), ended.output
    ended = mpirun(*arguments)
    assert ended.returncode == 0, ended.output
    assert not differences(run_dir, undisturbed.run_dir)


@pytest.mark.parametrize(
    "mechanism",
    [
        pytest.param("agreement", marks=pytest.mark.control("R4", broken="a rank leaves without telling the others")),
        pytest.param("saving", marks=pytest.mark.control("R4", broken="a rank leaves without a checkpoint")),
    ],
)
def test_the_check_sees_a_broken_protocol(write_run, mpirun, broken, tmp_path, mechanism):
    train = {"checkpoint_steps": 0, "log_seconds": 0.001}
    config = write_run(tmp_path, train=train, engine={"timeout_minutes": 0.2})
    run_dir = RunDir(tmp_path / "run")
    metrics = run_dir.path / "metrics.jsonl"
    to = [0, 1] if mechanism == "saving" else [1]
    ended = mpirun(
        *(2, "train", config, "--run-dir", run_dir.path),
        when=lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 3,
        act=Send(signal.SIGUSR1, to),
        program=broken(mechanism),
    )
    assert complaints(ended, run_dir), ended.output
