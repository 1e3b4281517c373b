"""What all tests share: samples, stores, ways to start the program in processes of its own, and the rule about skips.

With HPCMLIP_REQUIRE_ALL=1 (set by .ci/run) a test that skips has failed: there, everything it needs is installed.
"""

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from hpcmlip import configs

pytest_plugins = ["soak", "runs"]

# before any test module imports torch or DeepSpeed; processes that tests start inherit them
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# private to the environment: a build killed half-way leaves a lock in the shared default on which later starts hang
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))

REQUIRE_ALL = os.environ.get("HPCMLIP_REQUIRE_ALL") == "1"


@dataclass(frozen=True)
class Finished:
    """A program that has ended."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


@pytest.fixture(scope="session")
def samples() -> dict[str, Path]:
    """The raw files that come with the package: "ab_initio" (998 conformations) and "xtb" (3720)."""
    return {
        "ab_initio": configs.path("samples/ab_initio_small.h5"),
        "xtb": configs.path("samples/xtb_tiny.h5"),
    }


@pytest.fixture(scope="session")
def ab_initio_store(tmp_path_factory, cli) -> Path:
    """`ab_initio_small.h5` sharded by the packaged config; read only."""
    return _shard("data/ab_initio_small.yaml", tmp_path_factory, cli)


@pytest.fixture(scope="session")
def xtb_store(tmp_path_factory, cli) -> Path:
    """`xtb_tiny.h5` sharded by the packaged config; read only."""
    return _shard("data/xtb_tiny.yaml", tmp_path_factory, cli)


def _shard(name: str, tmp_path_factory, cli) -> Path:
    out = tmp_path_factory.mktemp("stores") / f"{Path(name).stem}.zarr"
    cli("shard", configs.path(name), f"out={out}", "--workers", 1)
    return out


@pytest.fixture(scope="session")
def cli():
    """`cli(*arguments, expect=0, cwd=None, env=None, timeout=240)` runs `hpcmlip` in a process of its own -> Finished.

    `expect`: the exit code that is asserted; None for any.
    """

    def run(*arguments, expect=0, cwd=None, env=None, timeout=240) -> Finished:
        command = [sys.executable, "-m", "hpcmlip", *map(str, arguments)]
        return _finish(command, expect=expect, cwd=cwd, env=env, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def launch():
    """`launch(*arguments, ranks=2, expect=0, cwd=None, env=None, timeout=240)`: a script or `-m module` under torchrun.

    The rendezvous takes a free port by itself. Past `timeout` the ranks dump their stacks, all of them are killed and
    the test fails with what they wrote.
    """

    def run(*arguments, ranks=2, expect=0, cwd=None, env=None, timeout=240) -> Finished:
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
        command = [*torchrun, *rendezvous, *map(str, arguments)]
        return _finish(command, expect=expect, cwd=cwd, env=env, timeout=timeout)

    return run


def _finish(command, *, expect, cwd, env, timeout) -> Finished:
    environment = os.environ | {"PYTHONFAULTHANDLER": "1"} | {key: str(value) for key, value in (env or {}).items()}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # torchrun gives each rank a session of its own: a signal to the group of the launcher would miss them
        _end_tree(process)
        stdout, stderr = process.communicate()
        pytest.fail(f"{_text(command)} was not done within {timeout} s\n{stdout}{stderr}", pytrace=False)
    except BaseException:
        _end_tree(process)
        raise
    if expect is not None and process.returncode != expect:
        pytest.fail(f"{_text(command)}: exit {process.returncode}, expected {expect}\n{stdout}{stderr}", pytrace=False)
    return Finished(process.returncode, stdout, stderr)


def _end_tree(process: subprocess.Popen) -> None:
    """Stacks of all Python processes below (faulthandler answers SIGABRT), then the end of the tree."""
    try:
        parent = psutil.Process(process.pid)
        children = parent.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for child in children:
        _send(child, signal.SIGABRT)
    psutil.wait_procs(children, timeout=5)
    for member in [parent, *children]:
        _send(member, signal.SIGKILL)


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _text(command) -> str:
    return " ".join(str(part) for part in command)


def pytest_collection_modifyitems(items):
    """What waits for other programs first: it would be a long tail where tests run side by side."""
    slow = ("slurm", "distributed")
    items.sort(key=lambda item: next((i for i, mark in enumerate(slow) if item.get_closest_marker(mark)), len(slow)))


# ------------------------------------------------------------------------------------------------------ skipped tests


def _refuse_skip(report) -> None:
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"HPCMLIP_REQUIRE_ALL=1 allows no skip, but {report.nodeid} did: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _refuse_skip(report)
    return report


def pytest_terminal_summary(terminalreporter):
    """Which tests this machine leaves out, and why."""
    left_out: dict[str, list[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        left_out.setdefault(reason.removeprefix("Skipped: "), []).append(report.nodeid)
    for reason, tests in sorted(left_out.items()):
        terminalreporter.section(f"left out: {len(tests)} tests, because: {reason}", sep="-")
        for test in tests:
            terminalreporter.line(test)
