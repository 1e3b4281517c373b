"""How far long work is: a bar on a terminal, a plain line every ten seconds in a log."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS = 10.0
"""Between two lines of a log."""

ItemT = TypeVar("ItemT")


class Lines:
    """Plain lines through `say`, at most one in so many seconds."""

    def __init__(self, what: str, total: int, say: Callable[[str], None], *, seconds: float = SECONDS):
        self._what, self._total, self._say, self._seconds = what, total, say, seconds
        self._done, self._begun = 0, time.monotonic()
        self._told = self._begun

    def advance(self, structures: int) -> None:
        self._done += structures
        now = time.monotonic()
        if now - self._told >= self._seconds:
            self._told = now
            rate = self._done / (now - self._begun)
            left = (self._total - self._done) / max(rate, 1e-9)
            self._say(
                f"{self._what}: {self._done:,} of {self._total:,} structures, {rate:,.0f}/s, {duration(left)} left"
            )

    def close(self) -> None:
        """Lines stay."""


class Bar:
    """One more bar among those of `bars`; `fields` are what their columns ask for."""

    def __init__(self, what: str, total: int, bars: Progress, **fields):
        self._bars, self._task = bars, bars.add_task(what, total=total, **fields)

    def advance(self, structures: int) -> None:
        self._bars.advance(self._task, structures)

    def close(self) -> None:
        self._bars.remove_task(self._task)


@contextmanager
def progress(what: str, total: int, console: Console) -> Iterator[Lines | Bar]:
    """Something with `advance(structures)`."""
    if not console.is_terminal:
        yield Lines(what, total, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        yield Bar(what, total, bars)


def watch(
    items: Iterable[ItemT], what: str, total: int, console: Console, *, size: Callable[[ItemT], int]
) -> Iterator[ItemT]:
    """The same items; shows how many of `total` structures they hold so far, `size(item)` each."""
    with progress(what, total, console) as shown:
        yield from count(items, shown, size=size)


def count(items: Iterable[ItemT], shown: Lines | Bar, *, size: Callable[[ItemT], int]) -> Iterator[ItemT]:
    """The same items; each advances `shown` when the next one is asked for."""
    for item in items:
        yield item
        shown.advance(size(item))


def duration(seconds: float) -> str:
    """For people: 45 s, 12.5 min, 3.2 h, 4.1 d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(seconds, 0):.0f} s"
