"""R23: in the place of every file that a command reads lies one that runs code when it is unpickled. Nothing runs."""

import hashlib
import json
import logging
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import ase.io
import h5py
import numcodecs.pickles
import numpy as np
import payloads
import pytest
import yaml
from ase.build import molecule

from hpcmlip import cli
from hpcmlip.config import load
from hpcmlip.errors import StoppedError
from hpcmlip.preprocess import pipeline
from hpcmlip.preprocess.config import DataConfig
from hpcmlip.preprocess.job import make
from hpcmlip.sealing import seal
from hpcmlip.training import checkpoint, rundir

pytestmark = [pytest.mark.fault("R23", sample=1, soak=1), pytest.mark.distributed, pytest.mark.timeout(600)]

log = logging.getLogger("hpcmlip")

KINDS = {"pickle": payloads.pickled, "torch": payloads.torch_file}


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "it-ran"


@pytest.fixture
def refused(mark, monkeypatch, capfd):
    """`refused(*arguments, code=1, says=...)`: the command, in this process, ends so and nothing of the file ran."""

    def run(*arguments, code: int = 1, says: str = "") -> None:
        monkeypatch.setattr(sys, "argv", ["hpcmlip", *map(str, arguments)])
        capfd.readouterr()
        handlers, propagate = log.handlers[:], log.propagate
        with pytest.raises(SystemExit) as ended:
            cli.main()
        log.handlers[:], log.propagate = handlers, propagate  # training sets its own for good
        said = " ".join("".join(capfd.readouterr()).split())
        assert (ended.value.code or 0) == code, said
        assert re.search(says, said) and "Traceback" not in said, said
        assert not mark.exists(), f"it ran: {said}"

    return run


@dataclass(frozen=True)
class Place:
    """A finished run of the experiment's only member, and the store that it was trained on."""

    config: Path
    experiment: Path
    store: Path

    @property
    def run(self) -> Path:
        return self.experiment / "member_00"


@pytest.fixture
def place(undisturbed, ab_initio_store, refused, tmp_path) -> Place:
    store, folder = tmp_path / "store.zarr", tmp_path / "e"
    shutil.copytree(ab_initio_store, store)
    values = yaml.safe_load(undisturbed.config.read_text())
    values["data"]["stores"] = [str(store)]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    refused("submit", tmp_path / "run.yaml", "--dry-run", "--run-dir", folder, code=0)
    shutil.rmtree(folder / "member_00")
    shutil.copytree(undisturbed.run_dir.path, folder / "member_00")
    shutil.copy(folder / "configs" / "member_00.yaml", folder / "member_00" / "config.yaml")
    ase.io.write(tmp_path / "in.xyz", molecule("H2O"))
    return Place(folder / "configs" / "member_00.yaml", folder, store)


# ------------------------------------------------------------------------------------------- models and checkpoints


@pytest.mark.parametrize("kind", KINDS)
def test_model_files(place, mark, refused, tmp_path, kind):
    for name, says in (("model.safetensors", "sha256 differs"), ("model.json", "no valid JSON")):
        whole = (place.run / name).read_bytes()
        (place.run / name).write_bytes(KINDS[kind](mark))
        refused("predict", place.run, tmp_path / "in.xyz", "-o", tmp_path / "out.xyz", says=says)
        refused("evaluate", place.run, "--data", place.store, "--out", tmp_path / "out", says=says)
        transfer = f"transfer={{model: {place.run}}}"
        refused("train", place.config, transfer, "--run-dir", tmp_path / f"new-{name}", says=says)
        (place.run / name).write_bytes(whole)
    # as one who can seal would do it
    payload = KINDS[kind](mark)
    card = json.loads((place.run / "model.json").read_text()) | {"weights_sha256": hashlib.sha256(payload).hexdigest()}
    del card["digest"]
    (place.run / "model.json").write_text(seal(card, card["schema"]))
    (place.run / "model.safetensors").write_bytes(payload)
    refused("predict", place.run, tmp_path / "in.xyz", "-o", tmp_path / "out.xyz", says="SafetensorError")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["master.safetensors", "exp_avg.safetensors", "state.json", "MANIFEST.json"])
def test_checkpoints(place, mark, refused, kind, name):
    (place.run / "done.json").unlink()
    folders = list((place.run / "checkpoints").iterdir())
    for folder in folders:
        (folder / name).write_bytes(KINDS[kind](mark))
    says = f"none of the {len(folders)} checkpoints"
    refused("train", place.config, "--run-dir", place.run, says=says)
    for folder in folders if name != "MANIFEST.json" else []:
        contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "MANIFEST.json"}
        entries = {n: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items()}
        (folder / "MANIFEST.json").write_text(seal({"files": entries}, checkpoint.SCHEMA))
    refused("train", place.config, "--run-dir", place.run, says=says)


def test_records_of_an_experiment(place, mark, refused, tmp_path):
    def replaced(path: Path, *commands: tuple) -> None:
        whole = path.read_bytes() if path.exists() else None
        path.write_bytes(payloads.pickled(mark))
        for command, code, says in commands:
            refused(*command, code=code, says=says)
        path.unlink() if whole is None else path.write_bytes(whole)

    train, status = ("train", place.config, "--run-dir", place.run), ("status", place.experiment)
    retry = ("submit", "--retry", place.experiment, "--dry-run")
    evaluate = ("evaluate", place.experiment, "--data", place.store, "--out", tmp_path / "out")
    done, says = place.run / rundir.DONE, "done.json cannot be read"
    # status shows the other members too
    replaced(done, ((*status, "--json"), 0, says), (retry, 1, says), (evaluate, 1, says), (train, 1, says))
    record = place.experiment / "experiment.json"
    replaced(record, (status, 1, "cannot be read"), (retry, 1, "cannot be read"), (("cancel", place.experiment), 1, ""))
    replaced(place.experiment / "jobs.json", (status, 1, "cannot be read"))
    # lines that are none do not count
    replaced(place.run / "metrics.jsonl", (status, 0, "1 of 1 members finished"))


def test_configs(place, mark, refused, tmp_path):
    def tagged(path: Path) -> Path:
        text = path.read_text() if path.exists() else ""
        path.write_text(f"{text}\nextra: {payloads.yaml_tag(mark)}\n")
        return path

    says = "is not valid YAML"
    refused("train", place.config, f"train.seed={payloads.yaml_tag(mark)}", code=2, says=says)
    (place.run / "done.json").unlink()
    tagged(place.run / "config.yaml")
    refused("train", place.config, "--run-dir", place.run, code=2, says=says)
    refused("submit", place.config, "--sweep", tagged(tmp_path / "sweep.yaml"), "--dry-run", code=2, says=says)
    site = tagged(tmp_path / "site.yaml")
    refused("submit", place.config, "--site", site, "--run-dir", tmp_path / "n", "--dry-run", code=2, says=says)
    refused("doctor", "--site", site, code=1, says=says)
    (place.run / rundir.LOCK).unlink()  # it names this process
    tagged(place.experiment / "site.yaml")
    refused("submit", "--retry", place.experiment, "--dry-run", code=2, says=says)
    tagged(place.experiment / "run.yaml")
    refused("status", place.experiment, code=2, says=says)
    refused("train", tagged(place.config), code=2, says=says)
    refused("shard", tagged(tmp_path / "data.yaml"), code=2, says=says)


# ------------------------------------------------------------------------------------------------------------ stores


def refused_by_all(refused, place: Place, out: Path, says: str) -> None:
    refused("verify", place.store, says=says)
    refused("inspect", place.store, says=says)
    refused("train", place.config, "--run-dir", out / "new", says=says)
    refused("evaluate", place.run, "--data", place.store, "--split", "train", "--out", out / "evaluation", says=says)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["manifest.json", "zarr.json"])
def test_metadata_of_a_store(place, mark, refused, tmp_path, kind, name):
    (place.store / name).write_bytes(KINDS[kind](mark))
    refused_by_all(refused, place, tmp_path, name)
    if name == "zarr.json":
        payloads.seal_store(place.store)
        refused_by_all(refused, place, tmp_path, "no hpcmlip store")


@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_a_store(place, mark, refused, tmp_path, kind):
    for path in [*place.store.glob("n*/molecule/c/0"), *place.store.glob("n*/energy/c/0/0")]:
        payload = KINDS[kind](mark)
        # as long as the shard was, so that it is read
        path.write_bytes(payload + bytes(max(0, path.stat().st_size - len(payload))))
    refused_by_all(refused, place, tmp_path, "damaged|bytes long")
    payloads.seal_store(place.store)
    refused_by_all(refused, place, tmp_path, "damaged")


def test_zarr_v2_inside_a_store(place, mark, refused, tmp_path, monkeypatch):
    # newer numcodecs have a second bolt
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    payloads.compress_by_pickle(place.store, mark)
    refused_by_all(refused, place, tmp_path, "is no zarr v3 array")


def test_zarr_v2_instead_of_a_store(place, mark, refused, tmp_path):
    shutil.rmtree(place.store)
    payloads.zarr_v2(place.store, mark)
    refused_by_all(refused, place, tmp_path, "no readable manifest.json")
    payloads.seal_store(place.store)
    refused_by_all(refused, place, tmp_path, "cannot read zarr.json")


# ----------------------------------------------------------------------------------------------- sharding, raw files


def data_yaml(folder: Path, source: Path, reader: str, **settings) -> Path:
    path = folder / "data.yaml"
    values = {"name": "d", "reader": reader, "sources": [str(source)], "out": "out.zarr", **settings}
    path.write_text(json.dumps(values | {"split": {"by": "structure"}}))
    return path


def test_an_unfinished_store(samples, mark, refused, tmp_path):
    """Receipts and arrays of an interrupted sharding are pickles: their work is done again."""
    levels = {"levels": {"dft": {"energy": "wb97x_dz.energy", "forces": "wb97x_dz.forces"}}}
    config = data_yaml(tmp_path, samples["ab_initio"], "ani1x", **levels)
    job = make(load(DataConfig, config))

    def execute(function, tasks, done) -> None:
        for number, task in enumerate(tasks):
            if (job.work / "write").is_dir() and number > 3:
                raise KeyboardInterrupt
            done(task, function(task))

    with pytest.raises(StoppedError, match="stopped"):
        pipeline.build(job, execute)
    files = [path for part in ("scan", "write") for path in (job.work / part).iterdir()]
    assert {path.suffix for path in files} == {".json", ".npz"}
    for path in files:
        path.write_bytes(payloads.pickled(mark))
    refused("shard", config, "--workers", 1, code=0, says="998")
    refused("verify", tmp_path / "out.zarr", code=0, says="is whole: 998 structures")


@pytest.mark.parametrize("key", ["z", "R", "E", "F", "r_unit", "lattice"])
def test_npz_with_objects(samples, mark, refused, tmp_path, key):
    arrays = {"z": np.array([8, 1, 1]), "R": np.zeros((3, 3, 3)), "E": np.zeros(3), "F": np.zeros((3, 3, 3))}
    source = payloads.npz(tmp_path / "raw.npz", arrays, mark, key)
    refused("shard", data_yaml(tmp_path, source, "md17"), "--workers", 1, says="raw.npz")
    source.write_bytes(payloads.pickled(mark))
    refused("shard", data_yaml(tmp_path, source, "md17"), "--workers", 1, says="is no npz file")


@pytest.mark.parametrize("key", ["atomic_numbers", "coordinates", "wb97x_dz.energy", "wb97x_dz.forces"])
@pytest.mark.parametrize("kind", ["opaque", "variable", "text"])
def test_hdf5_with_pickles(samples, mark, refused, tmp_path, key, kind):
    source = Path(shutil.copy(samples["ab_initio"], tmp_path / "raw.h5"))
    payload = payloads.pickled(mark)
    with h5py.File(source, "a") as file:
        for group in file.values():
            shape = group[key].shape
            del group[key]
            if kind == "opaque":
                group[key] = np.full(shape, np.void(payload))
            elif kind == "variable":
                data = group.create_dataset(key, shape, dtype=h5py.vlen_dtype(np.uint8))
                data[(0,) * len(shape)] = np.frombuffer(payload, np.uint8)
            else:
                group[key] = np.full(shape, payload.hex().encode(), dtype=h5py.string_dtype())
            group[key].attrs["payload"] = np.void(payload)
    levels = {"levels": {"dft": {"energy": "wb97x_dz.energy", "forces": "wb97x_dz.forces"}}}
    config = data_yaml(tmp_path, source, "ani1x", **levels)
    # objects in the place of elements are symbols of none
    refused("shard", config, "--workers", 1, says=f"'{key}'|unknown element")


def test_extended_xyz_with_odd_fields(mark, refused, tmp_path):
    atoms = molecule("H2O")
    lines = []
    for value in ("__import__('os').system", f'"{payloads.yaml_tag(mark)}"', '_JSON {"__ase_objtype__":"atoms"}'):
        lines.append(f"3\nProperties=species:S:1:pos:R:3:forces:R:3 energy=-2000.0 odd={value}\n")
        lines += [f"{s} {x} {y} {z} 0 0 0\n" for s, (x, y, z) in zip(atoms.symbols, atoms.positions, strict=True)]
    (tmp_path / "raw.xyz").write_text("".join(lines))
    # they mean nothing to the reader, so the frames are as good as without them
    refused("shard", data_yaml(tmp_path, tmp_path / "raw.xyz", "extxyz"), "--workers", 1, code=0, says="structures │ 3")


NAMES = (
    "in.xyz in.traj in.bundle in.py in.pckl in.npz in.db in.json in.gpw in.cell in.gz in OUTCAR postgres.xyz".split()
)


def test_structures_to_predict(place, mark, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        for make_payload in KINDS.values():
            Path(name).write_bytes(make_payload(mark))
            refused("predict", place.run, name, "-o", "out.xyz", says=name)
    bundle = tmp_path / "folder.bundle"
    bundle.mkdir()
    (bundle / "metadata.json").write_text('{"format": "BundleTrajectory", "version": 1, "backend": "pickle"}')
    (bundle / "frames").write_text("1")
    refused("predict", place.run, bundle, "-o", "out.xyz", says="there is no file")
    Path("in.cell").write_text("%BLOCK LATTICE_CART\n5 0 0\n0 5 0\n0 0 5\n%ENDBLOCK LATTICE_CART\n")
    refused("predict", place.run, "in.cell", "-o", "out.xyz", says="may run programs")
