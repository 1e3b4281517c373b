"""What a sweep by Optuna leaves behind."""

import json
from dataclasses import dataclass
from pathlib import Path

from runs import RunDir, differences

from hpcmlip.cluster import study, sweep, trials


@dataclass(frozen=True)
class Swept:
    """An experiment directory in which a sweep by Optuna has ended."""

    folder: Path
    seconds: float = 0.0

    def told(self) -> list[tuple]:
        """What Optuna knows of each trial."""
        section = sweep.load_sweep(self.folder / "sweep.yaml").optuna
        found = study.read(self.folder / trials.JOURNAL, section, "").trials
        return [(t.params, t.state.name, t.value, t.intermediate_values, t.system_attrs) for t in found]

    def runs(self) -> dict[str, RunDir]:
        return {path.name: RunDir(path) for path in sorted(self.folder.glob("t0*"))}

    def ends(self) -> dict[str, tuple]:
        done = {name: json.loads((run.path / "done.json").read_text()) for name, run in self.runs().items()}
        return {name: tuple(record[key] for key in ("state", "reason", "step")) for name, record in done.items()}


def unlike(found: Swept, expected: Swept) -> list[str]:
    """In what a sweep differs from another, bit for bit; empty where it does not."""
    different = [what for what in ("told", "ends") if getattr(found, what)() != getattr(expected, what)()]
    common = found.runs().keys() & expected.runs().keys()
    different += sorted(found.runs().keys() ^ expected.runs().keys())
    return different + [name for name in common if differences(found.runs()[name], expected.runs()[name])]
