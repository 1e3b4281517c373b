"""Optuna's part of a sweep: its samplers and pruners asked about one trial, its journal written and read.

Suggestions and the pruner's verdicts are pure functions of the section in SWEEP.yaml and of the trials before: a trial
sees the results of earlier generations, of its own generation the settings of those with lower numbers, and a seed made
of the section's and its number. So it does not matter which job asks, when, how often, or in which order trials end.
`study.journal` is what Optuna's JournalStorage makes of the trials; Optuna and its dashboard open it. Nothing of it is
ever unpickled.
"""

import contextlib
import importlib.util
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcmlip.cluster.sweep import Component, Draw, OptunaSection, Trial
from hpcmlip.errors import ConfigError, RunError, UserError
from hpcmlip.files import flush
from hpcmlip.plugins import suggest

if TYPE_CHECKING:
    import optuna

SAMPLERS = ("TPESampler", "GPSampler", "RandomSampler", "QMCSampler", "NSGAIISampler", "BruteForceSampler")
REFUSED = {
    "CmaEsSampler": "it keeps pickled objects in its journal, and nothing is ever unpickled here",
    "GridSampler": "that is what the section grid of SWEEP.yaml is for",
    "PartialFixedSampler": "set what is fixed in RUN.yaml instead",
    "NSGAIIISampler": "it is for several objectives, and a run has one",
}
"""Samplers of Optuna that a sweep cannot have -> why."""

_SEEDED_ONCE = ("QMCSampler",)
"""Samplers whose seed is that of one sequence for all trials."""
_ATTEMPTS = 20
"""Suggestions for a trial that may make no valid config, or repeat an earlier trial."""
_REHEARSED = 12
"""Trials with invented results by which a section is checked; most samplers begin with ten random ones."""
_PRUNER = "pruner"
"""User attribute of a trial in which its pruner keeps what it must remember of it."""


@dataclass(frozen=True)
class Outcome:
    """What became of a trial."""

    state: str
    """COMPLETE, PRUNED or FAIL; RUNNING where it has not ended."""
    value: float | None = None
    """Best validation objective."""
    reports: Mapping[int, float] = field(default_factory=dict)
    """Epoch -> validation objective."""


@dataclass(frozen=True)
class Study:
    """Trials 0, 1, ... that were suggested so far."""

    section: OptunaSection
    name: str
    trials: tuple["optuna.trial.FrozenTrial", ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """What the sampler keeps about the study as a whole."""

    def first_of_generation(self, number: int) -> int:
        """The trial with which the generation of a trial begins; it sees the results of those before."""
        return number - number % self.section.generation

    def values(self, number: int) -> Trial:
        """Settings of a trial."""
        params = self.trials[number].params
        return {key: _setting(draw, params[key]) for key, draw in self.section.draws.items()}

    def ask(self, check: Callable[[Trial], None]) -> "Study":
        """With one trial more, whose settings `check` accepts (it raises ConfigError otherwise) and that are new, as
        far as the sampler has new ones. Raises ConfigError if none is accepted."""
        tried = [self.values(number) for number in range(len(self.trials))]
        attributes, repeated, refused = self.attributes, None, ""
        for attempt in range(_ATTEMPTS):
            trial, attributes = self._suggestion(attempt, attributes)
            found = replace(self, trials=(*self.trials, trial), attributes=attributes)
            values = found.values(len(self.trials))
            try:
                check(values)
            except ConfigError as error:
                refused = str(error)
                continue
            if values not in tried:
                return found
            repeated = repeated or found
        if repeated is None:
            raise ConfigError(f"none of {_ATTEMPTS} suggestions in a row makes a valid config; of the last, {refused}")
        return repeated

    def end(self, number: int, outcome: Outcome | None) -> "Study":
        """With what became of a trial; None: it has not ended (again)."""
        optuna, old, outcome = _optuna(), self.trials[number], outcome or Outcome("RUNNING")
        state = optuna.trial.TrialState[outcome.state]
        if (old.state, old.value, old.intermediate_values) == (state, outcome.value, outcome.reports):
            return self
        kept = self.judge(number, outcome.reports)[1] if self.section.pruner else {}
        new = optuna.trial.create_trial(
            state=state,
            value=outcome.value,
            params=old.params,
            distributions=old.distributions,
            system_attrs=old.system_attrs,
            user_attrs={_PRUNER: kept} if kept else {},
            intermediate_values=dict(outcome.reports),
        )
        new.datetime_start = old.datetime_start
        return replace(self, trials=(*self.trials[:number], new, *self.trials[number + 1 :]))

    def judge(self, number: int, reports: Mapping[int, float]) -> tuple[bool, dict[str, Any]]:
        """Whether the pruner would end the trial after the last of these reports (epoch -> objective), and what it has
        to remember of the trial."""
        pruner = _pruner(self.section.pruner)
        storage, view = self._view(number, None, pruner, self.attributes)
        trial_id = storage.create_new_trial(view._study_id, self._unfinished(number))
        before, verdict = dict(self.trials[number].system_attrs), False
        with _quiet():
            for step, value in sorted(reports.items()):
                storage.set_trial_intermediate_value(trial_id, step, value)
                verdict = pruner.prune(view, storage.get_trial(trial_id))
        after = storage.get_trial(trial_id).system_attrs
        return verdict, {key: value for key, value in after.items() if key not in before}

    def _suggestion(self, attempt: int, attributes: Mapping) -> tuple["optuna.trial.FrozenTrial", dict[str, Any]]:
        """The next trial, and what the sampler then keeps about the study."""
        optuna, number, section = _optuna(), len(self.trials), self.section
        own = int(np.random.SeedSequence([section.sampler.seed, number, attempt]).generate_state(1)[0])
        storage, view = self._view(number, _sampler(section, own), _pruner(section.pruner), attributes)
        with _quiet():
            asked = view.ask({key: _distribution(draw) for key, draw in section.draws.items()})
        found = storage.get_trial(asked._trial_id)
        ranges = {key: draw for key, draw in section.draws.items() if draw.range}
        params = found.params | {key: draw.rounded(found.params[key]) for key, draw in ranges.items()}
        trial = optuna.trial.create_trial(
            state=found.state, params=params, distributions=found.distributions, system_attrs=found.system_attrs
        )
        return trial, storage.get_study_system_attrs(view._study_id)

    def _view(self, number: int, sampler, pruner, attributes: Mapping):
        """(storage, study) in memory of what trial `number` sees."""
        optuna = _optuna()
        storage = optuna.storages.InMemoryStorage()
        view = optuna.create_study(storage=storage, study_name=self.name, sampler=sampler, pruner=pruner)
        for key, value in attributes.items():
            storage.set_study_system_attr(view._study_id, key, value)
        first = self.first_of_generation(number)
        for trial in self.trials[:first]:
            seen = optuna.trial.create_trial(
                state=trial.state,
                value=trial.value,
                params=trial.params,
                distributions=trial.distributions,
                system_attrs=trial.system_attrs | trial.user_attrs.get(_PRUNER, {}),
                intermediate_values=trial.intermediate_values,
            )
            view.add_trial(seen)
        view.add_trials([self._unfinished(other) for other in range(first, number)])
        return storage, view

    def _unfinished(self, number: int) -> "optuna.trial.FrozenTrial":
        optuna, trial = _optuna(), self.trials[number]
        return optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            params=trial.params,
            distributions=trial.distributions,
            system_attrs=trial.system_attrs,
        )


# ---------------------------------------------------------------------------------------------- samplers and pruners


def check(section: OptunaSection) -> None:
    """Raises ConfigError for a sampler, a pruner or options of them that Optuna does not have or does not take."""
    _class("samplers", section.sampler, SAMPLERS)
    if section.pruner:
        _pruner(section.pruner)
    # one by one, so that the sampler begins to look at results
    study = Study(section.model_copy(update={"generation": 1}), "rehearsal")
    for number in range(min(section.trials, _REHEARSED)):
        reports = {epoch: 1.0 / (epoch + number) for epoch in (1, 2, 3)}
        try:
            study = study.ask(lambda _: None).end(number, Outcome("COMPLETE", min(reports.values()), reports))
        except UserError:
            raise
        except Exception as error:  # whatever Optuna raises where an option is of the wrong type
            parts = [part.kind for part in (section.sampler, section.pruner) if part]
            raise ConfigError(f"optuna: {' with '.join(parts)} does not work with these options: {error}") from None


def _sampler(section: OptunaSection, seed: int):
    sampler = section.sampler
    options = dict(sampler.options) | {"seed": seed}
    if sampler.kind in _SEEDED_ONCE:
        independent = _optuna().samplers.RandomSampler(seed=seed)
        options |= {"seed": sampler.seed, "independent_sampler": independent}
    return _made("sampler", _class("samplers", sampler, SAMPLERS), options)


def _pruner(section: Component | None):
    optuna = _optuna()
    if section is None:
        return optuna.pruners.NopPruner()
    known = [name for name in dir(optuna.pruners) if name.endswith("Pruner") and name != "BasePruner"]
    options = dict(section.options)
    if isinstance(options.get("wrapped_pruner"), dict):
        wrapped = options["wrapped_pruner"]
        options["wrapped_pruner"] = _pruner(Component(**wrapped | {"kind": str(wrapped.get("kind"))}))
    return _made("pruner", _class("pruners", section, known), options)


def _class(module: str, section: Component, known) -> type:
    what = module.removesuffix("s")
    if section.kind in REFUSED:
        raise ConfigError(f"optuna.{what}: {section.kind} cannot be had: {REFUSED[section.kind]}")
    if section.kind not in known:
        raise ConfigError(f"optuna.{what}: Optuna has no {section.kind}{suggest(section.kind, known)}")
    found = getattr(getattr(_optuna(), module), section.kind)
    # what takes code or other objects cannot be written in YAML
    options = [
        name
        for name, parameter in inspect.signature(found).parameters.items()
        if not any(word in str(parameter.annotation) for word in ("Callable", "BaseS", "BaseM", "BaseC"))
    ]
    unknown = next((name for name in section.options if name not in options), None)
    if unknown is not None:
        raise ConfigError(f"optuna.{what}: {section.kind} has no option '{unknown}'{suggest(unknown, options)}")
    return found


def _made(what: str, cls: type, options: dict):
    try:
        with _quiet():
            return cls(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optuna.{what}: {cls.__name__} refuses its options: {error}") from None


def _distribution(draw: Draw):
    distributions = _optuna().distributions
    if draw.choice is not None:
        return distributions.CategoricalDistribution([_label(item) for item in draw.choice])
    kind = distributions.IntDistribution if draw.is_integer else distributions.FloatDistribution
    return kind(*draw.range, log=draw.is_log)


def _setting(draw: Draw, param: Any) -> Any:
    """Value of the config for a parameter of Optuna."""
    if draw.choice is None:
        return param
    return next(item for item in draw.choice if _label(item) == param)


def _label(item: Any) -> Any:
    """An item of a choice as Optuna knows it: plain values only."""
    return json.dumps(item) if isinstance(item, list | dict) else item


# ----------------------------------------------------------------------------------------------------------- journal


def read(path: Path, section: OptunaSection, name: str) -> Study:
    """The study in a journal, which may be absent; raises RunError if it is damaged."""
    optuna = _optuna()
    if not path.exists():
        return Study(section, name)
    try:
        storage = _journal(path)
        found = optuna.load_study(study_name=None, storage=storage)
        trials, attributes = found.get_trials(), storage.get_study_system_attrs(found._study_id)
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise RunError(
            f"{path} is damaged ({error}): restore it from a copy, or submit with another --run-dir"
        ) from None
    return Study(section, name, tuple(trials), attributes)


def write(path: Path, study: Study) -> None:
    """Replace the journal in one step; only one process at a time."""
    for rest in path.parent.glob(f".{path.name}.*"):  # of one that was killed
        rest.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    storage = _journal(temporary)
    written = _optuna().create_study(storage=storage, study_name=study.name)
    for key, value in study.attributes.items():
        storage.set_study_system_attr(written._study_id, key, value)
    written.add_trials(study.trials)
    os.replace(temporary, path)
    flush(path.parent)


def _journal(path: Path):
    storages = _optuna().storages
    # each write takes Optuna's own lock besides; a symbolic link is atomic on every version of NFS
    lock = storages.journal.JournalFileSymlinkLock(str(path))
    return storages.JournalStorage(storages.journal.JournalFileBackend(str(path), lock_obj=lock))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Optuna warns of, such as experimental options: the user has chosen them by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _optuna():
    """The package; a second to import, and only some sweeps need it. Raises ConfigError where it is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("a sweep with the section optuna needs Optuna: pip install 'hpcmlip[optuna]'")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
