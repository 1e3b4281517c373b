"""Copies of a run's figures in W&B or MLflow, made by a process of their own: `python -m hpcmlip.trackers`.

The tracker is a guest: what it imports, what it patches, how long a dead network keeps it and how it crashes stay in
that process. Training hands it lines of JSON through a pipe and looks no further (`training/tracking.py`). A module
here is a tracker if it sets `COMPONENT`; its `Tracker(run)` has `log(step, time, figures)` and `close(end)`.
"""

from dataclasses import dataclass

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
"""How a run may end, for this start of it."""


@dataclass(frozen=True)
class Run:
    """What a tracker is told of a run."""

    id: str
    """The same at every start of the run."""
    name: str
    group: str
    """Common to the members of an experiment."""
    project: str
    folder: str
    """The run directory."""
    server: str | None
    config: dict
    """Dotted key -> value."""
