"""A sweep by Optuna in its experiment directory, up to the trainings themselves, whose records are written here."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from runs import pretend_finished

from hpcmlip.cluster import experiment as experiments
from hpcmlip.cluster import status, study, trials
from hpcmlip.cluster.experiment import Experiment, open_experiment
from hpcmlip.cluster.submission import How, retry, submit
from hpcmlip.config import RunConfig, load
from hpcmlip.errors import ConfigError, RunError
from hpcmlip.training import rundir

SPACE = {"optim.lr": {"log_uniform": [1e-4, 1e-1]}, "model.features": {"integer": [2, 9]}}
OPTUNA = {"trials": 6, "generation": 2, "sampler": {"kind": "TPESampler", "n_startup_trials": 1}} | SPACE


def _file(folder: Path, *, members: int = 1, **optuna) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"optuna": OPTUNA | optuna, "members": members}, sort_keys=False))
    return path


def _submit(config: RunConfig, folder: Path, file: Path, **arguments) -> Experiment:
    defaults = {"members": None, "evaluate": None, "split": None, "min_members": None, "how": How(dry_run=True)}
    assert submit(config, folder, sweep_file=file, **(defaults | arguments)) == 0
    return open_experiment(folder)


def _note(experiment: Experiment, member: int, what: str, job: str = "12_0") -> None:
    with experiment.history_file(member).open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {job} {what}\n")


def _end(experiment: Experiment, member: int, *, pruned: bool = False) -> None:
    """Leave what a training leaves, with an objective that follows from the settings."""
    run_dir, config = experiment.run_dir(member), experiment.member_config(member)
    objective = abs(config.optim.lr - 3e-3) * 100 + config.model.features / 10 + config.train.seed
    reports = [objective + 1] if pruned else [objective + 1, objective]
    lines = [{"kind": "validation", "epoch": i, "step": i, "objective": value} for i, value in enumerate(reports)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {"reason": "all done", "step": 2, "best": {"objective": min(reports)}}
    if pruned:
        rundir.write_pruned(run_dir, record)
        return
    pretend_finished(run_dir)
    rundir.write_end(run_dir, record)


def _sweep(experiment: Experiment, rng: random.Random, size: int = 6) -> Experiment:
    """Suggest and end all trials, of each generation in any order."""
    for first in range(0, size, experiment.growth.generation):
        numbers = list(range(first, min(first + experiment.growth.generation, size)))
        for member in rng.sample(numbers, len(numbers)):
            experiment = trials.advance(experiment.folder, member)
        for member in rng.sample(numbers, len(numbers)):
            _end(experiment, member)
    return trials.advance(experiment.folder, 0)


def _study(experiment: Experiment) -> list[tuple]:
    section = trials.sweep.load_sweep(experiment.folder / "sweep.yaml").optuna
    found = study.read(experiment.folder / trials.JOURNAL, section, experiment.config.name)
    return [(t.params, t.state.name, t.value, t.intermediate_values) for t in found.trials]


def _states(experiment: Experiment) -> list[str]:
    return [trial[1] for trial in _study(experiment)]


# --------------------------------------------------------------------------------------------------------- submitting


def test_the_first_generation_is_there_and_the_others_wait_for_it(config, tmp_path, capsys):
    experiment = _submit(config, tmp_path / "e", _file(tmp_path), evaluate=config.data.stores[0])
    assert experiment.size == 6 and len(experiment.members) == 2
    name, values = experiment.name(1), experiment.members[1].values
    assert name == f"t001-lr{values['optim.lr']:g}-features{values['model.features']}"
    written = load(RunConfig, experiment.config_file(1))
    assert (written.optim.lr, written.model.features) == tuple(values.values()) and written.train == config.train
    script = (experiment.folder / "slurm" / "train.sbatch").read_text()
    assert ' suggest "$experiment" "$SLURM_ARRAY_TASK_ID")' in script and "try_again=yes" in script
    said = capsys.readouterr().out
    assert "sbatch --parsable --array=0-1%8 slurm/train.sbatch" in said
    assert "'--dependency=afterany:<train 0-1%8>' --array=2-3%8 slurm/train.sbatch" in said
    assert "'--dependency=afterany:<train 2-3%8>' --array=4-5%8 slurm/train.sbatch" in said
    assert "'--dependency=afterany:<train 4-5%8>:<train 2-3%8>:<train 0-1%8>' slurm/evaluate.sbatch" in said
    found = status.read(experiment, now=time.time())
    assert [member.member for member in found[1:3]] == [name, "t002"]
    assert {member.state for member in found} == {"not submitted"}


@pytest.mark.parametrize(
    ("optuna", "said"),
    [
        ({"optim.lrr": {"uniform": [0.1, 0.2]}}, "unknown key 'optim.lrr' (did you mean 'lr'?"),
        ({"optim.lr": {"uniform": [-1.0, 1.0]}}, "optuna: optim.lr = -1.0: optim.lr: must be greater than 0"),
        ({"optim.clip_norm": {"uniform": [-1.0, 1.0]}}, "optim.clip_norm = -1.0: optim.clip_norm: must be greater"),
        ({"model.kind": {"choice": ["hipnn", "hippnn"]}}, "no model named 'hippnn'"),
        ({"model.features": {"integer": [2, 2]}}, "the range from 2 to 2 is none"),
        ({"model.features": {"integer": [2.5, 3]}}, "expected a whole number"),
        ({"model.features": {"log_integer": [0, 3]}}, "log_integer needs a lower end above 0"),
        ({"train.micro_batches_per_step": {"choice": [4, 3]}}, "does not divide train.micro_batches_per_step = 3"),
        ({"loss.unit": {"choice": ["eV", "kcal/mol"]}}, "loss.unit changes what the objective means"),
        ({"data.levels": {"choice": [{"gfn1": "E"}]}}, "data.levels changes what the objective means"),
        ({"transfer.model": {"choice": ["a", "b"]}}, "are paths: try them with a list or grid"),
        ({"trails": 3}, "optuna.trails: neither a key of this section nor a dotted key"),
        ({"sampler": {"kind": "TPESample"}}, "Optuna has no TPESample (did you mean 'TPESampler'?"),
        ({"generation": 0}, "optuna.generation: must be greater"),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(config, tmp_path, optuna, said):
    with pytest.raises(ConfigError) as error:
        _submit(config, tmp_path / "e", _file(tmp_path, **optuna))
    assert said in str(error.value) and not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optuna: {trials: 3}", "names no key of the config to draw"),
        (
            "optuna: {trials: 7, model.lmax: {choice: [0, 1]}, model.features: {integer: [3, 5]}}",
            "only 6; lower trials",
        ),
        ("{optuna: {trials: 3, optim.lr: {uniform: [1.0, 2.0]}}, grid: {model.lmax: [0]}}", "chooses all settings"),
        (
            "{optuna: {trials: 3, pruner: {kind: MedianPruner}, optim.lr: {uniform: [1.0, 2.0]}}, members: 2}",
            "a pruner judges one run",
        ),
        ("{optuna: {trials: 3, train.seed: {integer: [1, 9]}}, members: 2}", "train.seed is swept and members is 2"),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(config, tmp_path, text, said):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        _submit(config, tmp_path / "e", tmp_path / "sweep.yaml")
    assert said in str(error.value) and not (tmp_path / "e").exists()


# --------------------------------------------------------------------------------------------- whatever happens to jobs


def test_the_same_sweep_in_whatever_order_trials_begin_and_end(config, tmp_path):
    found = [_sweep(_submit(config, tmp_path / f"e{i}", _file(tmp_path)), random.Random(i)) for i in range(3)]
    assert found[0].members == found[1].members == found[2].members and len(found[0].members) == 6
    assert _study(found[0]) == _study(found[1]) == _study(found[2])
    assert _states(found[0]) == ["COMPLETE"] * 6 and not found[0].unfinished()


def test_a_worker_killed_anywhere_between_its_files_loses_nothing(config, tmp_path, monkeypatch):
    whole = _sweep(_submit(config, tmp_path / "whole", _file(tmp_path)), random.Random(0))
    cut = _submit(config, tmp_path / "cut", _file(tmp_path))
    for member in range(2):
        _end(cut, member)

    class Killed(BaseException):
        pass

    # in the order in which a worker comes there; of the files of the experiment, before each of them
    places = [(os, "replace", 0), (study, "flush", 0), *((experiments, "write_atomic", i) for i in range(6))]
    for module, name, calls in places:
        left, real = iter(range(calls)), getattr(module, name)

        def cut_off(*arguments, left=left, real=real):
            if next(left, None) is None:
                raise Killed
            real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, cut_off)
            with pytest.raises(Killed):
                trials.advance(cut.folder, 2)
    assert len(open_experiment(cut.folder).members) == 2
    assert trials.advance(cut.folder, 2).members == whole.members[:4]
    cut = _sweep(trials.advance(cut.folder, 2), random.Random(3))
    assert cut.members == whole.members and _study(cut) == _study(whole)


def test_jobs_that_start_together_agree(config, cli, tmp_path):
    experiment = _submit(config, tmp_path / "e", _file(tmp_path, generation=4, trials=8))
    for member in range(4):
        _end(experiment, member)
    command = [sys.executable, "-m", "hpcmlip", "suggest", str(experiment.folder)]
    jobs = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(4, 8)]
    names = [job.communicate(timeout=200)[0].strip() for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4
    experiment = open_experiment(experiment.folder)
    assert names == [experiment.name(i) for i in range(4, 8)] and len(set(names)) == 4
    assert _states(experiment) == ["COMPLETE"] * 4 + ["RUNNING"] * 4


def test_a_trial_waits_for_the_results_that_it_is_suggested_from(config, tmp_path, capsys):
    experiment = _submit(config, tmp_path / "e", _file(tmp_path))
    _end(experiment, 0)
    missing = experiment.name(1)
    with pytest.raises(RunError, match=rf"t003 is suggested from .* of which {missing} has not ended.*--retry"):
        trials.suggest(experiment.folder, 3)
    # this process works on it
    _note(experiment, 1, "started", f"local-{os.getpid()}@{socket.gethostname()}")
    capsys.readouterr()
    assert trials.suggest(experiment.folder, 3) == 75
    assert capsys.readouterr().out == "t003\n"
    _end(experiment, 1)
    assert trials.suggest(experiment.folder, 3) == 0
    assert capsys.readouterr().out == f"{open_experiment(experiment.folder).name(3)}\n"
    with pytest.raises(ConfigError, match="no sweep by Optuna with a trial 6"):
        trials.suggest(experiment.folder, 6)


def test_a_failed_trial_is_a_result_until_it_is_tried_again(config, tmp_path, capsys):
    experiment = _submit(config, tmp_path / "e", _file(tmp_path))
    _end(experiment, 0)
    _note(experiment, 1, "failed with exit code 1")
    experiment = trials.advance(experiment.folder, 2)
    assert _states(experiment) == ["COMPLETE", "FAIL", "RUNNING", "RUNNING"]
    _end(experiment, 2, pruned=True)
    _end(experiment, 3)
    capsys.readouterr()
    retry(experiment.folder, How(dry_run=True))
    said = capsys.readouterr().out
    assert f"To be trained: {experiment.name(1)}, t004, t005." in said
    assert "--array=1%8 " in said and "--array=4-5%8" in said
    _note(experiment, 1, "started")
    assert _states(trials.advance(experiment.folder, 0)) == ["COMPLETE", "RUNNING", "PRUNED", "COMPLETE"]
    _end(experiment, 1)
    assert _states(trials.advance(experiment.folder, 0)) == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"]


def test_a_sweep_in_which_everything_fails_does_not_go_on(config, tmp_path):
    experiment = _submit(config, tmp_path / "e", _file(tmp_path, generation=3))
    for member in range(3):
        _note(experiment, member, "failed with exit code 1")
    with pytest.raises(RunError, match="all 3 trials so far have failed, so no further one is suggested"):
        trials.advance(experiment.folder, 3)


def test_pruned_trials_are_shown_and_left_out(config, tmp_path, capsys):
    experiment = _submit(config, tmp_path / "e", _file(tmp_path, trials=2))
    _end(experiment, 0)
    _end(experiment, 1, pruned=True)
    assert experiment.unfinished() == []
    found = status.read(experiment, now=time.time())
    assert [member.state for member in found] == ["finished", "pruned"]
    assert status.lowest(found).member == experiment.name(0)
    capsys.readouterr()
    status.show(experiment.folder, as_json=False)
    assert "1 of 2 members finished, 1 pruned" in capsys.readouterr().out
    assert retry(experiment.folder, How()) == 0
    assert "nothing to do" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- larger, and seeds


def test_more_trials_later_are_those_of_a_larger_sweep(config, tmp_path):
    at_once = _sweep(_submit(config, tmp_path / "a", _file(tmp_path)), random.Random(0))
    experiment = _sweep(_submit(config, tmp_path / "b", _file(tmp_path, trials=3)), random.Random(0), size=3)
    assert len(experiment.members) == 3
    experiment = _submit(config, tmp_path / "b", _file(tmp_path))
    experiment = trials.advance(experiment.folder, 3)
    _end(experiment, 3)
    for member in (4, 5):
        experiment = trials.advance(experiment.folder, member)
        _end(experiment, member)
    assert trials.advance(experiment.folder, 0).members == at_once.members and _study(experiment) == _study(at_once)
    with pytest.raises(ConfigError, match=r"holds a sweep of 6 trials, .* asks for 5"):
        _submit(config, tmp_path / "b", _file(tmp_path, trials=5))
    with pytest.raises(ConfigError, match=r"is another sweep .* only 'trials' may change"):
        _submit(config, tmp_path / "b", _file(tmp_path, trials=8, generation=3))


def test_another_kind_of_experiment_is_not_gone_on_with(config, tmp_path):
    submit(
        config,
        tmp_path / "e",
        members=2,
        sweep_file=None,
        evaluate=None,
        split=None,
        min_members=None,
        how=How(dry_run=True),
    )
    (tmp_path / "e" / "member_00" / "log.txt").touch()
    with pytest.raises(ConfigError, match="holds an experiment without Optuna"):
        _submit(config, tmp_path / "e", _file(tmp_path))


def test_members_of_a_trial_are_seeds_and_its_value_their_mean(config, tmp_path):
    experiment = _submit(config, tmp_path / "e", _file(tmp_path, members=2))
    assert experiment.size == 12 and [m.values["train.seed"] for m in experiment.members] == [11, 12, 11, 12]
    assert experiment.generations(range(12)) == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    for member in range(3):
        _end(experiment, member)
    with pytest.raises(RunError, match="t004 is suggested"):
        trials.advance(experiment.folder, 4)
    _end(experiment, 3)
    experiment = trials.advance(experiment.folder, 4)
    assert len(experiment.members) == 8
    values = [value for _, _, value, _ in _study(experiment)[:2]]
    best = [json.loads((experiment.run_dir(i) / "done.json").read_text())["best"]["objective"] for i in range(4)]
    assert values == [pytest.approx(sum(pair) / 2) for pair in (best[:2], best[2:])]
