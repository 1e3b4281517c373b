"""R23: the malicious files do run where something unpickles them, so that a file that did not run says something."""

import contextlib
import shutil
from pathlib import Path

import numcodecs.pickles
import numpy as np
import payloads
import pytest
import torch
import yaml
import zarr


def _torch(folder: Path, mark: Path) -> None:
    (folder / "x").write_bytes(payloads.torch_file(mark))
    torch.load(folder / "x", weights_only=False)


def _plain(folder: Path, mark: Path) -> None:
    (folder / "x").write_bytes(payloads.pickled(mark))
    with contextlib.suppress(RuntimeError):  # it runs, and then is no model
        torch.load(folder / "x", weights_only=False)


def _numpy(folder: Path, mark: Path) -> None:
    np.load(payloads.npz(folder / "x.npz", {}, mark, "z"), allow_pickle=True)["z"]


def _yaml(folder: Path, mark: Path) -> None:
    yaml.unsafe_load(payloads.yaml_tag(mark))


def _zarr(folder: Path, mark: Path) -> None:
    payloads.zarr_v2(folder / "v2", mark)
    with contextlib.suppress(TypeError, ValueError):  # it runs, and then is no array of this size
        zarr.open_group(folder / "v2", mode="r")["energy"][:]


def _zarr_in_store(folder: Path, mark: Path, store: Path) -> None:
    payloads.compress_by_pickle(store, mark)
    root = zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=True)
    with contextlib.suppress(TypeError, ValueError):
        next(group for _, group in root.groups())["energy"][:]


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(_torch, marks=pytest.mark.control("R23", broken="torch.load(weights_only=False)")),
        pytest.param(_plain, marks=pytest.mark.control("R23", broken="the same, of a plain pickle")),
        pytest.param(_numpy, marks=pytest.mark.control("R23", broken="np.load(allow_pickle=True)")),
        pytest.param(_yaml, marks=pytest.mark.control("R23", broken="yaml.unsafe_load")),
        pytest.param(_zarr, marks=pytest.mark.control("R23", broken="zarr v2 with filter pickle, read by zarr itself")),
    ],
)
def test_the_payload_runs(tmp_path, read, monkeypatch):
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    mark = tmp_path / "it-ran"
    read(tmp_path, mark)
    assert mark.exists()


@pytest.mark.control("R23", broken="arrays of a store are read without a look at their format")
def test_the_payload_in_a_store_runs(ab_initio_store, tmp_path, monkeypatch):
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    shutil.copytree(ab_initio_store, tmp_path / "store")
    mark = tmp_path / "it-ran"
    _zarr_in_store(tmp_path, mark, tmp_path / "store")
    assert mark.exists()
