"""Weights & Biases. Offline runs lie in RUN/wandb/, for `wandb sync`."""

import wandb

from hpcmlip.trackers import FINISHED, STOPPED, Run

COMPONENT = "Weights & Biases"


class Tracker:
    """A W&B run that every start of the run continues."""

    def __init__(self, run: Run):
        self._run = wandb.init(
            mode="offline" if run.server is None else "online",
            dir=".",
            project=run.project,
            group=run.group,
            name=run.name,
            id=run.id,
            resume="allow",
            config=run.config,
            settings=wandb.Settings(
                console="off", silent=True, **({} if run.server is None else {"base_url": run.server})
            ),
        )
        # not W&B's own counter, which cannot go back: steps after a checkpoint are made again, with the same figures
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, time: float, figures: dict[str, float]) -> None:
        self._run.log({"step": step, "time": time, **figures})

    def close(self, end: str) -> None:
        if end == STOPPED:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if end == FINISHED else 1)
