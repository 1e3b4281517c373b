"""`hpcmlip fetch`: the public raw files, resumed where an earlier attempt stopped, checked before they get their name.

pooch checks the sum and moves a file into place; `download.Resuming` brings the bytes.
"""

import contextlib
import json
import logging
import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pooch

from hpcmlip.errors import DataError
from hpcmlip.preprocess.download import RefusedError, Resuming

log = logging.getLogger(__name__)
pooch.get_logger().setLevel(logging.WARNING)  # it would announce every step on stderr

RECORD = "checksums.json"
"""Written beside the files: name -> size, sha256 and address of what was fetched."""
PARTIAL = ".partial"
"""Folder of unfinished downloads, below the target folder."""


@dataclass(frozen=True)
class RemoteFile:
    """A public file."""

    name: str
    urls: tuple[str, ...]
    """Addresses of the same bytes, tried in turn."""
    page: str
    """Where a human finds it."""
    checksum: str | None = None
    """`md5:...` or `sha256:...` as published; None: none is published, the sum of the first download is recorded."""
    size: int | None = None
    """Bytes, where known."""
    members: tuple[str, ...] = ()
    """Of a tar archive: the files taken out of it, by base name; the archive is then removed."""

    @property
    def products(self) -> tuple[str, ...]:
        """What lies in the target folder in the end."""
        return self.members or (self.name,)


def _figshare(number: str) -> tuple[str, ...]:
    # figshare.com/ndownloader answers programs with an empty 202 (a browser challenge); these two hand the file over
    return (f"https://api.figshare.com/v2/file/download/{number}", f"https://ndownloader.figshare.com/files/{number}")


COMP6_COMMIT = "79f41c156f8e19506fe951b5513b98e7c534a503"
_COMP6 = {
    "ANI-MD": ("ani_md_bench.h5",),
    "DrugBank": ("drugbank_testset.h5",),
    "GDB07to09": ("gdb11_07_test500.h5", "gdb11_08_test500.h5", "gdb11_09_test500.h5"),
    "GDB10to13": ("gdb11_10_test500.h5", "gdb11_11_test500.h5", "gdb13_12_test1000.h5", "gdb13_13_test1000.h5"),
    "Tripeptides": ("tripeptide_full.h5",),
    "s66x8": ("s66x8_wb97x6-31gd.h5",),
}

DATASETS: dict[str, tuple[RemoteFile, ...]] = {
    # Smith, Isayev, Roitberg, Sci. Data 4, 170193 (2017)
    "ani-1": (
        RemoteFile(
            "ANI1_release.tar.gz",
            _figshare("9057631"),
            page="https://doi.org/10.6084/m9.figshare.5287732.v1",
            members=tuple(f"ani_gdb_s{heavy:02d}.h5" for heavy in range(1, 9)),
        ),
    ),
    # Smith et al., Sci. Data 7, 134 (2020); size and sum as figshare gives them for version 1 of the release
    "ani-1x": (
        RemoteFile(
            "ani1x-release.h5",
            _figshare("18112775"),
            page="https://doi.org/10.6084/m9.figshare.10047041.v1",
            checksum="md5:98090dd6679106da861f52bed825ffb7",
            size=5590846027,
        ),
    ),
    # Smith et al., J. Chem. Phys. 148, 241733 (2018); a fixed commit stands in for the sums that are not published
    "comp6": tuple(
        RemoteFile(
            name,
            (f"https://raw.githubusercontent.com/isayev/COMP6/{COMP6_COMMIT}/COMP6v1/{folder}/{name}",),
            page="https://github.com/isayev/COMP6",
        )
        for folder, names in _COMP6.items()
        for name in names
    ),
}


def fetch(dataset: str, to: Path) -> None:
    """Download the files of a data set into the folder `to`; what is there already, whole, is left alone.

    Raises DataError without network, when a server refuses, for a wrong checksum and when the disk is full.
    """
    to = Path(to)
    try:
        to.mkdir(parents=True, exist_ok=True)
        for file in DATASETS[dataset]:
            fetch_file(file, to)
        # another data set's download may lie there, unfinished or under way
        with contextlib.suppress(OSError):
            (to / PARTIAL).rmdir()
    except OSError as error:
        where = error.filename or to
        raise DataError(f"cannot write {where} ({error.strerror or error}); give another folder with --to") from None
    print(f"{dataset}: {sum(len(file.products) for file in DATASETS[dataset])} files in {to}")


def fetch_file(file: RemoteFile, to: Path, *, pause: float = 1.0) -> None:
    """Bring one file (or the members of one archive) into `to`; `pause`: seconds before a second try, doubling."""
    record = read_record(to)
    published = None if file.members else file.checksum
    if all(_is_whole(name, to, record, published) for name in file.products):
        print(f"{', '.join(file.products)}: there already")
        return
    partial = to / PARTIAL
    partial.mkdir(exist_ok=True)
    archive = Path(_retrieve(file, partial, pause))
    found = {name: archive for name in file.products}
    if file.members:
        found = _unpack(archive, file, partial)
    record = read_record(to)  # again: another fetch may have added to it since
    for name, path in found.items():
        record[name] = {"size": path.stat().st_size, "sha256": pooch.file_hash(str(path)), "url": file.urls[0]}
        os.replace(path, to / name)
    _write_record(to, record)
    archive.unlink(missing_ok=True)


def _retrieve(file: RemoteFile, partial: Path, pause: float) -> str:
    part = partial / f"{file.name}.part"
    downloader = Resuming(part, size=file.size, pause=pause)
    problems = []
    for url in file.urls:
        try:
            path = pooch.retrieve(url, file.checksum, fname=file.name, path=partial, downloader=downloader)
        except RefusedError as error:
            problems.append(f"{url}: {error}")
            continue
        except ValueError:  # pooch: the checksum differs
            problems.append(f"{url}: the file does not have the published checksum {file.checksum} and was removed")
            part.unlink(missing_ok=True)
            continue
        part.unlink(missing_ok=True)
        return path
    raise DataError(
        f"cannot fetch {file.name} ({'; '.join(problems)}); run the same command again to go on where it stopped, "
        f"or download it by hand from {file.page} into {partial.parent}"
    )


def _unpack(archive: Path, file: RemoteFile, partial: Path) -> dict[str, Path]:
    """Members of a tar archive -> unfinished copies; nothing but the wanted names is ever written."""
    found: dict[str, Path] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name in file.members:
                    found[name] = partial / name
                    with tar.extractfile(member) as source, open(found[name], "wb") as target:
                        shutil.copyfileobj(source, target)
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        archive.unlink()
        raise DataError(
            f"{file.name} is no whole tar archive ({error}); it was removed, run the same command again"
        ) from None
    if missing := sorted(set(file.members) - set(found)):
        raise DataError(f"{archive} lacks {', '.join(missing)}; see {file.page}")
    return found


def _is_whole(name: str, to: Path, record: dict, checksum: str | None) -> bool:
    """Is the file there with the published sum, or else with the one recorded when it was first fetched?"""
    path = to / name
    if not path.is_file():
        return False
    known = checksum or (f"sha256:{record[name]['sha256']}" if name in record else None)
    if known is None:
        log.warning("%s is there, but nothing is known to check it against: taken as it is", path)
        return True
    algorithm, _, value = known.partition(":")
    if pooch.file_hash(str(path), alg=algorithm) == value:
        return True
    raise DataError(f"{path} does not have the checksum {known}: move it away and run the same command again")


def read_record(to: Path) -> dict[str, dict]:
    """What `checksums.json` says of the files fetched into this folder."""
    try:
        return json.loads((to / RECORD).read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise DataError(
            f"{to / RECORD} is damaged: remove it, the files are then fetched or taken as they are"
        ) from None


def _write_record(to: Path, record: dict) -> None:
    new = to / f"{RECORD}.new"
    new.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    os.replace(new, to / RECORD)
