"""How far the work is: a bar on a terminal, a plain line every ten seconds in a log file."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS = 10.0


class Lines:
    """Plain lines, at most one in ten seconds."""

    def __init__(self, console: Console, what: str, total: int):
        self.console, self.what, self.total = console, what, total
        self.done, self.start = 0, time.monotonic()
        self.last = self.start

    def advance(self, amount: int) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.last >= SECONDS:
            self.last = now
            rate = self.done / (now - self.start)
            left = (self.total - self.done) / max(rate, 1e-9)
            self.console.print(
                f"{self.what}: {self.done:,} of {self.total:,} structures, {rate:,.0f}/s, {left:.0f} s left"
            )


class Bar:
    def __init__(self, progress: Progress, what: str, total: int):
        self.progress, self.task = progress, progress.add_task(what, total=total)

    def advance(self, amount: int) -> None:
        self.progress.advance(self.task, amount)


@contextmanager
def progress(console: Console, what: str, total: int) -> Iterator[Lines | Bar]:
    """Something with `advance(structures)`."""
    if not console.is_terminal:
        yield Lines(console, what, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        yield Bar(bars, what, total)
