"""`hpcmlip bench learning`: what is run follows from the presets and the budget; what is done is not done again."""

import json

import h5py
import pytest

from hpcmlip import configs
from hpcmlip.bench import learning, learning_table, small_stores
from hpcmlip.bench.commands import Commands
from hpcmlip.config import RunConfig, from_values
from hpcmlip.errors import ConfigError, RunError

PRESETS = sorted(name.removeprefix("models/").removesuffix(".yaml") for name in configs.listing() if "models/" in name)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("experiment", ["SF", "MF"])
def test_every_preset_makes_a_run_with_its_own_model(preset, experiment, tmp_path):
    values = learning.run_values(preset, experiment, ["optim.lr=0.002"])
    values["data"]["stores"] = [str(tmp_path)]
    config = from_values(RunConfig, values, tmp_path, where="test")
    assert config.model == learning.load(RunConfig, configs.path(f"models/{preset}.yaml")).model
    assert config.data.levels == {"SF": {"gfn2": "E"}, "MF": {"gfn1": "EF", "gfn2": "E"}}[experiment]
    assert config.optim.lr == 0.002 and config.weights("gfn2").energy > 0


@pytest.mark.parametrize(
    ("budget", "epoch", "expected"),
    [(360, 100, (4, 1)), (360, 360, (1, 1)), (360, 500, (1, 1)), (360, 700, (1, 2)), (360, 3600, (1, 10))],
)
def test_the_budget_is_met_by_whole_epochs_or_a_part_of_the_data(budget, epoch, expected):
    assert learning.fit(budget, epoch) == expected


def test_a_part_of_the_molecules(samples, tmp_path):
    small_stores._select(samples["xtb"], tmp_path / "part.h5", 2, 3)
    with h5py.File(samples["xtb"]) as source, h5py.File(tmp_path / "part.h5") as part:
        heavy = {name: int((group["atomic_numbers"][:] > 1).sum()) for name, group in source.items()}
        assert set(part) == {name for name, number in heavy.items() if number <= 2} != set(source)
        for name, group in part.items():
            assert (group["atomic_numbers"][:] == source[name]["atomic_numbers"][:]).all()
            assert (group["coordinates"][:] == source[name]["coordinates"][::3]).all()
            assert (group["smiles"][:] == source[name]["smiles"][::3]).all()


def test_errors_of_a_command_are_told(tmp_path):
    with pytest.raises(RunError, match=r"exit code \d: .*nowhere"):
        Commands().run("inspect", tmp_path / "nowhere.zarr", log=tmp_path / "log.txt")


def test_what_is_not_there(samples, tmp_path):
    with pytest.raises(ConfigError, match="no raw file"):
        learning.main(["--data", str(tmp_path / "absent.h5"), "--out", str(tmp_path)])
    with pytest.raises(ConfigError, match="PRESET:KEY=VALUE"):
        learning.main(["--data", str(samples["xtb"]), "--out", str(tmp_path), "--set", "optim.lr=1"])


def record(preset: str, experiment: str, energy: float) -> dict:
    levels = {"gfn2": {"energy": {"rmse": energy}, "forces": {"rmse": 12.0}}}
    baseline = {"gfn2": {"energy": {"rmse": 30.0}, "forces": {"rmse": 33.0}}}
    if experiment == "MF":
        levels["gfn1"] = {"energy": {"rmse": 3.0}, "forces": {"rmse": 4.0}}
        baseline["gfn1"] = {"energy": {"rmse": 31.0}, "forces": {"rmse": 34.0}}
    counts = {"parameters": 1234, "lr": 1e-3, "structures": 999, "epochs": 2, "steps": 20}
    cpu = {"cpu_seconds": {"train": 61.2}}
    return {"preset": preset, "experiment": experiment, "levels": levels, "baseline": baseline, **counts, **cpu}


def test_the_table_names_the_runs_that_the_composition_beats():
    runs = [record("a", "SF", 31.0), record("a", "MF", 2.5)]
    text = learning_table.markdown({"command": "c", "versions": {"torch": "2"}, "runs": runs, "missing": 1})
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[2].endswith("| 30.00 | 33.00 | 31.00 | 34.00 |")
    assert rows[3] == "| a | gfn2 E | 1,234 | 0.001 | 999 | 2 | 20 | 61 | 31.00 | 12.00 |  |  |"
    assert rows[4].endswith("| 2.50 | 12.00 | 3.00 | 4.00 |")
    assert "Not better than the composition alone: a SF (gfn2 energy)." in text
    assert "1 runs are missing." in text


@pytest.fixture
def arguments(samples, tmp_path):
    folders = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    small = ["hipnn:model.features=4", "hipnn:model.interactions=1", "hipnn:model.lmax=0"]
    return ["--data", str(samples["xtb"]), *folders, "--minutes", "0.01", "--models", "hipnn", "--set", *small]


@pytest.mark.timeout(300)
def test_a_run_is_made_once_and_its_errors_are_in_the_table(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "EXPERIMENTS", {"MF": learning.EXPERIMENTS["MF"]})
    assert learning.main(arguments) == 0
    (run,) = json.loads((tmp_path / "out/learning.json").read_text())["runs"]
    assert run["levels"]["gfn2"]["forces"]["rmse"] > 0 and run["cpu_seconds"]["train"] > 0
    assert "gfn1 EF, gfn2 E" in (tmp_path / "out/learning.md").read_text()
    monkeypatch.setattr(Commands, "_start", lambda *_: pytest.fail("it was run again"))
    assert learning.main(arguments) == 0
    with pytest.raises(pytest.fail.Exception, match="run again"):
        learning.main([*arguments, "hipnn:optim.lr=1e-4"])


def test_a_failed_run_is_named_and_repeated_later(arguments, tmp_path, monkeypatch, capsys):
    calls = []

    def fail(*call, **_):
        calls.append(call)
        raise RunError("the disk is full")

    monkeypatch.setattr(learning._Job, "_plan", fail)
    assert learning.main(arguments) == 1 == learning.main(arguments)
    assert len(calls) == 4 and "failed: hipnn-MF, hipnn-SF" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/learning.json").read_text())["missing"] == 2
