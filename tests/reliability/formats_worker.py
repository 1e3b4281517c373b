"""`python formats_worker.py FOLDER`: every format that ASE reads, by itself and as `predict` reads it, under watch.

Of each format a file that ASE wrote, where it can, and one that holds its magic bytes and a pickle. Prints, as JSON,
what each did besides reading: {"alone": {format: events}, "predict": {format: events}}.
"""

import contextlib
import json
import os
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import ase.io
import payloads
from ase.build import molecule
from ase.constraints import FixAtoms
from ase.io.formats import ioformats

from hpcmlip.evaluation import prediction

EVENTS = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")


def files(folder: Path, name: str) -> list[Path]:
    """Under a name that belongs to the format."""
    known, found = ioformats[name], []
    folder.mkdir()
    endings = [f"x.{ending}" for ending in known.extensions] + [glob.replace("*", "") or "x" for glob in known.globs]
    magic = next((m.replace(b"*", b"\n", 1) for m in known.magic), b"")
    for number, ending in enumerate(endings or ["x"]):
        path = folder / f"a{number}" / ending.lstrip("/")
        path.parent.mkdir()
        path.write_bytes(magic + payloads.pickled(folder.parent / "it-ran"))
        found.append(path)
    own = folder / "own" / (endings or ["x"])[0]
    own.parent.mkdir()
    with contextlib.suppress(Exception):
        atoms = molecule("H2O", cell=[9, 9, 9], pbc=True)
        atoms.set_constraint(FixAtoms([0]))
        ase.io.write(own, atoms, format=name)
    return [*found, own] if own.is_file() else found


def main() -> None:
    folder = Path(sys.argv[1])
    seen: dict[str, dict[str, list[str]]] = {"alone": defaultdict(list), "predict": defaultdict(list)}
    now: list[list[str]] = []
    sys.addaudithook(lambda event, arguments: now[-1].append(event) if now and event in EVENTS else None)
    os.chdir(folder)
    warnings.simplefilter("ignore")
    for name in sorted(ioformats):
        paths = files(folder / f"f-{name}", name)
        for path in paths:
            now.append(seen["alone"][name])
            with contextlib.suppress(Exception):
                list(ase.io.iread(str(path), index=":", format=name))
            now.append(seen["predict"][name])
            with contextlib.suppress(Exception):
                list(prediction._readable(path))
            now.clear()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
