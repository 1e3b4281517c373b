"""The wheel, installed away from the checkout, runs every command with the templates and samples that it carries."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = (
    "shard",
    "fetch",
    "inspect",
    "verify",
    "train",
    "submit",
    "status",
    "cancel",
    "evaluate",
    "predict",
    "configs",
)
SHIPPED = ("hpcmlip", "preprocess", "slurm", "configs", "pyproject.toml", "README.md")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, by the front end and back end that are installed here."""
    folder = tmp_path_factory.mktemp("build")
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.zarr"))
        elif source.exists():
            shutil.copy(source, folder / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((folder / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Python of a fresh environment: hpcmlip from the wheel, its dependencies from the environment of the tests."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        str(wheel),
    ]
    done = subprocess.run(pip, text=True, capture_output=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    # a line of a .pth file is appended to sys.path, after the wheel's own folder; .pth files in there are not read
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def run(installed, tmp_path_factory):
    """`run(*arguments)`: the `hpcmlip` script of the fresh environment, in a folder of its own."""
    folder = tmp_path_factory.mktemp("away from the checkout")
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def call(*arguments, expect=0):
        command = [str(installed.parent / "hpcmlip"), *map(str, arguments)]
        done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, check=False, timeout=280)
        assert done.returncode == expect, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    call.folder = folder
    call.python = installed
    return call


def test_the_wheel_carries_everything_and_nothing_generic(wheel):
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], text=True, capture_output=True, check=True
    ).stdout
    files = {line.split()[0] for line in names.splitlines()[1:]}
    for name in SHIPPED[1:4]:
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and path.suffix in (".py", ".yaml", ".sbatch", ".h5") and "__pycache__" not in path.parts:
                assert f"hpcmlip/{path.relative_to(ROOT).as_posix()}" in files
    for path in (ROOT / "hpcmlip").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in files
    tops = {name.split("/")[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hpcmlip"}


def test_the_package_under_test_is_that_of_the_wheel(run):
    code = "import hpcmlip, hpcmlip.configs as c; print(hpcmlip.__file__); print(c.__file__)"
    done = subprocess.run(
        [str(run.python), "-c", code], cwd=run.folder, text=True, capture_output=True, check=True, timeout=60
    )
    venv_folder = run.python.parent.parent
    assert all(Path(line).is_relative_to(venv_folder) for line in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help(run, command):
    assert "Usage: hpcmlip" in run(command, "--help")


def test_the_benchmarks_are_there(run):
    assert "usage" in run("bench", "hipnn", "--help").lower()


def test_from_the_sample_to_the_batch_script(run):
    """configs, shard, inspect, verify, submit --dry-run: on nothing but what the wheel brought."""
    names = run("configs").split()
    assert "samples/ab_initio_small.h5" in names
    run("configs", "--to", "configs")
    run("shard", "configs/data/ab_initio_small.yaml", "out=demo/ab_initio.zarr", "--workers", 1)
    shown = json.loads(run("inspect", "demo/ab_initio.zarr", "--json"))
    assert "998" in json.dumps(shown)
    run("verify", "demo/ab_initio.zarr")
    experiment = run.folder / "runs" / "mf"
    submit = ["submit", "configs/demo_mf.yaml", "--members", 2, "--evaluate", "demo/ab_initio.zarr", "--dry-run"]
    run(*submit, "--run-dir", experiment)
    scripts = sorted(path.name for path in experiment.rglob("*.sbatch"))
    assert (
        len(scripts) == 2 and any("train" in name for name in scripts) and any("evaluate" in name for name in scripts)
    )


def test_a_short_training_and_its_evaluation(run):
    """A few epochs by the installed command line alone; the store is the one of the test above or made here."""
    if not (run.folder / "demo" / "ab_initio.zarr").exists():
        run("configs", "--to", "configs")
        run("shard", "configs/data/ab_initio_small.yaml", "out=demo/ab_initio.zarr", "--workers", 1)
    run("train", "configs/demo_sf.yaml", "train.epochs=2", "train.validate_every=1", "--run-dir", "runs/short")
    assert json.loads((run.folder / "runs/short/done.json").read_text())["state"] == "finished"
    run("evaluate", "runs/short", "--data", "demo/ab_initio.zarr", "--out", "evaluation")
    assert json.loads((run.folder / "evaluation/metrics.json").read_text())["levels"]["cc"]["energy"]["rmse"] > 0
    assert (run.folder / "evaluation/report.html").exists()
