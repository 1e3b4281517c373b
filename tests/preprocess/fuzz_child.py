"""Reads raw files, one a line of stdin, and answers each with a line of JSON: what came of it.

`{"outcome": "ok", "numbers": hash of all that was read}`, `{"outcome": "error", "text": ...}` for what a user would be
told, `{"outcome": "escaped", ...}` for any other exception, `{"outcome": "different", ...}` where what was read is not
what h5py finds in the file. A crash or a hang is the parent's to see.
"""

import hashlib
import json
import logging
import sys
from pathlib import Path

import h5py
import numpy as np

from hpcmlip import plugins
from hpcmlip.config import load
from hpcmlip.errors import UserError
from hpcmlip.preprocess import fingerprints
from hpcmlip.preprocess.checks import judge
from hpcmlip.preprocess.config import DataConfig
from hpcmlip.preprocess.job import make
from hpcmlip.units import HARTREE


def read(config: Path, source: Path) -> dict:
    numbers = hashlib.sha256()
    job = make(load(DataConfig, config, [f"sources=['{source}']"]))
    with job.open(0) as file:
        for group in (group for group in file.groups() if group.rows):
            rows = file.read(group, 0, group.rows)
            judge(rows, job)
            for values in (rows.numbers, rows.pos, rows.energy, rows.forces, fingerprints.of(rows)):
                numbers.update(np.ascontiguousarray(values).tobytes())
            numbers.update("\n".join(rows.molecule.tolist()).encode())
            if not same(source, group.path, rows.pos, rows.energy[:, 0]):
                return {"outcome": "different", "text": group.path}
    return {"outcome": "ok", "numbers": numbers.hexdigest()}


def same(source: Path, group: str, pos: np.ndarray, energy: np.ndarray) -> bool:
    """Are these the numbers of the group?"""
    with h5py.File(source) as file:
        node = file[group]
        key = "energies" if "energies" in node else "wb97x_dz.energy"
        wanted = node["coordinates"][()].astype(np.float32), node[key][()].astype(np.float64).reshape(-1) * HARTREE
    return np.array_equal(pos, wanted[0], equal_nan=True) and np.array_equal(energy, wanted[1], equal_nan=True)


def main() -> None:
    logging.disable()
    assert plugins.names("preprocess.readers")
    for line in sys.stdin:
        config, source = map(Path, json.loads(line))
        try:
            answer = read(config, source)
        except UserError as error:
            answer = {"outcome": "error", "text": str(error)}
        except Exception as error:  # what must not happen is what we are here to see
            answer = {"outcome": "escaped", "text": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
