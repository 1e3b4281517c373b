"""SWEEP.yaml: what it expands to, what it refuses, and the experiment that comes of it."""

import json
import math
from pathlib import Path

import pytest
import yaml

from hpcmlip.cluster import sweep
from hpcmlip.cluster.experiment import Experiment, open_experiment
from hpcmlip.cluster.submission import How, submit
from hpcmlip.cluster.sweep import Sweep
from hpcmlip.config import RunConfig, load
from hpcmlip.errors import ConfigError, DataError


def _file(folder: Path, values: dict | str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False))
    return path


def _sweep(folder: Path, values: dict | str) -> Sweep:
    return sweep.load_sweep(_file(folder, values))


def _submit(config: RunConfig, folder: Path, file: Path, **arguments) -> None:
    defaults = {"members": None, "evaluate": None, "split": None, "min_members": None, "how": How(dry_run=True)}
    assert submit(config, folder, sweep_file=file, **(defaults | arguments)) == 0


def test_a_grid_is_every_combination_in_order(tmp_path):
    grid = _sweep(tmp_path, "grid: {optim.lr: [1e-3, 5e-4], model.features: [64, 128]}")
    assert [tuple(trial.values()) for trial in sweep.trials(grid, 0)] == [
        (1e-3, 64),
        (1e-3, 128),
        (5e-4, 64),
        (5e-4, 128),
    ]


def test_parts_multiply_and_members_are_seeds(tmp_path):
    values = {
        "list": [{"model.lmax": 1}, {"model.lmax": 2, "model.cutoff": 5.0}],
        "grid": {"optim.lr": [1e-3, 1e-4]},
        "members": 2,
    }
    found = sweep.trials(_sweep(tmp_path, values), seed=7)
    assert len(found) == 2 * 2 * 2
    assert found[0] == {"model.lmax": 1, "optim.lr": 1e-3, "train.seed": 7}
    assert found[-1] == {"model.lmax": 2, "model.cutoff": 5.0, "optim.lr": 1e-4, "train.seed": 8}


def test_draws_are_repeatable_in_range_and_of_the_asked_distribution(tmp_path):
    values = {"count": 400, "seed": 3, "optim.lr": {"log_uniform": [1e-5, 1e-2]}}
    found = sweep.trials(_sweep(tmp_path, {"random": values}), 0)
    rates = [trial["optim.lr"] for trial in found]
    assert len(set(rates)) == 400 and all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert found == sweep.trials(_sweep(tmp_path, {"random": values}), 0)
    assert found != sweep.trials(_sweep(tmp_path, {"random": values | {"seed": 4}}), 0)
    # a third of the draws in each decade; for a uniform draw the highest would have nine tenths
    for decade in (-5, -4, -3):
        share = sum(decade <= math.log10(rate) < decade + 1 for rate in rates) / 400
        assert 0.23 < share < 0.43
    longer = sweep.trials(_sweep(tmp_path, {"random": values | {"count": 450}}), 0)
    assert longer[:400] == found and len(longer) == 450


def test_the_same_trial_is_not_drawn_twice(tmp_path):
    values = {"count": 6, "model.features": {"choice": [1, 2, 3]}, "model.lmax": {"choice": [0, 1]}}
    found = sweep.trials(_sweep(tmp_path, {"random": values}), 0)
    assert sorted(tuple(trial.values()) for trial in found) == [(f, lmax) for f in (1, 2, 3) for lmax in (0, 1)]
    with pytest.raises(ConfigError, match="no 7 different trials, only 6"):
        sweep.trials(_sweep(tmp_path, {"random": values | {"count": 7}}), 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gird: {optim.lr: [1]}", "unknown key 'gird' (did you mean 'grid'?"),
        ("{}", "asks for no setting"),
        ("members: 3", "asks for no setting"),
        ("list: [{}]", "asks for no setting"),
        ("grid: {optim.lr: 1e-3}", "grid.optim.lr: expected a list [...]"),
        ("grid: {optim.lr: []}", "grid.optim.lr: must not be empty"),
        ("random: {count: 3}", "names no key of the config"),
        ("random: {count: 0, optim.lr: {uniform: [0, 1]}}", "random.count: must be greater"),
        ("random: {optim.lr: {uniform: [0, 1]}}", "the key 'random.count' is missing"),
        ("random: {count: 3, optim.lr: {normal: [0, 1]}}", "unknown key 'random.optim.lr.normal'"),
        ("random: {count: 3, optim.lr: {uniform: [1, 0]}}", "the range from 1 to 0 is none"),
        ("random: {count: 3, optim.lr: {log_uniform: [0, 1]}}", "needs a lower end above 0"),
        ("random: {count: 3, optim.lr: {uniform: [0, 1], choice: [1]}}", "give one of uniform, log_uniform, integer"),
        ("{grid: {optim.lr: [1]}, list: [{optim.lr: 2}]}", "'optim.lr' is given in two places"),
        ("{grid: {train.seed: [1, 2]}, members: 2}", "train.seed is swept and members is 2"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, text, said):
    with pytest.raises(ConfigError) as error:
        _sweep(tmp_path, text)
    assert said in str(error.value) and "sweep.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"grid": {"optim.lrr": [1e-3]}}, "unknown key 'optim.lrr' (did you mean 'lr'?"),
        ({"grid": {"optim.lr": [1e-3, -1.0]}}, 'trial {"optim.lr": -1.0}: optim.lr: must be greater than 0'),
        ({"grid": {"optim.lr.x": [1]}}, "optim.lr: expected a number"),
        ({"list": [{"model.kind": "hippnn"}]}, "no model named 'hippnn' (did you mean 'hipnn'?"),
        ({"list": [{"model.features": "many"}]}, "model.features: expected a whole number"),
        ({"grid": {"train.micro_batches_per_step": [4, 3]}}, "does not divide train.micro_batches_per_step = 3"),
        ({"grid": {"data.stores": [["absent.zarr"]]}}, "absent.zarr"),
    ],
)
def test_every_trial_is_checked_before_anything_is_written(config, tmp_path, values, said):
    with pytest.raises((ConfigError, DataError)) as error:
        _submit(config, tmp_path / "e", _file(tmp_path, values))
    assert said in str(error.value)
    assert not (tmp_path / "e").exists()


def test_trials_are_members_with_complete_configs(config, tmp_path, capsys):
    folder = tmp_path / "e"
    file = _file(tmp_path, {"grid": {"optim.lr": [1e-3, 5e-4], "model.features": [8, 16]}})
    _submit(config, folder, file)
    names = [member.name for member in open_experiment(folder).members]
    assert names == ["t000-lr0.001-features8", "t001-lr0.001-features16", *names[2:]]
    assert names[3] == "t003-lr0.0005-features16"
    written = load(RunConfig, folder / "configs" / f"{names[3]}.yaml")
    assert (written.optim.lr, written.model.features, written.train) == (5e-4, 16, config.train)
    script = (folder / "slurm" / "train.sbatch").read_text()
    assert "--array=0-3%8" in script and f"members=({' '.join(names)})" in script
    assert (folder / "sweep.yaml").read_text() == file.read_text()


def test_names_tell_keys_apart_and_are_plain(config, tmp_path):
    weights = {"gfn1": {"energy": 2.0}}
    values = {"loss.weights.gfn2.energy": 0.5, "train.seed": 3, "model.lmax": 1, "loss.weights": weights}
    short = sweep.short_keys([*values, "optim.kind", "model.kind", "optim.schedule.kind"])
    assert short["loss.weights.gfn2.energy"] == "energy" and short["train.seed"] == "seed"
    assert short["model.kind"] == "model.kind" and short["optim.schedule.kind"] == "schedule.kind"
    name = sweep.name(12, {"optim.schedule.kind": "one cycle/x", "loss.weights": weights}, short)
    assert name == "t012-schedule.kind_one_cycle_x-weights_gfn1_energy_2.0"


def test_a_larger_sweep_keeps_the_trials_that_are_there(config, tmp_path):
    folder = tmp_path / "e"
    _submit(config, folder, _file(tmp_path, {"grid": {"optim.lr": [1e-3, 5e-4]}}))
    (folder / "t000-lr0.001" / "log.txt").touch()
    _submit(config, folder, _file(tmp_path, {"grid": {"optim.lr": [1e-4, 5e-4, 1e-3]}}))
    experiment = open_experiment(folder)
    assert [member.name for member in experiment.members] == ["t000-lr0.001", "t001-lr0.0005", "t002-lr0.0001"]
    assert [experiment.member_config(i).optim.lr for i in range(3)] == [1e-3, 5e-4, 1e-4]
    with pytest.raises(ConfigError, match=r"of 3 members, asked for are 2 without t001-lr0\.0005, t002-lr0\.0001"):
        _submit(config, folder, _file(tmp_path, {"grid": {"optim.lr": [1e-3, 1e-2]}}))
    with pytest.raises(ConfigError, match="without t000"):
        submit(
            config,
            folder,
            members=3,
            sweep_file=None,
            evaluate=None,
            split=None,
            min_members=None,
            how=How(dry_run=True),
        )


def test_kinds_of_a_section_may_differ_and_paths_belong_to_the_file(config, tmp_path, xtb_store):
    loss = [{"loss.kind": "log_cosh", "loss.sharpness": 2.0}, {"loss.kind": "mae"}]
    (tmp_path / "link.zarr").symlink_to(xtb_store)
    file = _file(tmp_path, {"list": loss, "grid": {"data.stores": [["link.zarr"]]}})
    _submit(config, tmp_path / "e" / "f", file)
    experiment: Experiment = open_experiment(tmp_path / "e" / "f")
    assert [experiment.member_config(i).loss.kind for i in range(2)] == ["log_cosh", "mae"]
    assert experiment.member_config(1).data.stores == (tmp_path / "link.zarr",)
    assert json.loads((tmp_path / "e" / "f" / "experiment.json").read_text())["members"][1]["values"] == {
        "loss.kind": "mae",
        "data.stores": [str(tmp_path / "link.zarr")],
    }


def test_what_cannot_be_evaluated_together_is_refused(config, tmp_path, xtb_store):
    file = _file(tmp_path, {"grid": {"data.levels": [{"gfn1": "E"}, {"gfn1": "EF"}]}})
    with pytest.raises(ConfigError, match="cannot be evaluated together"):
        _submit(config, tmp_path / "e", file, evaluate=xtb_store)
    _submit(config, tmp_path / "e", file)


def test_members_belong_into_the_file(config, tmp_path):
    with pytest.raises(ConfigError, match="write 'members: 3' into"):
        _submit(config, tmp_path / "e", _file(tmp_path, {"grid": {"optim.lr": [1e-3]}}), members=3)
