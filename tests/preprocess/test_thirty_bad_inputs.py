"""The thirty bad inputs of the reliability study, by number, through the real command line.

Each ends with one sentence that names file, place and remedy and with a documented exit code; or with the good rest in
a store and a report that lists exactly the bad rows; or, where the input is only odd, with a store that holds it all.
"""

import csv
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import edits
import h5py
import numpy as np
import pytest
import raw_files
from edits import change, component, delete, everywhere, molecule, replace, row
from in_process import execute

from hpcmlip import cli as command_line
from hpcmlip.data.store import MANIFEST, manifest_digest, open_store, read_manifest
from hpcmlip.preprocess import schedule
from hpcmlip.preprocess.files import entry

pytestmark = pytest.mark.timeout(60)

ROWS, ALL = 60, 240
"""Conformations of a molecule, and of the four of the sound file."""
OWN_LEVEL = "levels={x: {energy: wb97x_dz.energy, forces: wb97x_dz.forces}}"
"""Without isolated atoms."""


@dataclass(frozen=True)
class Case:
    number: int
    what: str
    spoil: object
    """An edit of the HDF5 file; bytes -> bytes of the file if `is_bytes`."""
    says: str = ""
    """Of the sentence that refuses it; of a warning, where it is taken."""
    bad: tuple[tuple[str, int, str], ...] = ()
    """(group, row, reason) of what is quarantined."""
    kept: int | None = None
    """Structures of the store; None: refused."""
    settings: tuple[str, ...] = ()
    is_bytes: bool = False


def refused(number: int, what: str, spoil, says: str, *settings: str) -> Case:
    return Case(number, what, spoil, says, settings=settings)


def file_of(number: int, what: str, make, says: str) -> Case:
    return Case(number, what, make, says, is_bytes=True)


def quarantined(number: int, what: str, name: str, make, reason: str) -> Case:
    """Row 7 of methane is bad."""
    return Case(number, what, row(f"C1H4/{name}", 7, make), bad=(("/C1H4", 7, reason),), kept=ALL - 1)


def taken(number: int, what: str, spoil, kept: int = ALL, says: str = "", *settings: str) -> Case:
    return Case(number, what, spoil, says, kept=kept, settings=settings)


def times(factor: float):
    return lambda x: x * factor


HARTREE_IN = {"eV": 27.211386, "kcal/mol": 627.5095}
CASES = [
    refused(1, "no groups", lambda file: [file.__delitem__(name) for name in list(file)], "no group with the key"),
    file_of(2, "zero bytes", lambda data: b"", "is empty; fetch it again"),
    file_of(3, "text", lambda data: b"H 0 0 0\n" * 99, "is no HDF5 file; fetch it again"),
    *(
        file_of(4, f"cut at {p} %", lambda data, p=p: data[: len(data) * p // 100], "truncated or damaged HDF5 file")
        for p in (10, 50, 99)
    ),
    file_of(5, "bit of the signature", lambda data: bytes([data[0] ^ 1]) + data[1:], "is no HDF5 file"),
    file_of(5, "bit of the superblock", lambda data: data[:8] + bytes([data[8] ^ 64]) + data[9:], "damaged HDF5 file"),
    refused(7, "no forces", delete("C1H4/wb97x_tz.forces"), "lacks the key 'wb97x_tz.forces', which level 'tz' needs"),
    refused(7, "no such key", lambda file: None, "did you mean 'wb97x_dz.energy'", "levels.x.energy=wb97_dz.energy"),
    refused(8, "no atoms", delete("C1H4/atomic_numbers"), "group /C1H4 lacks the key 'atomic_numbers'"),
    taken(9, "unknown keys", lambda file: file["H2O1"].create_dataset("unheard_of", data=np.zeros(3))),
    taken(
        9,
        "legacy keys",
        lambda file: [file[g].create_dataset("coordinatesHE", data=file[g]["coordinates"][:3]) for g in file],
        ALL,
        "high-energy conformations (coordinatesHE) are left out",
    ),
    taken(10, "a group without rows", molecule("none", [8, 1], rows=0)),
    refused(10, "no rows anywhere", edits.no_rows, "the sources hold no conformation"),
    refused(11, "no atoms in a molecule", replace("C1H4/atomic_numbers", lambda z: z[:0]), "with at least one atom"),
    taken(12, "single atoms", molecule("H", [1]), ALL + 2),
    taken(13, "a pair beyond the cutoff", molecule("far", [1, 1], spacing=30.0), ALL + 2),
    taken(14, "no CC label at all", everywhere("ccsd(t)_cbs.energy", times(np.nan))),
    refused(
        14,
        "no label at all",
        lambda file: [everywhere(f"{key}.energy", times(np.nan))(file) for key in ("wb97x_dz",)],
        "no conformation carries a label",
        "levels={dz: {energy: wb97x_dz.energy}}",
    ),
    quarantined(15, "one NaN component", "wb97x_dz.forces", component(np.nan), "dz forces partly NaN"),
    quarantined(16, "infinite energy", "wb97x_tz.energy", times(np.inf), "tz energy infinite"),
    quarantined(16, "infinite force", "wb97x_dz.forces", component(-np.inf), "dz forces infinite"),
    quarantined(17, "NaN coordinate", "coordinates", component(np.nan), "position not finite"),
    quarantined(18, "atoms on one place", "coordinates", lambda x: np.stack([x[0], x[0], *x[2:]]), "atoms too close"),
    *(
        refused(19, f"energies in {unit}, {known}", everywhere("wb97x_dz.energy", times(factor)), says, *settings)
        for unit, factor in HARTREE_IN.items()
        for known, says, settings in (
            ("atoms known", "eV an atom away from the isolated atoms", ()),
            ("atoms unknown", "give an H atom", (OWN_LEVEL,)),
        )
    ),
    refused(19, "one composition", edits.only_methane_in_ev, "times what all electrons of these atoms have", OWN_LEVEL),
    refused(20, "coordinates in bohr", everywhere("coordinates", times(1.8897)), "in another unit than Å (bohr would"),
    refused(20, "coordinates in nm", everywhere("coordinates", times(0.1)), "atoms too close"),
    refused(21, "gradients", everywhere("wb97x_dz.forces", times(-1)), "the forces of level 'dz' point uphill"),
    taken(22, "float32 energies", everywhere("wb97x_dz.energy", np.float32), ALL, "'wb97x_dz.energy' is float32"),
    taken(23, "big-endian", everywhere("coordinates", lambda x: x.astype(">f4"))),
    taken(23, "big-endian energies", everywhere("wb97x_dz.energy", lambda x: x.astype(">f8"))),
    refused(23, "float16", everywhere("coordinates", np.float16), "has the type float16, expected float32 or float64"),
    refused(23, "objects", everywhere("wb97x_dz.energy", lambda e: [str(x) for x in e]), "has the type object"),
    refused(23, "text", everywhere("wb97x_dz.energy", lambda e: np.full(len(e), b"x")), "has the type |S1, expected"),
    *(taken(24, f"atoms as {name}", everywhere("atomic_numbers", make)) for name, make in (
        ("|S1", raw_files.symbols),
        ("text", lambda z: [raw_files.SYMBOLS[int(n)] for n in z]),
        ("int8", np.int8),
        (">i4", lambda z: z.astype(">i4")),
    )),
    refused(24, "atoms per row", replace("C1H4/atomic_numbers", lambda z: np.tile(z, (ROWS, 1))), "shape (60, 5)"),
    refused(24, "atoms as floats", everywhere("atomic_numbers", np.float64), "expected atomic numbers or element"),
    *(refused(25, f"element {name}", replace("C1H4/atomic_numbers", make), told) for name, make, told in (
        ("17", lambda z: z * 0 + 17, "unknown element (Cl)"),
        ("0", lambda z: z * 0, "unknown element (0)"),
        ("-1", lambda z: z.astype(np.int8) * 0 - 1, "unknown element (-1)"),
        ("119", lambda z: z * 0 + 119, "unknown element (119)"),
        ("X", lambda z: np.full(len(z), b"X"), "unknown element (0)"),
    )),
    Case(25, "a little chlorine", molecule("HCl", [17, 1], rows=1), bad=(("/HCl", 0, "unknown element"),), kept=ALL),
    refused(26, "fewer atoms", replace("C1H4/atomic_numbers", lambda z: z[:3]), "(60, 5, 3), expected (Nc, 3, 3)"),
    refused(26, "fewer energies", replace("C1H4/wb97x_dz.energy", lambda e: e[:7]), "shape (7,), expected (60,)"),
    refused(26, "transposed", replace("C1H4/coordinates", lambda x: x.transpose(0, 2, 1)), "shape (60, 3, 5)"),
    taken(27, "duplicates", lambda file: file.copy("C1H4", "again"), ALL + ROWS, "60 structures repeat an earlier one"),
    taken(28, "a giant among small ones", molecule("giant", [1] * 5000, rows=1), ALL + 1),
    taken(29, "links and loops", edits.links),
    taken(29, "names", edits.odd_names),
    taken(29, "many tiny groups", edits.many_groups(500), ALL + 500),
    refused(29, "a bomb", edits.bomb, "claims to hold"),
]  # fmt: skip


@pytest.fixture
def hpcmlip(monkeypatch, capsys, caplog):
    """`hpcmlip(*arguments)` -> (exit code, stdout, stderr with log): the command line in this process, no workers."""

    class InProcess:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return execute

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(schedule, "executor", InProcess)
    monkeypatch.setattr(schedule, "warm_up", lambda: None)

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hpcmlip", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            command_line.main()
        out, err = capsys.readouterr()
        err, code = caplog.text + err, stop.value.code or 0
        assert "Traceback" not in out + err
        assert (code == 0) != any(line.startswith(("hpcmlip: ", "Usage: ")) for line in err.splitlines())
        return code, out, err

    return run


@pytest.fixture
def raw(tmp_path) -> Path:
    return raw_files.write_ani1x(tmp_path / "raw.h5", rows=ROWS)


@pytest.fixture
def config(raw, tmp_path) -> Path:
    return raw_files.write_config(tmp_path, raw.name, "ani1x", split={"by": "structure"})


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.number}-{case.what}")
def test_bad_input(case, raw, config, hpcmlip, tmp_path):
    if case.is_bytes:
        raw.write_bytes(case.spoil(raw.read_bytes()))
    else:
        change(raw, case.spoil)
    code, out, err = hpcmlip("shard", config, *case.settings)
    if case.kept is None:
        sentence = err.strip().splitlines()[-1]
        assert code == 1 and case.says in sentence, sentence
        assert "raw.h5" in sentence or "level" in sentence or case.number == 20, sentence
        assert not (tmp_path / "out.zarr").exists()
        return
    assert code == 0, err
    assert case.says in out + err
    store = open_store(tmp_path / "out.zarr")
    assert store.meta.num_structures == case.kept
    with open(store.path / "quarantine.csv", newline="") as file:
        listed = [(line["file"], line["group"], int(line["row"]), line["reason"]) for line in csv.DictReader(file)]
    assert listed == [("raw.h5", *entry) for entry in case.bad]
    assert hpcmlip("verify", store.path)[0] == 0
    if case.bad:
        assert f"{len(case.bad)} {case.bad[0][2]}" in out and "quarantine.csv" in out
        code, _, err = hpcmlip("shard", config, f"out={tmp_path / 'strict.zarr'}", "--on-bad", "fail")
        group, bad_row, reason = case.bad[0]
        assert code == 1 and f"raw.h5 {group} row {bad_row}: {reason}" in err
        assert (
            f"raw.h5,{group},{bad_row},{reason}"
            in Path(f"{tmp_path / 'strict.zarr'}.partial/quarantine.csv").read_text()
        )


def test_6_open_for_writing_elsewhere(raw, config, cli):
    """The lock is between processes."""
    with h5py.File(raw, "a"):
        finished = cli("shard", config, expect=1, timeout=60)
    assert f"{raw} is open for writing elsewhere; close it there first" in finished.stderr


def test_29_symbolic_links_that_lead_nowhere(raw, config, hpcmlip, tmp_path):
    (tmp_path / "loop.h5").symlink_to("loop.h5")
    code, _, err = hpcmlip("shard", config, f"sources=[{tmp_path / 'loop.h5'}]")
    assert code == 1 and "loop.h5" in err and "check 'sources'" in err


CONFIGS = {
    "misspelt key": (2, ["cutof=5"], "unknown key 'cutof' (did you mean 'cutoff'?"),
    "wrong type": (2, ["cutoff=long"], "cutoff: expected a number"),
    "negative cutoff": (2, ["cutoff=-1"], "cutoff: must be greater than 0"),
    "yes for text": (2, ["name=no"], "name: expected text (quote it"),
    "number as text": (2, ["cutoff='6.5'"], "cutoff: expected a number"),
    "unknown reader": (2, ["reader=ani2x"], "no reader named 'ani2x' (did you mean 'ani1x'?"),
    "unknown preset": (2, ["levels={x: ddz}"], "levels.x: the reader 'ani1x' has no preset 'ddz' (did you mean"),
    "unknown option": (2, ["options={high_energy: true}"], "options.high_energy: unknown to the reader 'ani1x'"),
    "fractions": (2, ["split.fractions=[0.8, 0.8, 0.1]"], "fractions must add up to 1"),
    "split": (2, ["split.by=moon"], "split.by: expected"),
    "elements": (2, ["elements=[H, Xx]"], "Xx"),
    "atomic energies": (2, ["levels={x: {energy: e, atomic_energies: {Qq: 1.0}}}"], "Qq"),
    "half of them": (2, ["levels={x: {energy: e, atomic_energies: {H: -0.5}}}"], "atomic_energies lacks C, N, O"),
    "not a number": (2, ["levels={x: {energy: e, atomic_energies: {H: .nan}}}"], "atomic_energies"),
    "nobody's home": (2, ["out=~nosuchuser/x.zarr"], "nobody's home directory"),
    "no sources": (2, ["sources=[]"], "sources: must not be empty"),
    "no pair": (2, ["cutoff"], "not of the form key=value"),
    "on_bad": (2, ["--on-bad", "skip"], "on-bad"),
    "absent source": (1, ["sources=[nothing_*.h5]"], "nothing_*.h5; check 'sources' of the config"),
    "sha256 of another file": (1, ["sha256={raw.h5: " + "ab" * 32 + "}"], "damaged or another version, fetch it again"),
    "sha256 of no source": (2, ["sha256={row.h5: " + "ab" * 32 + "}"], "sha256 names row.h5"),
}
"""Number 30, of DATA.yaml."""


@pytest.mark.parametrize("case", CONFIGS)
def test_30_wrong_settings(case, config, hpcmlip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, settings, says = CONFIGS[case]
    found, _, err = hpcmlip("shard", config, *settings)
    assert (found, says in err) == (code, True), err
    assert not (tmp_path / "out.zarr").exists() and (code == 1 or not (tmp_path / "out.zarr.partial").exists())


def test_30_a_store_of_another_cutoff(raw, config, hpcmlip):
    assert hpcmlip("shard", config)[0] == 0
    code, _, err = hpcmlip("shard", config, "cutoff=5")
    assert code == 2 and "was sharded with another config (cutoff was 6.5, is 5.0); choose another 'out'" in err


RUNS = {
    "misspelt key": (2, ["train.epoch=3"], "unknown key 'train.epoch' (did you mean 'epochs'?"),
    "wrong type": (2, ["optim.lr=fast"], "optim.lr: expected a number, got 'fast'"),
    "batch of 0": (2, ["data.pairs_per_batch=0"], "data.pairs_per_batch: must be greater than"),
    "negative cutoff": (2, ["model.cutoff=-1"], "model.cutoff: must be greater than 0"),
    "no run directory": (2, ["--run-dir", "STORE/manifest.json/run"], "give another --run-dir"),
    "no such level": (2, ["data.levels={ccc: E}"], "no level 'ccc' in"),
    "no such store": (1, ["data.stores=[absent.zarr]"], "there is no store at"),
    "future store": (1, ["data.stores=[FUTURE]"], "has schema 99, this hpcmlip reads up to 2: upgrade hpcmlip"),
}
"""Number 30, of RUN.yaml."""


def make_future_store(path: Path) -> None:
    """What a later version would leave: whole, with a schema of its own."""
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text.replace('"schema": 1', '"schema": 99'))
    files = read_manifest(path)["files"] | {"zarr.json": entry(path / "zarr.json")}
    (path / MANIFEST).write_text(json.dumps({"digest": manifest_digest(files), "files": files}))


@pytest.mark.parametrize("case", RUNS)
def test_30_wrong_runs(case, ab_initio_store, write_run, cli, tmp_path):
    code, settings, says = RUNS[case]
    future = tmp_path / "future.zarr"
    if case == "future store":
        make_future_store(Path(shutil.copytree(ab_initio_store, future)))
    settings = [text.replace("STORE", str(ab_initio_store)).replace("FUTURE", str(future)) for text in settings]
    finished = cli("train", write_run(tmp_path), *settings, expect=code, cwd=tmp_path, timeout=60)
    told = [line for line in finished.stderr.splitlines() if line.startswith("hpcmlip: ")]
    assert len(told) == 1 and says in told[0], finished.output
    assert "Traceback" not in finished.output


def test_30_two_levels_of_one_name(write_run, cli, tmp_path):
    config = write_run(tmp_path)
    config.write_text(config.read_text().replace("  levels:\n", "  levels:\n    cc: E\n"))
    assert "the key 'cc' stands there twice" in cli("train", config, expect=2, cwd=tmp_path).stderr


def test_every_number_is_there():
    special = {
        int(name.split("_")[1]) for name in globals() if name.startswith("test_") and name.split("_")[1].isdigit()
    }
    assert {case.number for case in CASES} | special == set(range(1, 31))
