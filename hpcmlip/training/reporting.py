"""What a run tells while it goes on: metrics.jsonl, TensorBoard, a tracker; bars on a terminal, lines in a log."""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from hpcmlip.batch import AtomsBatch
from hpcmlip.config import RunConfig
from hpcmlip.progress import Bar, Lines, count, duration
from hpcmlip.trackers import FAILED
from hpcmlip.training.board import Board
from hpcmlip.training.metrics import METRICS, MetricsFile
from hpcmlip.training.run_log import CONSOLE
from hpcmlip.training.tracking import Tracking

log = logging.getLogger(__name__)

BOARD = "tensorboard"


class Reporter:
    """The reports of rank 0, while open; on other ranks every method does nothing.

    Only the record of the run matters: `failure` says that it cannot be written. All else warns once and is left out.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        *,
        enabled: bool,
        first_step: int,
        seconds_left: Callable[[], float | None],
    ):
        """`seconds_left`: until the job ends; None where nobody knows."""
        self._enabled, self._log_seconds, self._epochs = enabled, config.train.log_seconds, config.train.epochs
        self._end = FAILED
        if not enabled:
            return
        self._metrics = MetricsFile(run_dir / METRICS)
        self._board = Board(run_dir / BOARD, first_step=first_step)
        self._tracking = None if config.track is None else Tracking(config, run_dir)
        self._seconds_left = seconds_left
        self._begun, self._epoch_begun = time.monotonic(), None
        self._logged = self._last = self._begun
        self._since: list[tuple[float, float, float]] = []
        self._bars: Progress | None = None
        if sys.stderr.isatty():
            # fits a terminal of 80 columns
            columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(10))
            self._bars = Progress(*columns, TextColumn("{task.fields[figures]}"), console=CONSOLE, transient=True)
            self._task = self._bars.add_task("epoch", total=self._epochs, figures="")
            self._bars.start()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_) -> None:
        if not self._enabled:
            return
        if self._bars is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                self._bars.stop()
        self._metrics.close()
        self._board.close()
        if self._tracking is not None:
            self._tracking.close(self._end)

    def ends(self, end: str) -> None:
        """Say how this start of the run ends, if not by a failure (`hpcmlip.trackers`)."""
        self._end = end

    @property
    def failure(self) -> str | None:
        """Why the record of the run cannot be written, a sentence for the user; None on other ranks."""
        return self._metrics.failure if self._enabled else None

    def flush(self) -> None:
        """Bring the record to the disk, so that a checkpoint is never ahead of it. Raises RunError."""
        if self._enabled:
            self._metrics.flush()
            self._metrics.check()

    def step(self, *, step: int, epoch: float, loss: float, lr: float, structures: float, waited: float) -> None:
        """A step is done: `epoch` with its fraction, `structures` of all ranks, `waited` seconds for data."""
        if not self._enabled:
            return
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._since.append((seconds, structures, waited))
        self._metrics.add(
            kind="train",
            step=step,
            epoch=math.ceil(epoch) - 1,
            loss=loss,
            lr=lr,
            structures_per_s=round(structures / seconds, 1),
            data_wait=round(min(waited / seconds, 1.0), 4),
        )
        if self._epoch_begun is None:
            self._epoch_begun = epoch
        if now - self._logged >= self._log_seconds or self._bars is not None:
            self._say(now, step, epoch, loss, lr)

    def _say(self, now: float, step: int, epoch: float, loss: float, lr: float) -> None:
        seconds, structures, waited = (sum(column) for column in zip(*self._since, strict=True))
        speed, wait = structures / seconds, min(waited / seconds, 1.0)
        left, job = self._left(now, epoch), self._job_left()
        if self._bars is not None:
            short = f"loss {loss:.4g}  {speed:.0f}/s  wait {wait:.0%}  {left}{job and f' (job {job})'}"
            self._bars.update(self._task, completed=epoch, figures=short)
        if now - self._logged >= self._log_seconds:
            if self._bars is None:
                text = f"loss {loss:.4g}, lr {lr:.3g}, {speed:.0f} structures/s, data wait {wait:.0%}, {left}"
                text += job and f", job ends in {job}"
                log.info("step %d, epoch %.2f of %d: %s", step, epoch, self._epochs, text)
            self._figures(step, "train", {"loss": loss, "lr": lr, "structures_per_s": speed, "data_wait": wait})
            self._since.clear()
            self._logged = now
            self._metrics.flush()

    def _left(self, now: float, epoch: float) -> str:
        done = epoch - self._epoch_begun
        if done <= 0:
            return "time left unknown"
        return f"{duration((self._epochs - epoch) / done * (now - self._begun))} left"

    def _job_left(self) -> str:
        seconds = self._seconds_left()
        return "" if seconds is None else duration(seconds)

    def bad_step(self, *, step: int, epoch: int, sources: Sequence[str], count: int) -> None:
        """A step was skipped; `sources` are the structures with non-finite numbers, `count` of such steps so far."""
        if self._enabled:
            self._metrics.add(kind="bad_step", step=step, epoch=epoch, sources=list(sources))
            shown = ", ".join(sources) or "no single structure: the sums or the gradients overflow"
            log.warning("step %d skipped on all ranks, non-finite numbers (%d so far): %s", step, count, shown)

    def watch_validation(
        self, batches: Iterable[tuple[AtomsBatch, ...]], total: int
    ) -> Iterator[tuple[AtomsBatch, ...]]:
        """The same batches; shows how many of their `total` structures were evaluated."""
        if not self._enabled:
            yield from batches
            return
        what = "validation"
        shown: Bar | Lines = Lines(what, total, log.info, seconds=self._log_seconds)
        if self._bars is not None:
            shown = Bar(what, total, self._bars, figures="")
        try:
            yield from count(batches, shown, size=lambda blocks: sum(block.num_structures for block in blocks))
        finally:
            shown.close()

    def validation(self, *, step: int, epoch: int, objective: float, unit: str, levels: dict, is_best: bool) -> None:
        """The validation split was evaluated; `levels` as `errors.level_figures`."""
        if not self._enabled:
            return
        self._metrics.add(kind="validation", step=step, epoch=epoch, objective=objective, unit=unit, levels=levels)
        errors = [(level, prop, values) for level, found in levels.items() for prop, values in found.items()]
        figures = {f"{level}/{prop}_rmse": values["rmse"] for level, prop, values in errors}
        self._figures(step, "validation", {"objective": objective, **figures})
        parts = [f"{level} {prop} RMSE {values['rmse']:.4g} {values['unit']}" for level, prop, values in errors]
        best = " (best)" if is_best else ""
        # a person counts epochs from 1
        done = (step, epoch + 1, objective, best, ", ".join(parts))
        log.info("step %d, end of epoch %d: validation, objective %.5g%s; %s", *done)
        # the time of a validation is not that of the next step
        self._last = time.monotonic()

    def _figures(self, step: int, group: str, figures: dict[str, float]) -> None:
        figures = {f"{group}/{name}": value for name, value in figures.items()}
        self._board.log(step, figures)
        if self._tracking is not None:
            self._tracking.log(step, figures)
