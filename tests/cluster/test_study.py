"""What Optuna suggests and ends: a function of the file, the number of the trial and the generations before."""

import itertools
import json
import math
import pickle
import random
from pathlib import Path

import pytest
import yaml

from hpcmlip.cluster import study, sweep
from hpcmlip.cluster.study import SAMPLERS, Outcome, Study
from hpcmlip.cluster.sweep import OptunaSection, Trial
from hpcmlip.errors import ConfigError, RunError

SPACE = {
    "optim.lr": {"log_uniform": [1e-4, 1e-1]},
    "model.features": {"log_integer": [4, 64]},
    "optim.kind": {"choice": ["adam", "yogi"]},
    "optim.betas": {"choice": [[0.9, 0.99], [0.9, 0.999]]},
}
FINITE = {"optim.lr": {"choice": [1e-3, 1e-2, 1e-1]}, "model.features": {"integer": [3, 7]}}


def _section(tmp_path: Path, space=SPACE, **options) -> OptunaSection:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"optuna": {"trials": 9, "generation": 3} | options | space}))
    return sweep.load_sweep(path).optuna


def _sampler(kind: str) -> dict:
    startup = {"TPESampler": {"n_startup_trials": 2}, "GPSampler": {"n_startup_trials": 2}}
    return {"kind": kind, "seed": 3} | startup.get(kind, {"population_size": 3} if kind == "NSGAIISampler" else {})


def _outcome(values: Trial) -> Outcome:
    """What a training would tell: best near a learning rate of 3e-3, reported over three epochs."""
    value = abs(math.log(values["optim.lr"] / 3e-3)) + values["model.features"] / 100
    return Outcome("COMPLETE", value, {0: value + 2, 1: value + 1, 2: value})


def _run(found: Study, trials: int, rng: random.Random, journal: Path | None = None) -> Study:
    """A sweep whose trials end in any order, by as many processes as there are steps if there is a journal."""
    section = found.section
    for first in range(0, trials, section.generation):
        numbers = list(range(first, min(first + section.generation, trials)))
        for _ in numbers[len(found.trials) - first :]:
            found = found.ask(lambda _: None)
        for number in rng.sample(numbers, len(numbers)):
            if journal is not None:
                study.write(journal, found)
                found = study.read(journal, section, found.name)
            found = found.end(number, _outcome(found.values(number)))
    return found


def _told(found: Study) -> list[tuple]:
    return [
        (found.values(i), t.state, t.value, t.intermediate_values, t.system_attrs) for i, t in enumerate(found.trials)
    ]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_suggestions_do_not_depend_on_order_or_process(tmp_path, kind):
    space = FINITE if kind == "BruteForceSampler" else SPACE
    section = _section(tmp_path, space, sampler=_sampler(kind))
    study.check(section)
    once = _run(Study(section, "a"), 9, random.Random(0))
    again = _run(Study(section, "a"), 9, random.Random(1), tmp_path / "study.journal")
    assert _told(once) == _told(again)
    values = [once.values(number) for number in range(9)]
    assert all(values.count(value) == 1 for value in values)
    other = _section(tmp_path, space, sampler=_sampler(kind) | {"seed": 4})
    assert [_run(Study(other, "a"), 9, random.Random(0)).values(i) for i in range(9)] != values


@pytest.mark.parametrize("kind", ["TPESampler", "GPSampler"])
def test_a_trial_sees_the_generations_before_and_no_other_result(tmp_path, kind):
    section = _section(tmp_path, sampler=_sampler(kind))
    before = _run(Study(section, "a"), 3, random.Random(0))
    asked = before.ask(lambda _: None)
    ended = asked.end(3, Outcome("COMPLETE", -100.0))
    assert ended.ask(lambda _: None).values(4) == asked.ask(lambda _: None).values(4)
    worse = before
    for number in range(3):
        worse = worse.end(number, Outcome("COMPLETE", -before.trials[number].value))
    assert worse.ask(lambda _: None).values(3) != asked.values(3)


@pytest.mark.parametrize("kind", ["TPESampler", "QMCSampler", "NSGAIISampler"])
def test_a_sweep_made_larger_is_the_sweep_asked_at_once(tmp_path, kind):
    section = _section(tmp_path, sampler=_sampler(kind))
    at_once = _run(Study(section, "a"), 9, random.Random(0))
    for trials in (1, 4, 5):
        part = _run(Study(section, "a"), trials, random.Random(0))
        assert _told(_run(part, 9, random.Random(0))) == _told(at_once)


def test_values_are_those_of_the_space_with_few_digits(tmp_path):
    found = _run(Study(_section(tmp_path, trials=12), "a"), 12, random.Random(0))
    for values, trial in zip((found.values(i) for i in range(12)), found.trials, strict=True):
        assert 1e-4 <= values["optim.lr"] <= 1e-1 and values["optim.lr"] == float(f"{values['optim.lr']:.4g}")
        assert isinstance(values["model.features"], int) and 4 <= values["model.features"] <= 64
        assert values["optim.betas"] in ([0.9, 0.99], [0.9, 0.999])
        assert trial.params["optim.lr"] == values["optim.lr"]
    assert found.trials[0].params["optim.betas"] in ("[0.9, 0.99]", "[0.9, 0.999]")


def test_what_makes_no_config_is_not_suggested_nor_is_anything_twice(tmp_path):
    section = _section(tmp_path, FINITE, trials=15, sampler={"kind": "RandomSampler"})

    def even(values: Trial) -> None:
        if values["model.features"] % 2:
            raise ConfigError("odd")

    found = Study(section, "a")
    for _ in range(4):
        found = found.ask(even)
    values = [found.values(i) for i in range(4)]
    assert all(values.count(value) == 1 and value["model.features"] in (4, 6) for value in values)

    def none(values: Trial) -> None:
        raise ConfigError("nothing is right")

    with pytest.raises(ConfigError, match="none of 20 suggestions in a row makes a valid config; of the last, nothing"):
        found.ask(none)


# -------------------------------------------------------------------------------------------------------- the pruner


@pytest.mark.parametrize(
    "pruner",
    [
        {"kind": "MedianPruner", "n_startup_trials": 1},
        {"kind": "PercentilePruner", "percentile": 30.0, "n_startup_trials": 1},
        {"kind": "SuccessiveHalvingPruner", "min_resource": 1, "reduction_factor": 2},
        {"kind": "HyperbandPruner", "min_resource": 1, "max_resource": 3, "reduction_factor": 2},
        {"kind": "PatientPruner", "patience": 0, "wrapped_pruner": {"kind": "MedianPruner", "n_startup_trials": 1}},
    ],
    ids=lambda pruner: pruner["kind"],
)
def test_verdicts_do_not_depend_on_the_own_generation(tmp_path, pruner):
    section = _section(tmp_path, pruner=pruner)
    study.check(section)
    before = _run(Study(section, "a"), 6, random.Random(0))
    for _ in range(3):
        before = before.ask(lambda _: None)
    assert all(before.judge(number, {0: 1e3, 1: 2e3, 2: 3e3})[0] for number in (6, 7, 8))
    assert not any(before.judge(number, {0: -1e3, 1: -2e3, 2: -3e3})[0] for number in (6, 7, 8))
    reports = {0: 3.0, 1: 2.5}
    after = before.end(7, Outcome("COMPLETE", -50.0, {0: -50.0, 1: -60.0, 2: -70.0}))
    after = after.end(8, Outcome("PRUNED", -50.0, {0: -50.0}))
    study.write(tmp_path / "study.journal", after)
    after = study.read(tmp_path / "study.journal", section, "a")
    assert after.judge(6, reports) == before.judge(6, reports)


def test_a_value_that_is_no_number_is_pruned_and_told(tmp_path):
    section = _section(tmp_path, pruner={"kind": "MedianPruner", "n_startup_trials": 1})
    found = _run(Study(section, "a"), 3, random.Random(0)).ask(lambda _: None)
    assert found.judge(3, {0: math.nan})[0]
    study.write(tmp_path / "study.journal", found.end(3, Outcome("PRUNED", None, {0: math.nan})))
    trial = study.read(tmp_path / "study.journal", section, "a").trials[3]
    assert trial.state.name == "PRUNED" and trial.value is None


# ------------------------------------------------------------------------------------------------------- the journal


def test_the_journal_is_optunas_own_and_holds_no_pickle(tmp_path, monkeypatch):
    import optuna

    section, path = _section(tmp_path), tmp_path / "study.journal"
    found = _run(Study(section, "a"), 6, random.Random(0))
    study.write(path, found)
    assert all(json.loads(line) for line in path.read_text().splitlines())
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    assert _told(study.read(path, section, "a")) == _told(found)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    opened = optuna.load_study(study_name="a", storage=storage)
    assert opened.best_value == min(trial.value for trial in found.trials)


def test_a_killed_writer_costs_nothing(tmp_path):
    section, path = _section(tmp_path), tmp_path / "study.journal"
    study.write(path, Study(section, "a").ask(lambda _: None))
    written = path.read_bytes()
    for rest in (".study.journal.99", ".study.journal.99.lock"):
        (tmp_path / rest).write_bytes(written[:100])
    assert len(study.read(path, section, "a").trials) == 1
    study.write(path, study.read(path, section, "a"))
    assert sorted(item.name for item in tmp_path.iterdir()) == ["study.journal", "sweep.yaml"]


def test_a_damaged_journal_is_named(tmp_path):
    section, path = _section(tmp_path), tmp_path / "study.journal"
    study.write(path, Study(section, "a").ask(lambda _: None))
    for content in (path.read_bytes()[:-40] + b"\n{}\n", b"\0" * 100 + b"\n\n", b'{"op_code": 4}\n'):
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"study\.journal is damaged .*: restore it"):
            study.read(path, section, "a")


# ---------------------------------------------------------------------------------------------------- wrong settings


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampler": {"kind": "TPESample"}}, "Optuna has no TPESample (did you mean 'TPESampler'?"),
        ({"sampler": {"kind": "CmaEsSampler"}}, "nothing is ever unpickled"),
        ({"sampler": {"kind": "GridSampler"}}, "section grid"),
        ({"sampler": {"n_startup": 3}}, "has no option 'n_startup' (did you mean 'n_startup_trials'?"),
        ({"sampler": {"gamma": "x"}}, "has no option 'gamma'"),
        ({"sampler": {"n_startup_trials": "many"}}, "TPESampler does not work with these options"),
        ({"sampler": {"kind": "QMCSampler", "qmc_type": "sobl"}}, "QMCSampler refuses its options"),
        ({"sampler": {"kind": "BruteForceSampler"}}, "BruteForceSampler does not work"),
        ({"pruner": {"kind": "MedianPrune"}}, "Optuna has no MedianPrune (did you mean 'MedianPruner'?"),
        ({"pruner": {"kind": "MedianPruner", "n_warmup": 1}}, "did you mean 'n_warmup_steps'?"),
        ({"pruner": {"kind": "MedianPruner", "n_warmup_steps": -1}}, "cannot be negative"),
        ({"pruner": {"kind": "PatientPruner"}}, "refuses its options"),
        ({"pruner": {"kind": "PatientPruner", "patience": 1, "wrapped_pruner": {}}}, "Optuna has no None"),
    ],
)
def test_what_optuna_does_not_have_or_take_is_named(tmp_path, options, said):
    with pytest.raises(ConfigError) as error:
        study.check(_section(tmp_path, **options))
    assert said in str(error.value), error.value


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(study.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'hpcmlip\[optuna\]'"):
        study.check(_section(tmp_path))


def test_all_samplers_of_optuna_are_known_or_refused_with_a_reason():
    import optuna

    theirs = {name for name in optuna.samplers.__all__ if name.endswith("Sampler") and not name.startswith("Base")}
    assert theirs == {*SAMPLERS, *study.REFUSED}
    assert not set(SAMPLERS) & set(study.REFUSED)
    assert len(list(itertools.chain(SAMPLERS, study.REFUSED))) == len(theirs)
