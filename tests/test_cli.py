"""The command line is a contract: its commands and options change only together with this list."""

import subprocess
import sys

import pytest
import typer

from hpcmlip import plugins
from hpcmlip.cli import app

SURFACE = {
    "bench": ["name"],
    "cancel": ["experiment"],
    "configs": ["--to", "--keys"],
    "doctor": ["--site", "--json"],
    "evaluate": ["runs", "--data", "--split", "--out", "--units", "--min-members"],
    "fetch": ["dataset", "--to"],
    "inspect": ["store", "--json"],
    "predict": ["models", "-o", "--out", "--level"],
    "shard": ["data", "overrides", "--scheduler", "--workers", "--on-bad"],
    "status": ["experiment", "--json"],
    "submit": [
        "run",
        "overrides",
        "--members",
        "--sweep",
        "--retry",
        "--evaluate",
        "--split",
        "--min-members",
        "--site",
        "--run-dir",
        "--local",
        "--ranks",
        "--dry-run",
    ],
    "suggest": ["experiment", "trial"],
    "train": ["run", "overrides", "--run-dir", "--forecast", "--json"],
    "verify": ["store"],
}
HEAVY = (
    "torch",
    "deepspeed",
    "zarr",
    "dask",
    "distributed",
    "h5py",
    "matplotlib",
    "numpy",
    "hpcmlip.config",
)


def surface() -> dict[str, list[str]]:
    commands = typer.main.get_command(app).commands
    return {
        name: [option for parameter in command.params for option in parameter.opts]
        for name, command in sorted(commands.items())
    }


def test_commands_and_options_are_these():
    assert surface() == SURFACE


@pytest.mark.parametrize("arguments", [("bench",), ("bench", "--help")])
def test_the_benchmarks_are_listed(cli, arguments):
    text = cli(*arguments).stdout
    for name in plugins.names("bench"):
        assert f"{name} " in text and plugins.find("bench", name).COMPONENT in text


@pytest.mark.parametrize("command", ["", *[name for name in SURFACE if name != "bench"]])
def test_help_is_quick_and_complete(command):
    arguments = [command, "--help"] if command else ["--help"]
    # in one process: the help itself, then the modules that were loaded for it
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('LOADED', [m for m in {HEAVY!r} if m in sys.modules]))\n"
        f"sys.argv = ['hpcmlip', *{arguments!r}]\n"
        "from hpcmlip.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout
    for option in SURFACE.get(command, SURFACE):
        if option.startswith("--") or not command:
            assert option in done.stdout


def test_no_command_shows_the_help(cli):
    done = cli(expect=2)
    assert "shard" in done.output and "evaluate" in done.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["shard"],
        ["train", "run.yaml", "--nonsense"],
        ["shard", "d.yaml", "--scheduler", "pbs"],
        ["shard", "d.yaml", "--workers", "0"],
        ["fetch", "ani-3"],
        ["submit", "r.yaml", "--members", "two"],
        ["evaluate", "run"],
        ["evaluate", "none", "--data", "none.zarr"],
        ["predict", "model", "-o", "out.xyz"],
        ["bench", "nonsense"],
    ],
)
def test_a_wrong_command_line_is_exit_2_without_traceback(cli, tmp_path, arguments):
    done = cli(*arguments, expect=2, cwd=tmp_path)
    assert done.stderr.strip() and "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "none.zarr"], "there is no store at none.zarr"),
        (["verify", "none.zarr"], "there is no store at none.zarr"),
    ],
)
def test_absent_data_is_exit_1_with_one_sentence(cli, tmp_path, arguments, words):
    done = cli(*arguments, expect=1, cwd=tmp_path)
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith("hpcmlip: ") and words in sentence and "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


def test_configs_lists_and_copies(cli, tmp_path):
    names = cli("configs").stdout.split()
    assert {"demo_sf.yaml", "demo_mf.yaml", "samples/ab_initio_small.h5", "data/ab_initio_small.yaml"} <= set(names)
    cli("configs", "--to", tmp_path / "mine")
    assert sorted(p.relative_to(tmp_path / "mine").as_posix() for p in (tmp_path / "mine").rglob("*.*")) == names
