"""Bad inputs through the real command: one clear sentence, exit code 1 or 2, no store, nothing to trust."""

import random
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import raw_files
from in_process import shard

from hpcmlip import plugins
from hpcmlip.errors import ConfigError, UserError
from hpcmlip.preprocess import schedule
from hpcmlip.preprocess.readers import RawLevel


@pytest.fixture
def refused(cli, tmp_path):
    """`refused(config, *overrides, code, says)`: the command ends with `code` and a sentence, and leaves no store."""

    def run(config, *overrides, code: int, says: str, env=None):
        finished = cli("shard", config, *overrides, "--workers", 1, expect=code, env=env)
        message = finished.stderr.strip().splitlines()[-1]
        assert message.startswith("hpcmlip: ") and "Traceback" not in finished.output
        assert says in message, message
        assert not (tmp_path / "out.zarr").is_dir()
        return message

    return run


@pytest.fixture
def raw(tmp_path) -> Path:
    return raw_files.write_ani1x(tmp_path / "raw.h5")


@pytest.fixture
def config(raw, tmp_path) -> Path:
    return raw_files.write_config(tmp_path, raw.name, "ani1x", split={"by": "structure"})


def change(path: Path, edit) -> None:
    with h5py.File(path, "a") as file:
        edit(file)


def replace(group: str, key: str, make):
    """An edit: the dataset `key` of `group` becomes make(values)."""

    def edit(file) -> None:
        values = make(file[group][key][()])
        del file[group][key]
        file[group][key] = values

    return edit


def delete(name: str):
    def edit(file) -> None:
        del file[name]

    return edit


CONTENTS = {
    "zero bytes": (lambda data: b"", "is empty"),
    "text": (lambda data: b"H 0 0 0\n" * 99, "is no HDF5 file"),
    "cut at 10 %": (lambda data: data[: len(data) // 10], "is a truncated or damaged HDF5 file"),
    "cut at 50 %": (lambda data: data[: len(data) // 2], "is a truncated or damaged HDF5 file"),
    "cut at 99 %": (lambda data: data[: len(data) * 99 // 100], "is a truncated or damaged HDF5 file"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_files_that_are_no_hdf5(case, raw, config, refused):
    make, says = CONTENTS[case]
    raw.write_bytes(make(raw.read_bytes()))
    assert "raw.h5" in refused(config, code=1, says=says)


def test_absent(raw, config, refused):
    raw.unlink()
    refused(config, code=1, says="there is no source file")
    refused(config, "sources=[nothing_*.h5]", code=1, says="nothing_*.h5")
    refused(config, f"sources=[{raw.parent}]", code=1, says="is no file")


EDITS = {
    "missing forces": (
        delete("C1H4/wb97x_tz.forces"),
        "group /C1H4 lacks the key 'wb97x_tz.forces', which level 'tz' needs",
    ),
    "missing atoms": (delete("C1H4/atomic_numbers"), "group /C1H4 lacks the key 'atomic_numbers'"),
    "no atoms": (
        replace("C1H4", "atomic_numbers", lambda z: z[:0]),
        "shape (0,), expected (Na,) with at least one atom",
    ),
    "atoms per row": (
        replace("C1H4", "atomic_numbers", lambda z: np.tile(z, (20, 1))),
        "'atomic_numbers' of group /C1H4 has the shape (20, 5)",
    ),
    "fewer atoms": (replace("C1H4", "atomic_numbers", lambda z: z[:3]), "shape (20, 5, 3), expected (Nc, 3, 3)"),
    "transposed": (
        replace("C1H4", "coordinates", lambda x: x.transpose(0, 2, 1)),
        "shape (20, 3, 5), expected (Nc, 5, 3)",
    ),
    "short energies": (
        replace("C1H4", "wb97x_dz.energy", lambda e: e[:7]),
        "'wb97x_dz.energy' of group /C1H4 has the shape (7,), expected (20,)",
    ),
    "half precision": (
        replace("C1H4", "coordinates", lambda x: x.astype(np.float16)),
        "'coordinates' of group /C1H4 has the type float16, expected float32 or float64",
    ),
    "energies as text": (
        replace("C1H4", "wb97x_dz.energy", lambda e: np.array([b"x"] * len(e))),
        "'wb97x_dz.energy' of group /C1H4 has the type |S1",
    ),
    "element 119": (replace("C1H4", "atomic_numbers", lambda z: z * 0 + 119), "unknown element (119)"),
    "element 0": (replace("C1H4", "atomic_numbers", lambda z: z * 0), "unknown element (0)"),
    "element -1": (replace("C1H4", "atomic_numbers", lambda z: z.astype(np.int8) * 0 - 1), "unknown element (-1)"),
    "element X": (replace("C1H4", "atomic_numbers", lambda z: np.array([b"X"] * len(z))), "unknown element (0)"),
    "no rows": (
        lambda file: [replace(g, k, lambda v: v[:0])(file) for g in file for k in file[g] if k != "atomic_numbers"],
        "the sources hold no conformation",
    ),
    "no groups": (
        lambda file: [file.__delitem__(name) for name in list(file)],
        "has no group with the key 'coordinates'",
    ),
    "no labels": (
        lambda file: [
            replace(g, k, lambda v: v * np.nan)(file) for g in file for k in file[g] if "energy" in k or "forces" in k
        ],
        "no conformation carries a label",
    ),
    "half the rows bad": (replace("C1H4", "coordinates", lambda x: x * np.nan), "20 of 80 conformations are bad"),
    "a group for an array": (
        lambda file: (delete("C1H4/coordinates")(file), file.create_group("C1H4/coordinates")),
        "'coordinates' of group /C1H4 is a group, expected an array",
    ),
}


@pytest.mark.parametrize("case", EDITS)
def test_files_with_the_wrong_contents(case, raw, config, refused):
    edit, says = EDITS[case]
    change(raw, edit)
    refused(config, code=1, says=says)


SETTINGS = {
    "misspelt key": ("cutof=5", "unknown key 'cutof' (did you mean 'cutoff'?"),
    "wrong type": ("cutoff=long", "cutoff: "),
    "number as text": ("cutoff='6.5'", "cutoff: "),
    "negative cutoff": ("cutoff=-1", "cutoff: "),
    "unknown reader": ("reader=ani2x", "no reader named 'ani2x' (did you mean 'ani1x'?"),
    "unknown preset": ("levels={x: ddz}", "levels.x: the reader 'ani1x' has no preset 'ddz' (did you mean"),
    "unknown option": ("options={high_energy: true}", "options.high_energy: unknown to the reader 'ani1x'"),
    "fractions": ("split.fractions=[0.8, 0.8, 0.1]", "fractions must add up to 1"),
    "split": ("split.by=moon", "split.by: "),
    "elements": ("elements=[H, Xx]", "Xx"),
    "atomic energies": ("levels={x: {energy: wb97x_dz.energy, atomic_energies: {Qq: 1.0}}}", "Qq"),
    "half of the atomic energies": (
        "levels={x: {energy: wb97x_dz.energy, atomic_energies: {H: -0.5, C: -37.8}}}",
        "levels.x.atomic_energies lacks N, O",
    ),
    "atomic energy that is no number": (
        "levels={x: {energy: wb97x_dz.energy, atomic_energies: {H: .nan, C: -37.8, N: -54.5, O: -75.0}}}",
        "atomic_energies",
    ),
    "nobody's home": ("out=~nosuchuser/x.zarr", "nobody's home directory"),
    "no sources": ("sources=[]", "sources"),
    "no pair": ("cutoff", "not of the form key=value"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_wrong_settings(case, config, refused):
    setting, says = SETTINGS[case]
    refused(config, setting, code=2, says=says)
    assert not Path(f"{config.parent / 'out.zarr'}.partial").exists()


def test_a_key_no_file_has(config, refused):
    message = refused(config, "levels={x: {energy: wb97_dz.energy}}", code=1, says="lacks the key 'wb97_dz.energy'")
    assert "did you mean 'wb97x_dz.energy'?" in message


def test_one_level_named_twice(config, refused):
    config.write_text(config.read_text()[:-1] + ', "levels": {"a": "dz", "a": "tz"}}')
    refused(config, code=2, says="the key 'a' stands there twice")


def test_no_yaml(config, refused, tmp_path):
    config.write_text("name: [")
    refused(config, code=2, says="is not valid YAML")
    refused(tmp_path / "absent.yaml", code=2, says="cannot read the config")


def test_out_is_something_else(config, refused, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "precious.txt").write_text("mine")
    refused(config, f"out={tmp_path / 'notes'}", code=2, says="exists and is no finished store")
    assert (tmp_path / "notes" / "precious.txt").read_text() == "mine"
    refused(config, f"out={tmp_path / 'notes/precious.txt/out.zarr'}", code=1, says="cannot write")


def test_open_for_writing_elsewhere(raw, config, refused):
    with h5py.File(raw, "a"):
        refused(config, code=1, says="is open for writing elsewhere")


def test_a_full_disk(config, cli, tmp_path):
    """A limit on the size of a file stands for the disk; given room again, the same command ends well."""
    import subprocess
    import sys

    command = f"ulimit -f 3; exec {sys.executable} -m hpcmlip shard '{config}' --workers 1"
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    assert "cannot write" in finished.stderr and "File too large" in finished.stderr
    assert not (tmp_path / "out.zarr").exists()
    cli("shard", config, "--workers", 1)
    cli("verify", tmp_path / "out.zarr")


def test_harmless_oddities(tmp_path):
    """An empty group, unknown keys, names beyond ASCII, a path with spaces, exact duplicates."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    raw = raw_files.write_ani1x(folder / "rohe Daten.h5")

    def edit(file) -> None:
        file.copy("C1H4", "Méthane ₄")
        file.copy("H2O1", "empty")
        for key in file["empty"]:
            if key != "atomic_numbers":
                replace("empty", key, lambda v: v[:0])(file)
        file["H2O1/unheard_of"] = np.zeros(3)

    change(raw, edit)
    store = shard(raw_files.write_config(folder, raw.name, "ani1x", split={"by": "structure"}))
    assert store.meta.num_structures == 5 * 20


def test_single_precision_energies_are_told(raw, config, caplog):
    change(raw, lambda file: [replace(g, "wb97x_dz.energy", lambda e: e.astype(np.float32))(file) for g in file])
    shard(config)
    assert "'wb97x_dz.energy' is float32" in caplog.text


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bits_end_in_a_sentence_or_nowhere(seed, tmp_path):
    """Whatever HDF5 makes of a damaged file, the reader raises nothing but errors for the user."""
    rng = random.Random(seed)
    whole = raw_files.write_ani1(tmp_path / "raw.h5", rows=30).read_bytes()
    reader = plugins.find("preprocess.readers", "ani1")
    levels, raised = (RawLevel("dz", reader.PRESETS["dz"]),), 0
    for i in range(100):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path = tmp_path / f"flipped{i}.h5"
        path.write_bytes(data)
        try:
            with reader.open_file(path, levels, {}) as file:
                for group in file.groups():
                    file.read(group, 0, group.rows)
        except UserError as error:
            raised += 1
            assert "flipped" in str(error)
        path.unlink()
    assert raised


def test_what_a_failed_run_leaves_is_not_taken_for_good(raw, config, cli, tmp_path):
    """First bad rows, then the mended file under the same name: the store is that of the mended file."""
    good = tmp_path / "good.h5"
    shutil.copy(raw, good)
    change(raw, replace("H2O1", "coordinates", lambda x: x * np.nan))
    cli("shard", config, "--workers", 1, expect=1)
    shutil.copy(good, raw)
    cli("shard", config, "--workers", 1)
    mended = (tmp_path / "out.zarr" / "manifest.json").read_bytes()
    fresh = shard(config, f"out={tmp_path / 'fresh.zarr'}")
    assert (fresh.path / "manifest.json").read_bytes() == mended


def test_the_slurm_scheduler_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(ConfigError, match="needs dask-jobqueue: pip install"), schedule.executor("slurm", 2):
        pass
