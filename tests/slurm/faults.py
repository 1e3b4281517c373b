"""What happens to jobs on a real cluster, at random: kill -9 of one of their processes, a requeue, a cancellation."""

import random
from pathlib import Path

import psutil
from experiments import Submitted

REQUEUE, CANCEL, KILL = "scontrol requeue", "scancel", "kill -9"
SQUEUE = ("squeue", "--noheader", "--all", "--array", "--states=RUNNING", "--format=%i")


def kill_one(queue, job: str, rng: random.Random) -> str | None:
    """kill -9 of one process of a job: a rank, srun, the batch shell, what suggests a trial; which of them, None where
    none is left."""
    kinds: dict[str, list[psutil.Process]] = {"a rank": [], "srun": [], "the batch shell": [], "a suggestion": []}
    for process in queue.processes(job):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if "SLURM_PROCID" in process.info["environ"] and "train" in words and "srun" not in words[0]:
            kinds["a rank"].append(process)
        elif words and Path(words[0]).name == "srun":
            kinds["srun"].append(process)
        elif any("slurm_script" in word for word in words):
            kinds["the batch shell"].append(process)
        elif "suggest" in words:
            kinds["a suggestion"].append(process)
    kind = rng.choice([kind for kind, found in kinds.items() if found] or [None])
    try:
        if kind is not None:
            rng.choice(kinds[kind]).kill()
    except psutil.NoSuchProcess:
        return None
    return kind


def inflict(queue, experiment: Submitted, rng: random.Random) -> str | None:
    """Something bad to one member that runs; what it was, None where none runs."""
    arrays = {job["id"] for job in experiment.jobs()}
    running = [task for task in queue.run(*SQUEUE).split() if task.split("_")[0] in arrays]
    if not running:
        return None
    task, what = rng.choice(running), rng.choice([REQUEUE, CANCEL, KILL, KILL])
    if what == KILL:
        victim = kill_one(queue, task, rng)
        return victim and f"{what} of {victim}"
    command = ["scontrol", "requeue", task] if what == REQUEUE else ["scancel", task]
    queue.run(*command, check=False)  # it may have ended since
    return what
