"""MACE's way of data, the peer of the data benchmarks: extxyz -> `mace_prepare_data` -> HDF5 data set -> loader."""

import json
import os
import subprocess
import time
from pathlib import Path

import ase
import ase.io
import h5py

from hpcmlip.bench import mace_loader
from hpcmlip.errors import ConfigError, RunError
from hpcmlip.units import HARTREE

_QUIET = {"PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}


def write_extxyz(raw: Path, path: Path, level: str, every: int) -> int:
    """Every `every`-th conformation of each group of a raw file in the ANI-1x layout; returns how many."""
    frames = []
    with h5py.File(raw) as file:
        for group in file.values():
            numbers, pos = group["atomic_numbers"][:], group["coordinates"][::every]
            energy, forces = (group[f"{level}.{kind}"][::every] * HARTREE for kind in ("energy", "forces"))
            for row in range(len(pos)):
                frame = ase.Atoms(numbers, pos[row])
                frame.info["REF_energy"] = energy[row]
                frame.arrays["REF_forces"] = forces[row]
                frames.append(frame)
    ase.io.write(path, frames, format="extxyz")
    return len(frames)


def prepare(python: Path, extxyz: Path, folder: Path, cutoff: float, processes: int) -> float:
    """Seconds of `mace_prepare_data`, start-up included. Raises ConfigError if that Python has none."""
    program = python.parent / "mace_prepare_data"
    keys = ("--energy_key", "REF_energy", "--forces_key", "REF_forces")
    out = ("--h5_prefix", f"{folder}/", "--work_dir", folder, "--num_process", processes, "--seed", 0)
    command = [program, "--train_file", extxyz, *keys, "--r_max", cutoff, "--valid_fraction", 0.1, *out]
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    try:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, env=os.environ | _QUIET, check=False
        )
    except OSError as error:
        raise ConfigError(f"--mace: {program} does not start ({error.strerror}): install mace-torch there") from None
    if done.returncode:
        raise RunError(f"mace_prepare_data failed: {done.stderr[-2000:]}")
    return time.perf_counter() - began


class Loader:
    """MACE's data set of `prepare` and its loader in the Python that has them, on one core."""

    def __init__(self, python: Path, folder: Path, cutoff: float, batch: int, core: int):
        self._process = subprocess.Popen(
            [str(python), mace_loader.__file__, str(folder / "train"), str(cutoff), str(batch), str(core)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | _QUIET | {"OMP_NUM_THREADS": "1"},
        )
        self.version = self._answer()["version"]

    def rate(self, seconds: float) -> float:
        """Structures a second in the next so many seconds of shuffled epochs."""
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        said = self._answer()
        return said["structures"] / said["seconds"]

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict:
        try:
            return json.loads(self._process.stdout.readline())
        except ValueError:
            raise RunError(f"MACE's loader gave no answer: start '{' '.join(self._process.args)}' by hand") from None
