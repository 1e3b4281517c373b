"""What a run tells: metrics.jsonl, TensorBoard, log.txt, and a bar on a terminal or a line now and then in a log."""

import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
_CONSOLE = Console(stderr=True)
"""One for the log and the bar, so that lines appear above the bar."""


def set_up_logging(run_dir: Path, rank: int) -> None:
    """Rank 0 logs to the terminal and to log.txt, the others only what is a warning or worse."""
    root = logging.getLogger("hpcmlip")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO)
    root.propagate = False
    if rank == 0 and sys.stderr.isatty():
        console: logging.Handler = RichHandler(console=_CONSOLE, show_path=False)
    else:
        console = logging.StreamHandler()
        console.setFormatter(logging.Formatter("%(asctime)s %(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    console.addFilter(lambda record: not getattr(record, "for_the_file", False))
    root.addHandler(console)
    if rank == 0:
        file = logging.FileHandler(run_dir / "log.txt", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        root.addHandler(file)


def note_failure(error: BaseException) -> None:
    """Leave in log.txt why the run failed; the command line says it on the terminal."""
    log.error("%s", str(error) or type(error).__name__, extra={"for_the_file": True})


def truncate_metrics(path: Path, *, step: int, validated_step: int) -> None:
    """Drop what was written after the step a run resumes from, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if values["step"] <= (validated_step if values["kind"] == "validation" else step):
            kept.append(line)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


class Reporter:
    """The reports of rank 0; on other ranks every method does nothing."""

    def __init__(self, run_dir: Path, *, enabled: bool, log_seconds: float, epochs: int, first_step: int):
        self._enabled, self._log_seconds, self._epochs = enabled, log_seconds, epochs
        self._bar: Progress | None = None
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # a second to import, on rank 0 only

        self._file = (run_dir / METRICS).open("a", encoding="utf-8")
        self._board = SummaryWriter(run_dir / "tensorboard", purge_step=first_step + 1)
        self._begun, self._epoch_begun = time.monotonic(), None
        self._logged = self._last = self._begun
        self._since: list[tuple[float, float, float]] = []
        if sys.stderr.isatty():
            # fits a terminal of 80 columns
            columns = (TextColumn("epoch"), MofNCompleteColumn(), BarColumn(10), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=_CONSOLE, transient=True)
            self._task = self._bar.add_task("", total=epochs)
            self._bar.start()

    def close(self) -> None:
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.stop()
        self._file.close()
        self._board.close()

    def flush(self) -> None:
        """Bring metrics to the disk, so that a checkpoint is never ahead of them."""
        if self._enabled:
            self._file.flush()

    def step(self, *, step: int, epoch: float, loss: float, lr: float, structures: float, waited: float) -> None:
        """A step is done: `epoch` with its fraction, `structures` of all ranks, `waited` seconds for data."""
        if not self._enabled:
            return
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._since.append((seconds, structures, waited))
        self._write(
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
        if now - self._logged >= self._log_seconds or self._bar is not None:
            self._say(now, step, epoch, loss, lr)

    def _say(self, now: float, step: int, epoch: float, loss: float, lr: float) -> None:
        seconds, structures, waited = (sum(column) for column in zip(*self._since, strict=True))
        speed, wait = structures / seconds, min(waited / seconds, 1.0)
        text = f"loss {loss:.4g}, lr {lr:.3g}, {speed:.0f} structures/s, data wait {wait:.0%}, {self._left(now, epoch)}"
        if self._bar is not None:
            short = f"loss {loss:.4g}  {speed:.0f}/s  wait {wait:.0%}  {self._left(now, epoch)}"
            self._bar.update(self._task, completed=int(epoch), description=short)
        if now - self._logged >= self._log_seconds:
            if self._bar is None:
                log.info("step %d, epoch %.2f of %d: %s", step, epoch, self._epochs, text)
            for name, value in (("loss", loss), ("lr", lr), ("structures_per_s", speed), ("data_wait", wait)):
                self._board.add_scalar(f"train/{name}", value, step)
            self._since.clear()
            self._logged = now
            self._file.flush()

    def _left(self, now: float, epoch: float) -> str:
        done = epoch - self._epoch_begun
        if done <= 0:
            return "time left unknown"
        seconds = (self._epochs - epoch) / done * (now - self._begun)
        return f"{seconds / 3600:.1f} h left" if seconds > 5400 else f"{seconds / 60:.1f} min left"

    def bad_step(self, *, step: int, epoch: int, sources: Sequence[str], count: int) -> None:
        """A step was skipped; `sources` are the structures with non-finite numbers, `count` of such steps so far."""
        if self._enabled:
            self._write(kind="bad_step", step=step, epoch=epoch, sources=list(sources))
            shown = ", ".join(sources) or "no single structure: the sums or the gradients overflow"
            log.warning("step %d skipped on all ranks, non-finite numbers (%d so far): %s", step, count, shown)

    def validation(self, *, step: int, epoch: int, objective: float, unit: str, levels: dict, is_best: bool) -> None:
        """The validation split was evaluated; `levels` as `errors.figures`."""
        if not self._enabled:
            return
        self._write(kind="validation", step=step, epoch=epoch, objective=objective, unit=unit, levels=levels)
        self._board.add_scalar("validation/objective", objective, step)
        parts = []
        for level, figures in levels.items():
            for prop, values in figures.items():
                self._board.add_scalar(f"validation/{level}/{prop}_rmse", values["rmse"], step)
                parts.append(f"{level} {prop} RMSE {values['rmse']:.4g} {values['unit']}")
        best = " (best)" if is_best else ""
        log.info("step %d, epoch %d: validation %.5g%s; %s", step, epoch, objective, best, ", ".join(parts))
        # the time of a validation is not that of the next step
        self._last = time.monotonic()

    def _write(self, **values) -> None:
        values["time"] = round(time.time(), 3)
        self._file.write(json.dumps(finite(values), allow_nan=False) + "\n")


def finite(value):
    """The same plain values with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
