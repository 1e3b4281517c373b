"""`python -m hpcmlip.bench.startup_run RUN.yaml RUN_DIR`: `hpcmlip train` to its first step, and what that took.

Prints a line of JSON: seconds of the phases, the modules that were loaded, and what was done to the files of the first
store (PEP 578 announces what is opened and listed; `os.stat` is counted by a wrapper).
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

from hpcmlip.bench.calls import timed

OPENED, LISTED, LOOKED_AT = "opened", "listed", "looked at"
_EVENTS = {"open": OPENED, "os.listdir": LISTED, "os.scandir": LISTED}


class Watch:
    """Times of functions, and uses of the files below a folder until `stop`."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()
        self.uses: dict[str, Counter[str]] = {OPENED: Counter(), LISTED: Counter(), LOOKED_AT: Counter()}
        self._folder: str | None = None
        self._stat = os.stat

    def files(self, folder: Path) -> None:
        """From now on."""
        self._folder = str(folder.absolute())
        sys.addaudithook(lambda event, arguments: event in _EVENTS and self._note(_EVENTS[event], arguments[0]))

        def counted(path, *args, **kwargs):
            self._note(LOOKED_AT, path)
            return self._stat(path, *args, **kwargs)

        os.stat = counted

    def stop(self) -> None:
        """An audit hook stays; it does nothing any more."""
        self._folder, os.stat = None, self._stat

    def _note(self, use: str, path) -> None:
        if self._folder and isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self._folder):
            self.uses[use][os.fspath(path)[len(self._folder) + 1 :]] += 1

    def time(self, owner, name: str, phase: str) -> None:
        """Add the time of the calls of a function to a phase."""

        def add(seconds: float) -> None:
            self.seconds[phase] += seconds

        timed(owner, name, add)


def main() -> None:
    """Run to the first step, print, end as a stopped run does."""
    run, run_dir = map(Path, sys.argv[1:])
    watch = Watch()
    from hpcmlip import dist
    from hpcmlip.config import RunConfig, load
    from hpcmlip.data.dataset import Dataset
    from hpcmlip.training import engine, loop
    from hpcmlip.training.stopping import Signals

    config, signals = load(RunConfig, run), Signals()
    began = time.perf_counter()
    watch.seconds["Python and imports"] = time.time() - psutil.Process().create_time()
    watch.files(config.data.stores[0])
    watch.time(dist, "start", "process group")
    watch.time(Dataset, "open", "data")
    watch.time(engine, "_import_deepspeed", "import of DeepSpeed")
    watch.time(engine, "_initialize", "engine")
    step = engine.Engine.step

    def first_step(self, *args):
        engine.Engine.step = step
        step_began = time.perf_counter()
        result = step(self, *args)
        now = time.perf_counter()
        watch.stop()
        watch.seconds["engine"] -= watch.seconds["import of DeepSpeed"]
        watch.seconds["first step"] = now - step_began
        phases = [phase for phase in watch.seconds if phase != "Python and imports"]
        watch.seconds["the rest"] = now - began - sum(watch.seconds[phase] for phase in phases)
        watch.seconds["imports to first step"] = now - began
        found = {"seconds": watch.seconds, "uses": watch.uses, "modules": sorted(sys.modules)}
        print(json.dumps(found), flush=True)
        signals.first = signal.SIGTERM
        return result

    engine.Engine.step = first_step
    sys.exit(loop.train(config, run_dir, signals))


if __name__ == "__main__":
    main()
