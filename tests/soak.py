"""Fault tests: how often each draws a random moment, where that moment comes from, and what a long campaign remembers.

    @pytest.mark.fault("R3", sample=1, soak=20)      # `make test` draws once (0: never), `make soak` twenty times
    def test_...(draw): ... draw.rng.uniform(0, seconds) ...

    @pytest.mark.control("R3", broken="resume without the moments")    # the mechanism broken: the check must fail

`draw` seeds a generator from (--seed, test, number of the draw) and prints that. With `--soak=FILE` the counts are the
full ones, every outcome is a line of FILE, and what has passed there is not run again, so that a campaign of hours is
made in pieces: stop it at any moment and start it again. `python tests/soak.py FILE docs/reliability.md` writes the
table.
"""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

FAULTS = {
    "R1": ("kill -9 of a sharding worker", "the store of an undisturbed run, byte for byte; nothing left over"),
    "R2": ("kill -9 of the whole sharding job", "as R1 after the same command; finished shards are not written again"),
    "R3": ("kill -9 of one rank", "all ranks gone within 30 s; the continued run ends bitwise equal, each step once"),
    "R4": ("USR1, USR2, TERM, Ctrl-C, deadline, STOP file", "exit 75 with a checkpoint; bitwise equal at the end"),
    "R5": ("Slurm: time limit, requeue, of an array task and a plain job", "queued again, bitwise equal, log kept"),
    "R6": ("kill -9 while a checkpoint is written", "the newest sound checkpoint is taken, never a partial one"),
    "R7": ("disk full", "one sentence on all ranks within 30 s, older checkpoints whole, goes on after space is freed"),
    "R8": ("truncated, empty or missing shard", "named before the first step or at the first use"),
    "R9": ("flipped bits in shards, metadata, manifest, checkpoint, model", "every one detected"),
    "R10": ("non-finite label in training", "no rank updates, the structure is named, the same at ZeRO 0, 1, 2"),
    "R11": ("another number of ranks on resume", "the same structures in each step, weights within 1e-5"),
    "R12": ("array members fail, are killed, diverge", "the others finish; named; --retry submits just those"),
    "R13": ("a rank that hangs", "all end within the timeout + 10 s, with stacks"),
    "R14": ("any number of structures for any number of ranks", "no hang, each structure once an epoch"),
    "R15": ("eight jobs of two ranks start together", "all finish, none joins another"),
    "R16": ("two jobs in one run directory", "the second is told who is there; a dead job's lock is taken over"),
    "R17": ("lock of a killed extension build", "training starts, `doctor` names it"),
    "R18": (
        "config changed between two starts",
        "refused with the difference once there is a checkpoint, unless it changes no number",
    ),
    "R19": ("checkpoint or model of another version", "one sentence that says what to do"),
    "R20": ("cache, prefetch, number of ranks", "the same sequence of structures"),
    "R21": ("forces through the engine", "gradients within 1e-5 of a float64 reference; stage 3 refused"),
    "R22": ("log or tracker cannot be written", "training goes on, one warning"),
    "R23": ("malicious pickle in place of a file", "refused, nothing of it runs"),
    "R24": ("fifty random faults in one run", "bitwise equal at the end"),
}
"""Number -> (fault, passes when), after the table of the reliability study."""

_RECORDED = ("call", "setup")


@dataclass(frozen=True)
class Draw:
    """One draw of a fault test."""

    seed: str
    rng: random.Random
    number: int
    """0, 1, ... of the draws of this test."""
    is_soak: bool


def pytest_addoption(parser):
    group = parser.getgroup("faults")
    group.addoption(
        "--soak", type=Path, metavar="FILE", help="full counts; outcomes go to FILE, what passed stays done"
    )
    group.addoption("--seed", type=int, default=0, help="of the random moments of fault tests (default 0)")


def pytest_configure(config):
    config.addinivalue_line("markers", "fault(number, sample, soak): a fault of tests/soak.py, drawn so many times")
    config.addinivalue_line(
        "markers",
        "control(number, broken): the same check with its mechanism broken must fail",
    )


def pytest_report_header(config):
    soak = config.getoption("--soak")
    return [f"faults: seed {config.getoption('--seed')}" + (f", full counts, recorded in {soak}" if soak else "")]


def pytest_generate_tests(metafunc):
    mark = metafunc.definition.get_closest_marker("fault")
    if mark is not None and "draw" in metafunc.fixturenames:
        is_soak = metafunc.config.getoption("--soak") is not None
        count = mark.kwargs["soak" if is_soak else "sample"]
        metafunc.parametrize("draw", range(max(count, 1)), indirect=True)


@pytest.fixture
def draw(request) -> Draw:
    """The random numbers of this draw; their seed is printed."""
    seed = f"{request.config.getoption('--seed')}/{request.node.nodeid}"
    print(f"seed {seed}")
    is_soak = request.config.getoption("--soak") is not None
    return Draw(seed, random.Random(seed), getattr(request, "param", 0), is_soak)


@pytest.fixture(scope="session")
def soak_folder(request, tmp_path_factory) -> Path:
    """A folder that outlives the session in a campaign, for a test that is itself made in pieces."""
    soak = request.config.getoption("--soak")
    if soak is None:
        return tmp_path_factory.mktemp("soak")
    folder = soak.absolute().parent / f"{soak.stem}.d"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ------------------------------------------------------------------------------------------------------- the record


def pytest_collection_modifyitems(config, items):
    soak = config.getoption("--soak")
    if soak is None:
        _keep(config, items, lambda item: (mark := _mark(item)) is None or mark.kwargs.get("sample") != 0)
        return
    before = read(soak)
    passed = {line["test"] for line in before if line["outcome"] == "passed"}
    mine = [item for item in items if _mark(item) is not None]
    known = {line["test"] for line in before}
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
        _write(soak, [_line(item) | {"outcome": "to do"} for item in mine if item.nodeid not in known])
    _keep(config, items, lambda item: _mark(item) is not None and item.nodeid not in passed)


def _keep(config, items, is_wanted) -> None:
    config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item)])
    items[:] = [item for item in items if is_wanted(item)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    soak, mark = item.config.getoption("--soak"), _mark(item)
    # a setup that worked is no outcome yet
    if soak is not None and mark is not None and report.when in _RECORDED and (report.when == "call" or report.failed):
        seen = {
            "outcome": report.outcome,
            "seconds": round(report.duration, 1),
            "seed": item.config.getoption("--seed"),
            "commit": _commit(item.config.rootpath),
            "time": round(time.time()),
            "figures": dict(item.user_properties),
        }
        _write(soak, [_line(item) | seen])
    return report


def _line(item) -> dict:
    mark = _mark(item)
    broken = mark.kwargs.get("broken", "")
    return {"test": item.nodeid, "number": mark.args[0], "kind": mark.name, "broken": broken}


def _write(path: Path, lines: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _mark(item):
    return item.get_closest_marker("fault") or item.get_closest_marker("control")


def _commit(folder: Path) -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def read(path: Path) -> list[dict]:
    """Lines of a record; one that was cut off by a kill does not count."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


# -------------------------------------------------------------------------------------------------------- the table


def table(lines: Iterable[dict]) -> str:
    """The page: a row a fault, from the last outcome of each test in a record."""
    last = {line["test"]: line for line in lines}.values()
    ran = [line for line in last if line["outcome"] != "to do"]
    rows = [
        "| | fault | passes when | draws passed | median s | broken on purpose: caught |",
        "|---|---|---|---|---|---|",
    ]
    for number, (fault, criterion) in FAULTS.items():
        found = [line for line in last if line["number"] == number]
        draws = [line for line in found if line["kind"] == "fault"]
        controls = [line for line in found if line["kind"] == "control"]
        rows.append(f"| {number} | {fault} | {criterion} | {_count(draws)} | {_median(draws)} | {_caught(controls)} |")
    told: dict[tuple[str, str], list[str]] = {}
    for line in ran:
        if line["figures"]:
            text = ", ".join(f"{key} {value}" for key, value in line["figures"].items())
            told.setdefault((line["number"], line["test"].split("::")[-1].split("[")[0]), []).append(text)
    figures = [f"- {number}, `{test}`: {'; '.join(texts)}" for (number, test), texts in told.items()]
    commits, seeds = (", ".join(sorted({str(line[key]) for line in ran})) for key in ("commit", "seed"))
    made = f"Ran at commit {commits}, seed {seeds}, Python {platform.python_version()}, {os.cpu_count()} cores."
    return "\n".join([INTRODUCTION, made, "", *rows, *(["", "## Figures", "", *figures] if figures else [])]) + "\n"


INTRODUCTION = """\
# Reliability

What a run survives, as tests that break it. `make test` draws a few moments of each fault; `make soak` draws all of
them, in pieces if need be (stopped and started again it goes on), and writes this page. Each fault has a negative
control: a mechanism is broken on purpose, and the check has to fail. The tests are `pytest -m fault` and `-m control`.
"""


def _count(draws: list[dict]) -> str:
    if not draws:
        return "not run"
    return f"{sum(line['outcome'] == 'passed' for line in draws)} of {len(draws)}"


def _median(draws: list[dict]) -> str:
    seconds = [line["seconds"] for line in draws if "seconds" in line]
    return f"{statistics.median(seconds):.1f}" if seconds else ""


def _caught(controls: list[dict]) -> str:
    words = {"passed": "yes", "failed": "no", "to do": "not run"}
    found: dict[str, Counter[str]] = {}
    for control in controls:
        found.setdefault(control["broken"], Counter())[words[control["outcome"]]] += 1
    return "; ".join(f"{broken}: {_outcomes(counts)}" for broken, counts in found.items()) or "-"


def _outcomes(counts: Counter[str]) -> str:
    if counts.total() == 1:
        return next(iter(counts))
    return ", ".join(f"{count} of {counts.total()} {word}" for word, count in counts.items())


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(table(read(Path(sys.argv[1]))), encoding="utf-8")
