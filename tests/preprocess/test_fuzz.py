"""R9, of raw files: whatever an HDF5 file holds, it is read as it is or refused with a sentence.

Trees come from Hypothesis, byte edits from the seed; each is read in a child process under a time limit.
"""

import contextlib
import json
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import raw_files
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from hpcmlip.preprocess.files import digest

LIMIT = 60.0
"""Seconds for a file."""
CASES = {False: 40, True: 100}
"""Of a draw in `make test` and in a campaign."""


class Child:
    """A process that reads one file after another; a crash or a hang is an outcome of the file that caused it."""

    def __init__(self):
        self._process: subprocess.Popen | None = None

    def read(self, config: Path, source: Path) -> dict:
        if self._process is None:
            command = [sys.executable, str(Path(__file__).with_name("fuzz_child.py"))]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._process = subprocess.Popen(command, text=True, **pipes)
        with contextlib.suppress(BrokenPipeError):  # it is gone, and its output says so
            self._process.stdin.write(json.dumps([str(config), str(source)]) + "\n")
            self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], LIMIT)
        line = self._process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.close()
        return {"outcome": "crash" if ready else "hang"}

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    process = Child()
    yield process
    process.close()


# -------------------------------------------------------------------------------------------------------------- trees

TYPES = ("f4", "f8", "f2", ">f4", ">f8", "i1", "u1", "i4", ">i8", "S1", "S3", "?", "c8", "text", "f4", "f8")
KEYS = ("coordinates", "species", "energies", "forces", "smiles")
LETTERS = st.characters(exclude_characters="/\0", exclude_categories=["Cs"])
NAMES = st.sampled_from(KEYS) | st.text(LETTERS, min_size=1).filter(lambda name: name != ".")
SIZES = st.integers(0, 3)
RARELY = st.sampled_from([False] * 24 + [True])


@st.composite
def arrays(draw, key: str, N: int, R: int) -> np.ndarray:
    """Mostly what belongs under a key of N atoms and R conformations, sometimes anything."""
    right = {"coordinates": (R, N, 3), "forces": (R, N, 3), "species": (N,), "energies": (R,), "smiles": (R,)}
    shape = right.get(key, (R,))
    if draw(RARELY):
        shape = tuple(draw(st.lists(SIZES, max_size=4)))
    kind = {"species": "u1", "smiles": "S3"}.get(key, "f8")
    if draw(RARELY):
        kind = draw(st.sampled_from(TYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if kind == "text":
        return np.array([f"{x}" for x in rng.integers(0, 9, int(np.prod(shape)))], dtype=object).reshape(shape)
    values = rng.integers(0, 9, shape) if np.dtype(kind).kind in "iu" else rng.standard_normal(shape)
    if np.dtype(kind).kind == "f" and values.size and draw(st.booleans()):
        values.reshape(-1)[0] = draw(st.sampled_from([np.nan, np.inf, -np.inf, 1e300, 0.0]))
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(kind)


@st.composite
def groups(draw) -> dict[str, np.ndarray]:
    N, R = draw(st.integers(1, 4)), draw(SIZES)
    lacking = {draw(st.sampled_from(KEYS))} if draw(RARELY) else {"smiles"}
    found = {key: draw(arrays(key, N, R)) for key in KEYS if key not in lacking}
    return found | {name: draw(arrays(name, N, R)) for name in draw(st.lists(NAMES, max_size=2)) if name not in found}


TREES = st.dictionaries(NAMES, groups() | st.dictionaries(NAMES, groups(), max_size=2), max_size=3)


def write(path: Path, tree: dict) -> None:
    def fill(node, content: dict) -> None:
        for name, value in content.items():
            if isinstance(value, dict):
                fill(node.create_group(name), value)
            elif value.dtype == object:
                node.create_dataset(name, data=value, dtype=h5py.string_dtype())
            else:
                node[name] = value

    with h5py.File(path, "w") as file:
        fill(file, tree)


@pytest.mark.fault("R9", sample=1, soak=10)
def test_any_tree_is_read_as_it_is_or_refused(child, tmp_path, draw, record_property):
    level = {"x": {"energy": "energies", "forces": "forces"}}
    config = raw_files.write_config(tmp_path, "raw.h5", "ani1", levels=level, split={"by": "structure"})
    outcomes = Counter()

    @seed(draw.rng.randrange(2**32))
    @settings(max_examples=CASES[draw.is_soak], deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(TREES)
    def check(tree):
        write(tmp_path / "raw.h5", tree)
        answer = child.read(config, tmp_path / "raw.h5")
        outcomes[answer["outcome"]] += 1
        assert answer["outcome"] in ("ok", "error"), answer
        assert answer["outcome"] == "ok" or "raw.h5" in answer["text"], answer

    check()
    print(outcomes)
    record_property("outcomes", dict(outcomes))


# --------------------------------------------------------------------------------------------------------- byte edits


def edited(whole: bytes, rng) -> bytes:
    """A flipped bit, some bytes of noise, a cut, a hole: somewhere, half of them in the metadata at the beginning."""
    data = bytearray(whole)
    place = rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 4096))
    kind = rng.randrange(8)
    if kind < 5:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 5:
        data[place : place + 8] = rng.randbytes(8)
    elif kind == 6:
        del data[place:]
    else:
        del data[place : place + rng.randrange(1, 64)]
    return bytes(data)


def read_edited(child: Child, folder: Path, rng, cases: int, *, with_sha256: bool) -> Counter:
    """Outcomes of edits of two raw files, one compressed: those of `fuzz_child`, `sha256` where the hash refuses it."""
    outcomes = Counter()
    for write_raw, reader in ((raw_files.write_ani1, "ani1"), (raw_files.write_ani1x, "ani1x")):
        source = write_raw(folder / f"{reader}.h5", rows=6)
        config = raw_files.write_config(folder, source.name, reader, levels={"x": "dz"})
        whole, known, sound = source.read_bytes(), digest(source), child.read(config, source)
        assert sound["outcome"] == "ok", sound
        for _ in range(cases // 2):
            source.write_bytes(edited(whole, rng))
            answer = child.read(config, source)
            outcome = answer["outcome"]
            if outcome == "ok" and answer["numbers"] != sound["numbers"]:
                outcome = "sha256" if with_sha256 and digest(source) != known else "different"
            outcomes[outcome] += 1
            assert outcome != "error" or source.name in answer["text"], answer
            if outcome in ("escaped", "crash", "hang"):
                pytest.fail(f"{outcome}: {answer}, kept as {source}")
    return outcomes


@pytest.mark.fault("R9", sample=1, soak=10)
def test_an_edited_raw_file_is_read_as_it_was_or_refused(child, tmp_path, draw, record_property):
    outcomes = read_edited(child, tmp_path, draw.rng, CASES[draw.is_soak], with_sha256=True)
    record_property("outcomes", dict(outcomes))
    assert set(outcomes) <= {"ok", "error", "sha256"}


@pytest.mark.control("R9", broken="raw files without their sha256")
def test_wrong_numbers_of_raw_files_are_seen(child, tmp_path, draw):
    """HDF5 itself has no checksum here: what only the hash of the source tells."""
    assert read_edited(child, tmp_path, draw.rng, 60, with_sha256=False)["different"]


def test_a_crash_belongs_to_the_file_that_causes_it(child, tmp_path):
    """The parent sees the end of the child, and goes on with another."""
    source = raw_files.write_ani1(tmp_path / "raw.h5", rows=2)
    config = raw_files.write_config(tmp_path, source.name, "ani1", levels={"x": "dz"})
    assert child.read(config, source)["outcome"] == "ok"
    child._process.kill()
    child._process.stdin.write("")
    assert child.read(config, source)["outcome"] == "crash"
    assert child.read(config, source)["outcome"] == "ok"
