"""R1, R2, R7: kill -9 at any moment or a full disk, then the same command again: the store of an undisturbed run."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from in_process import contents, finished_shards
from many_shards import NUM_TASKS

pytestmark = pytest.mark.distributed

HPCMLIP = ("-m", "hpcmlip")


def broken(mechanism: str) -> tuple[str, str]:
    """The program that is hpcmlip with that of broken_sharding.py broken."""
    return str(Path(__file__).with_name("broken_sharding.py")), mechanism


@pytest.fixture(scope="module")
def undisturbed(many_shards, tmp_path_factory) -> float:
    """Seconds of the whole command that nobody disturbs."""
    began = time.monotonic()
    process = start(many_shards.config, tmp_path_factory.mktemp("undisturbed") / "out.zarr")
    assert process.wait(timeout=120) == 0
    return time.monotonic() - began


def start(config: Path, out: Path, program: Sequence[str] = HPCMLIP) -> subprocess.Popen:
    command = [sys.executable, *program, "shard", str(config), f"out={out}", "--workers", "2"]
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)


def finish(config: Path, out: Path, program: Sequence[str] = HPCMLIP) -> int:
    return start(config, out, program).wait(timeout=120)


def test_ctrl_c_ends_it_with_a_sentence(many_shards, tmp_path):
    out = tmp_path / "out.zarr"
    process = start(many_shards.config, out)
    while not list(partial(out).rglob("*.json")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to all processes of the command
    assert process.wait(timeout=60) == 75
    said = out.with_suffix(".log").read_text()
    assert "stopped; the same command continues" in said and "Traceback" not in said
    assert finish(many_shards.config, out) == 0


def partial(out: Path) -> Path:
    return Path(f"{out}.partial")


def moment(rng, seconds: float, out: Path) -> Callable[[], bool]:
    """A function that becomes true: after a part of the wall time, start-up included, or of the work itself."""
    began, after = time.monotonic(), rng.uniform(0, seconds)
    receipts, pause = rng.randrange(NUM_TASKS), rng.uniform(0, 0.02)
    if rng.random() < 0.5:
        print(f"after {after:.2f} s")
        return lambda: time.monotonic() - began >= after
    print(f"{pause:.3f} s after {receipts} receipts")

    def come_so_far() -> bool:
        if len(list(partial(out).glob("work/*/*.json"))) < receipts:
            return False
        time.sleep(pause)
        return True

    return come_so_far


def wait_for(process: subprocess.Popen, when: Callable[[], bool]) -> bool:
    """False if the command ended first."""
    deadline = time.monotonic() + 120
    while not when():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "never came so far"
        time.sleep(0.002)
    return True


def differences(out: Path, expected: dict[str, bytes], kept: dict[str, int]) -> list[str]:
    """In what a store differs from the expected one; `kept`: shards that were finished before -> modification time."""
    found = contents(out) if out.is_dir() else {}
    different = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    different += [f"{path.name} is left" for path in out.parent.iterdir() if path not in (out, out.with_suffix(".log"))]
    again = [name for name, time_ns in kept.items() if name in found and (out / name).stat().st_mtime_ns != time_ns]
    return different + [f"{name} was written again" for name in again]


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        below = psutil.Process(process.pid).children(recursive=True)
        # workers are forks of the server, which is a child of the command
        return [p for p in below if "forkserver" in " ".join(p.cmdline()) and p.ppid() != process.pid]
    return []


def kill_worker(process: subprocess.Popen, rng) -> bool:
    """False if none is there yet."""
    with contextlib.suppress(psutil.Error, IndexError):
        rng.choice(workers(process)).kill()
        return True
    return False


@pytest.mark.fault("R1", sample=1, soak=20)
def test_a_killed_worker_is_replaced(many_shards, undisturbed, tmp_path, draw):
    out = tmp_path / "out.zarr"
    process = start(many_shards.config, out)
    due = moment(draw.rng, undisturbed, out)
    was_hit = wait_for(process, due) and wait_for(process, lambda: kill_worker(process, draw.rng))
    print(f"was hit: {was_hit}")
    assert process.wait(timeout=120) == 0, out.with_suffix(".log").read_text()
    assert not differences(out, many_shards.expected, {})


@pytest.mark.control("R1", broken="shards are written in place and their receipts first")
def test_workers_killed_while_they_write_in_place_are_seen(many_shards, tmp_path):
    out = tmp_path / "out.zarr"
    process = start(many_shards.config, out, broken("in_place"))
    assert wait_for(process, lambda: any(partial(out).glob("store/n*/pos/c/*/*/*")))
    for worker in workers(process):
        worker.kill()
    process.wait(timeout=120)
    assert differences(out, many_shards.expected, {})


@pytest.mark.fault("R2", sample=1, soak=10)
def test_the_whole_job_is_killed(many_shards, undisturbed, tmp_path, draw):
    """Scheduler and all, once or twice; finished shards are left alone."""
    out = tmp_path / "out.zarr"
    kept: dict[str, int] = {}
    for _ in range(draw.rng.randrange(1, 3)):
        process = start(many_shards.config, out)
        wait_for(process, moment(draw.rng, undisturbed, out))
        kill_group(process)
        if out.exists():
            break
        now = finished_shards(partial(out))
        assert {name: now[name] for name in kept} == kept, "a finished shard was written again"
        kept = now
    assert finish(many_shards.config, out) == 0
    assert not differences(out, many_shards.expected, kept)


def kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.control("R2", broken="receipts are ignored")
def test_shards_that_are_written_again_are_seen(many_shards, tmp_path):
    out = tmp_path / "out.zarr"
    process = start(many_shards.config, out)
    assert wait_for(process, lambda: len(finished_shards(partial(out))) > 10)
    kill_group(process)
    kept = finished_shards(partial(out))
    assert finish(many_shards.config, out, broken("receipts")) == 0
    assert [text for text in differences(out, many_shards.expected, kept) if text.endswith("was written again")]
    assert contents(out) == many_shards.expected


# -------------------------------------------------------------------------------------------------------- full disk

FULL_DISK = """
mount -t tmpfs -o size={kilobytes}k tmpfs '{disk}'
{python} {program} shard '{config}' out='{disk}/out.zarr' --workers 2 2> '{folder}/full.txt'
echo $? > '{folder}/code.txt'
mount -o remount,size=100m '{disk}'
{python} {program} shard '{config}' out='{disk}/out.zarr' --workers 2 2> '{folder}/room.txt' && mv '{disk}'/* '{folder}'
"""


def on_a_small_disk(config: Path, folder: Path, kilobytes: int, program: Sequence[str] = HPCMLIP) -> list[str]:
    """What is wrong after sharding onto a disk of so many kB, and again once there is room."""
    disk = folder / "disk"
    disk.mkdir()
    fields = {"python": sys.executable, "program": " ".join(program), "config": config, "disk": disk, "folder": folder}
    script = FULL_DISK.format(kilobytes=kilobytes, **fields)
    subprocess.run(["unshare", "-rm", "bash", "-c", script], timeout=240, check=False)
    disk.rmdir()
    said, code = (folder / "full.txt").read_text(), (folder / "code.txt").read_text().strip()
    print(said)
    wrong = [] if code == "1" else [f"exit {code}"]
    last = said.strip().splitlines()[-1:] or [""]
    if not last[0].startswith("hpcmlip: cannot write") or "No space left on device" not in last[0]:
        wrong.append("no sentence")
    return wrong + (["a traceback"] if "Traceback" in said else [])


@pytest.fixture(scope="module")
def _small_disks(tmp_path_factory):
    """Skips where a file system of our own cannot be mounted."""
    disk = tmp_path_factory.mktemp("disk")
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(disk)]
    if shutil.which("unshare") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a full disk needs user namespaces (unshare -rm mount)")


@pytest.mark.fault("R7", sample=1, soak=20)
@pytest.mark.usefixtures("_small_disks")
def test_a_full_disk_is_told_and_the_work_goes_on_with_room(many_shards, tmp_path, draw):
    kilobytes = draw.rng.randrange(8, size(many_shards.expected))
    print(f"disk of {kilobytes} kB")
    assert not on_a_small_disk(many_shards.config, tmp_path, kilobytes)
    for name in ("full.txt", "code.txt", "room.txt"):
        (tmp_path / name).unlink()
    assert not differences(tmp_path / "out.zarr", many_shards.expected, {})


@pytest.mark.control("R7", broken="what does not fit is cut off")
@pytest.mark.usefixtures("_small_disks")
def test_shards_that_are_cut_off_are_seen(many_shards, tmp_path):
    assert on_a_small_disk(many_shards.config, tmp_path, size(many_shards.expected) // 2, broken("full_disk"))


def size(files: dict[str, bytes]) -> int:
    """kB in pages, as a tmpfs counts them; the receipts, which go in the end, come on top."""
    return sum(-(-len(data) // 4096) * 4 for data in files.values())
