"""`python checkpoint_kills.py FOLDER [MECHANISM]`: the writer of a checkpoint is killed, at each point in turn.

For each point, and for a new step as for one that is saved again, a child of this process writes the checkpoint and is
killed by SIGKILL; what a resume would take then is printed as one JSON line. MECHANISM: one of BROKEN.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from killing import at_points, kill_at

from hpcmlip import files
from hpcmlip.errors import RunError
from hpcmlip.sealing import seal
from hpcmlip.training import checkpoint

BEFORE = (3, 6)
"""Steps of the checkpoints that are there."""


def in_place() -> None:
    """Files are written where they stay."""

    def write(folder: Path, step: int, state: dict, tensors: checkpoint.Tensors) -> Path:
        final = folder / checkpoint.name(step)
        final.mkdir(parents=True, exist_ok=True)
        contents = {f"{stem}.safetensors": safetensors.torch.save(dict(group)) for stem, group in tensors.items()}
        contents[checkpoint.STATE] = json.dumps({"step": step, **state}).encode()
        for file, content in contents.items():
            files.write(final / file, content)
        manifest = seal({"files": checkpoint._entries(contents)}, checkpoint.SCHEMA)
        files.write(final / checkpoint.MANIFEST, manifest.encode())
        return final

    checkpoint.write = write


def unchecked() -> None:
    """Files are written where they stay, and read without the manifest."""
    in_place()

    def read(path: Path) -> checkpoint.Checkpoint:
        tensors = {file.stem: safetensors.torch.load_file(file) for file in path.glob("*.safetensors")}
        state = path / checkpoint.STATE
        return checkpoint.Checkpoint(path, json.loads(state.read_text()) if state.exists() else {}, tensors)

    checkpoint.read = read


def no_mending() -> None:
    """What was put aside is not looked for."""
    checkpoint.mend = lambda folder: None


BROKEN = {function.__name__: function for function in (in_place, unchecked, no_mending)}


def contents(mark: float) -> tuple[dict, dict]:
    tensors = {stem: {"a": torch.full((5, 7), mark)} for stem in ("master", "exp_avg", "exp_avg_sq")}
    return {"mark": mark}, tensors


def points(folder: Path, step: int) -> int:
    """How many points the writing of this step has."""
    if os.fork() == 0:
        at_points(lambda save, point, what: (folder / "points").write_text(str(point + 1)))
        write(folder, step)
        os._exit(0)
    os.wait()
    return int((folder / "points").read_text())


def write(folder: Path, step: int) -> None:
    checkpoint.write(folder, step, *contents(float(step) + 0.5))
    checkpoint.prune(folder, step, keep=2, best=None)


def taken(folder: Path) -> dict:
    """What a resume takes: step and mark, or why none."""
    try:
        checkpoint.mend(folder)
        found = checkpoint.newest(folder)
        marks = {float(value) for group in found.tensors.values() for value in group["a"].flatten()}
        return {"step": int(found.path.name.removeprefix("step_")), "marks": sorted(marks | {found.state["mark"]})}
    except (RunError, OSError, ValueError, KeyError, AttributeError, safetensors.SafetensorError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for step in BEFORE:
        checkpoint.write(folder, step, *contents(float(step)))
    return folder


def main(folder: Path, break_it: Callable[[], None]) -> None:
    for step in (9, BEFORE[-1]):
        fresh(folder)
        break_it()
        for point in range(points(folder, step)):
            fresh(folder)
            (folder / "said").touch()
            if os.fork() == 0:
                os.dup2(os.open(folder / "said", os.O_WRONLY), 1)
                kill_at(1, point)
                write(folder, step)
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.wait()[1])
            what = (folder / "said").read_text().strip()
            print(json.dumps({"written": step, "code": code, "what": what, **taken(folder)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), BROKEN[sys.argv[2]] if len(sys.argv) > 2 else lambda: None)
