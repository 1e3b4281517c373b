"""What a training run leaves in its directory, read back for comparison."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch


@dataclass(frozen=True)
class RunDir:
    """What a run left behind."""

    path: Path

    def steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step_")) for path in (self.path / "checkpoints").glob("step_*"))

    def state(self) -> dict:
        """JSON state of the newest checkpoint."""
        return json.loads((self.path / "checkpoints" / f"step_{self.steps()[-1]:08d}" / "state.json").read_text())

    def tensors(self) -> dict:
        """{(file, parameter): tensor} of the newest checkpoint."""
        folder = self.path / "checkpoints" / f"step_{self.steps()[-1]:08d}"
        files = {path.stem: safetensors.torch.load_file(path) for path in folder.glob("*.safetensors")}
        return {(stem, name): tensor for stem, group in files.items() for name, tensor in group.items()}

    def metrics(self, kind: str) -> list[dict]:
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["kind"] == kind]

    def model_hash(self) -> str:
        return hashlib.sha256((self.path / "model.safetensors").read_bytes()).hexdigest()

    def log(self) -> str:
        return (self.path / "log.txt").read_text()
