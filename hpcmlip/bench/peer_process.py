"""`peers.py` running in another Python, asked for its steps through a pipe."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np

from hpcmlip.bench import peers
from hpcmlip.bench.stepping import ELEMENTS
from hpcmlip.errors import ConfigError, RunError


class PeerProcess:
    """One peer on molecules [B, N], [B, N, 3] Å. Raises ConfigError if that Python does not have it."""

    def __init__(self, python: Path, name: str, numbers: np.ndarray, pos: np.ndarray, threads: int, device: str):
        self.name, self.bytes = name, 0
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        try:
            self._process = subprocess.Popen(
                [str(python), peers.__file__, name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise ConfigError(f"--peers: {python} does not start ({error.strerror}): give a Python") from None
        species = np.searchsorted(ELEMENTS, numbers)
        given = {"species": species.tolist(), "pos": pos.tolist(), "threads": threads, "device": device}
        said = self._ask(json.dumps(given))
        if "missing" in said:
            self.close()
            raise ConfigError(f"--peers: {python} has no {name} ({said['missing']}): install it there")
        self.parameters, self.version = said["parameters"], said["version"]

    def step(self, count: int) -> float:
        """Seconds of a step on the first `count` molecules; `bytes` is then the growth of its memory so far."""
        said = self._ask(str(count))
        self.bytes = said["bytes"]
        return said["seconds"]

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, line: str) -> dict:
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (BrokenPipeError, ValueError):
            raise RunError(f"{self.name} gave no answer: start '{' '.join(self._process.args)}' by hand") from None
