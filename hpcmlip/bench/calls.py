"""How long the calls of a function take. Imports nothing that takes time to import: start-up is measured with it."""

import functools
import time
from collections.abc import Callable


def timed(owner, name: str, add: Callable[[float], None]) -> None:
    """From now on `add` gets the seconds of every call of a function or method `name` of `owner`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def measured(*args, **kwargs):
        begin = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            add(time.perf_counter() - begin)

    setattr(owner, name, measured)
