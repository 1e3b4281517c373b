"""Experiments that tests submit, and what these leave behind."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

JOB_SECONDS = 400
"""How long a test waits for the queue to become empty before it shows the logs and fails."""
TWO_NODES = {"nodes": 2, "tasks_per_node": 1, "time": "10", "throttle": 8, "warn_seconds": 30}
ONE_PROCESS = {"nodes": 1, "tasks_per_node": 1, "time": "10", "throttle": 8, "warn_seconds": 30}


def run_yaml(folder: Path, store: Path, **train) -> Path:
    """A RUN.yaml of a small multi-fidelity model; three steps an epoch."""
    values = {
        "name": "tiny",
        "data": {"stores": [str(store)], "levels": {"gfn1": "EF", "gfn2": "E"}, "pairs_per_batch": 40000},
        "model": {"kind": "hipnn", "lmax": 1, "features": 8, "interactions": 1, "cutoff": 6.5},
        "train": {"epochs": 2, "micro_batches_per_step": 2, "seed": 5} | train,
        "engine": {"device": "cpu"},
    }
    return write_yaml(folder / "run.yaml", values)


def write_yaml(path: Path, values: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


@dataclass(frozen=True)
class Submitted:
    """An experiment directory, or another folder with run directories."""

    folder: Path

    def jobs(self, kind: str = "train") -> list[dict]:
        path = self.folder / "jobs.json"
        jobs = json.loads(path.read_text())["jobs"] if path.exists() else []
        return [job for job in jobs if job["kind"] == kind]

    @property
    def array(self) -> str:
        """Id of the array submitted last."""
        return self.jobs()[-1]["id"]

    def history_file(self, member: str) -> Path:
        return self.folder / "slurm" / f"{member}.jobs"

    def history(self, member: str) -> list[tuple[str, str]]:
        """(job, what) of each thing that happened to a member."""
        path = self.history_file(member)
        return [tuple(line.split(" ", 2)[1:]) for line in path.read_text().splitlines()] if path.exists() else []

    def count(self, member: str, what: str) -> int:
        return sum(what in words for _, words in self.history(member))

    def weights(self, member: str) -> str:
        return hashlib.sha256((self.folder / member / "model.safetensors").read_bytes()).hexdigest()

    def steps(self, member: str) -> list[int]:
        """The record of training, step by step."""
        path = self.folder / member / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line["step"] for line in lines if line["kind"] == "train"]

    def has_begun(self, member: str) -> bool:
        path = self.folder / member / "metrics.jsonl"
        return path.exists() and path.stat().st_size > 0

    def metrics(self) -> dict:
        return json.loads((self.folder / "evaluation" / "metrics.json").read_text())

    def output(self) -> str:
        """What all jobs wrote."""
        return "\n".join(f"== {path}\n{path.read_text()}" for path in sorted((self.folder / "slurm").glob("*.out")))


def wait_until(is_true: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    """Return when it is; fails with `what()` where it never is."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, what()
        time.sleep(0.2)
