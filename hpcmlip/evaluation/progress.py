"""Progress of an evaluation: a bar on a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

SECONDS_PER_LINE = 30.0

ItemT = TypeVar("ItemT")


def watch(items: Iterator[ItemT], total: int, *, size: Callable[[ItemT], int]) -> Iterator[ItemT]:
    """The same items; tells on stderr how many of `total` structures they hold so far."""
    console = Console(stderr=True)
    done, begin = 0, time.monotonic()
    told = begin
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("evaluating", total=total)
        for item in items:
            yield item
            done += size(item)
            bars.update(bar, completed=done)
            now = time.monotonic()
            if not console.is_terminal and now - told > SECONDS_PER_LINE:
                print(f"evaluated {done} of {total} structures, {done / (now - begin):.0f}/s", file=sys.stderr)
                told = now
