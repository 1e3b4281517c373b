"""Members without Slurm: one after another on this machine, then the evaluation."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hpcmlip.cluster import trials
from hpcmlip.cluster.experiment import Experiment, now
from hpcmlip.errors import EXIT_FAILED, EXIT_RESUMABLE, EXIT_USAGE
from hpcmlip.training import checkpoint
from hpcmlip.training.rundir import CHECKPOINTS

_VAIN_STARTS = 4
"""Starts of a trial in a row that may fail without a new checkpoint, as in slurm/train.sbatch."""


def train_command(experiment: Experiment, member: int, ranks: int) -> list[str]:
    """Command that trains a member on this machine."""
    arguments = ["train", str(experiment.config_file(member)), "--run-dir", str(experiment.run_dir(member))]
    return [*_launcher(ranks), *arguments]


def evaluate_command(experiment: Experiment, ranks: int) -> list[str]:
    """Command that evaluates the experiment on this machine."""
    evaluation = experiment.evaluation
    arguments = ["--data", str(evaluation.store), "--split", evaluation.split]
    arguments += ["--min-members", str(evaluation.min_members)]
    return [
        *_launcher(ranks),
        "evaluate",
        str(experiment.folder),
        *arguments,
        "--out",
        str(experiment.evaluation_folder),
    ]


def run(experiment: Experiment, members: Sequence[int], ranks: int, *, evaluate: bool) -> int:
    """Train these members and evaluate. Exit code: 0; 1 if a member or the evaluation failed; 75 if stopped."""
    failed = []
    for member in members:
        if experiment.growth:
            experiment = trials.advance(experiment.folder, member)
        name = experiment.name(member)
        print(f"== {name} of {experiment.size} ({ranks} process{'es' if ranks > 1 else ''})", flush=True)
        code = _train(experiment, member, ranks)
        if code == EXIT_RESUMABLE:
            _note(experiment, member, "stopped")
            print(f"== {name} stopped on request; the same command goes on from there", flush=True)
            return EXIT_RESUMABLE
        _note(experiment, member, f"failed with exit code {code}" if code else "finished")
        if code:
            failed.append(name)
            print(f"== {name} failed with exit code {code}; the others go on", flush=True)
    if evaluate and len(failed) < experiment.size:
        print("== evaluation", flush=True)
        code = _run(evaluate_command(experiment, ranks), ranks)
        if code == EXIT_RESUMABLE:
            return code
        failed += ["the evaluation"] if code else []
    if failed:
        print(f"hpcmlip: failed: {', '.join(failed)}", file=sys.stderr, flush=True)
    return EXIT_FAILED if failed else 0


def _train(experiment: Experiment, member: int, ranks: int) -> int:
    """Exit code of a member. A trial of a sweep by Optuna starts again after a failure: other trials are suggested from
    what becomes of it, and that should not be that a process was killed."""
    vain = 0
    while True:
        before = _newest(experiment, member)
        _note(experiment, member, "started")
        code = _run(train_command(experiment, member, ranks), ranks)
        vain = vain + 1 if _newest(experiment, member) == before else 0
        if code in (0, EXIT_RESUMABLE, EXIT_USAGE) or experiment.growth is None or vain == _VAIN_STARTS:
            return code
        print(f"== {experiment.name(member)} ended with exit code {code}; it starts again", flush=True)


def _newest(experiment: Experiment, member: int) -> int | None:
    """Step of the newest checkpoint."""
    return max(checkpoint.steps(experiment.run_dir(member) / CHECKPOINTS), default=None)


def _launcher(ranks: int) -> list[str]:
    if ranks == 1:
        return [sys.executable, "-m", "hpcmlip"]
    # a port that the system chooses; the loopback, because the name of a laptop need not resolve
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    return [sys.executable, "-m", "hpcmlip.cluster.torchrun", *rendezvous, f"--nproc-per-node={ranks}", "-m", "hpcmlip"]


def _run(command: Sequence[str], ranks: int) -> int:
    """Exit code of a command that shares our terminal. A stop signal is passed on and its end awaited."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    env = {"OMP_NUM_THREADS": threads, "PYTHONFAULTHANDLER": "1"} | os.environ
    # a session of its own: Ctrl-C in the terminal then comes once, through us
    process = subprocess.Popen(command, env=env, start_new_session=True)
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    stopped = []

    def pass_on(number, frame):
        # torchrun passes on INT and TERM only
        sent = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        stopped.append(sent)
        process.send_signal(sent)

    before = {number: signal.signal(number, pass_on) for number in signals}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # ended by our signal before training could listen to it: as good as stopped
    return EXIT_RESUMABLE if -code in stopped else code


def _note(experiment: Experiment, member: int, what: str) -> None:
    path: Path = experiment.history_file(member)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{now()} local-{os.getpid()}@{socket.gethostname()} {what}\n")
