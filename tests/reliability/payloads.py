"""Files that run code in whoever unpickles them: they leave a mark."""

import hashlib
import io
import json
import pickle
import zipfile
from pathlib import Path

import numcodecs
import numpy as np
import torch
import zarr

from hpcmlip.data import store as stores


class Mark:
    """Unpickling one creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def pickled(mark: Path) -> bytes:
    """What a file holds that was pickled by hand, as old model and checkpoint files were."""
    return pickle.dumps(Mark(mark))


def torch_file(mark: Path) -> bytes:
    """What `torch.save` writes: a zip file with a pickle in it."""
    file = io.BytesIO()
    torch.save({"weights": torch.ones(3), "epoch": Mark(mark)}, file)
    return file.getvalue()


def object_array(mark: Path) -> np.ndarray:
    """An array of Python objects, which numpy pickles."""
    array = np.empty(3, dtype=object)
    array[:] = [Mark(mark)] * 3
    return array


def npz(path: Path, arrays: dict[str, np.ndarray], mark: Path, name: str) -> Path:
    """An npz file in which the array `name` is one of Python objects."""
    np.savez(path, **(arrays | {name: object_array(mark)}))
    with zipfile.ZipFile(path) as file:
        assert f"{name}.npy" in file.namelist()
    return path


def yaml_tag(mark: Path) -> str:
    """A YAML value that calls a function in an unsafe loader."""
    return f"!!python/object/apply:builtins.open [{str(mark)!r}, w]"


def seal_store(store: Path) -> None:
    """Write the manifest that fits a store as it is now."""
    names = [path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file()]
    contents = {name: (store / name).read_bytes() for name in sorted(names) if name != stores.MANIFEST}
    files = {n: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items()}
    (store / stores.MANIFEST).write_text(json.dumps({"digest": stores.manifest_digest(files), "files": files}))


def compress_by_pickle(store: Path, mark: Path) -> None:
    """Two arrays of each group become zarr v2 compressed by `pickle`, in metadata that zarr reads as those of v3.

    zarr refuses pickle for numbers and for objects, but takes it behind the filter of strings.
    """
    root = json.loads((store / "zarr.json").read_text())
    arrays = root["consolidated_metadata"]["metadata"]
    for name, values in arrays.items():
        if name.rpartition("/")[2] not in ("molecule", "energy"):
            continue
        shape, content = values["shape"], numcodecs.Pickle().encode(object_array(mark))
        arrays[name] = {
            **{"zarr_format": 2, "shape": shape, "chunks": shape, "dtype": "|O", "fill_value": "", "order": "C"},
            **{
                "compressor": {"id": "pickle"},
                "filters": [{"id": "vlen-utf8"}],
                "dimension_separator": ".",
                "attributes": {},
            },
        }
        (store / name / ".".join("0" for _ in shape)).write_bytes(content)
    (store / "zarr.json").write_text(json.dumps(root))
    seal_store(store)


def zarr_v2(path: Path, mark: Path) -> None:
    """A zarr v2 group whose array `energy` is compressed by pickle."""
    group = zarr.open_group(path, mode="w", zarr_format=2)
    group.create_array("energy", shape=(3,), chunks=(3,), dtype="float64", filters=None, compressors=None)
    metadata = json.loads((path / "energy" / ".zarray").read_text())
    metadata |= {"dtype": "|O", "fill_value": "", "filters": [{"id": "vlen-utf8"}], "compressor": {"id": "pickle"}}
    (path / "energy" / ".zarray").write_text(json.dumps(metadata))
    (path / "energy" / "0").write_bytes(numcodecs.Pickle().encode(object_array(mark)))
