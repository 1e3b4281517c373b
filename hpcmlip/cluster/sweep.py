"""SWEEP.yaml: which settings a sweep tries; expansion into trials is a pure function of the file and the config.

```yaml
grid: {optim.lr: [1.0e-3, 5.0e-4], model.features: [64, 128]}          # every combination
random: {count: 20, seed: 0, optim.lr: {log_uniform: [1.0e-5, 1.0e-2]}, model.features: {choice: [32, 64]}}
list: [{model.kind: hipnn, model.lmax: 2}, {model.kind: hipnn, model.lmax: 0}]
members: 2                                                             # seeds of each trial
```
Of grid, random and list any may be left out; where several are given, each entry of one meets each of the others. A
trial is what its complete config says: a sweep that is made larger later keeps the trials that are there.

```yaml
optuna:                                                                # in their place: Optuna chooses
  trials: 20
  generation: 4
  sampler: {kind: TPESampler, seed: 0}
  pruner: {kind: MedianPruner, n_warmup_steps: 2}
  optim.lr: {log_uniform: [1.0e-5, 1.0e-2]}
  model.features: {integer: [16, 64]}
```
"""

import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from hpcmlip.cluster.experiment import Experiment, Member, identity
from hpcmlip.config import Count, RunConfig, Section, changed, load
from hpcmlip.errors import ConfigError

SEED = "train.seed"
_DIGITS = 4
"""Significant digits of a number that is drawn, so that the name of the trial can show all of it."""
_NAME_LENGTH = 80
_DRAWS = 1000
"""Draws of a whole trial in a row that may repeat earlier ones before the space counts as exhausted."""

Trial = dict[str, Any]
"""Dotted key -> value."""


class Draw(Section):
    """How a value is drawn: one of these."""

    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    """Uniform in the logarithm."""
    integer: tuple[int, int] | None = None
    """A whole number from the first to the last."""
    log_integer: tuple[int, int] | None = None
    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check(self):
        given = [key for key in Draw.model_fields if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(Draw.model_fields)}, not {' and '.join(given) or 'none'}")
        low, high = self.range or (1, 2)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"the range from {low:g} to {high:g} is none")
        if self.is_log and low <= 0:
            raise ValueError(f"{given[0]} needs a lower end above 0, not {low:g}")
        return self

    @property
    def range(self) -> tuple[float, float] | None:
        """Both ends; None of a choice."""
        return self.uniform or self.log_uniform or self.integer or self.log_integer

    @property
    def is_log(self) -> bool:
        return self.log_uniform is not None or self.log_integer is not None

    @property
    def is_integer(self) -> bool:
        return self.integer is not None or self.log_integer is not None

    @property
    def ends(self) -> tuple[Any, ...]:
        """What can be tried of it beforehand: both ends of a range, all of a choice."""
        return self.range or self.choice

    @property
    def count(self) -> float:
        """How many different values there are."""
        if self.choice is not None:
            return len(self.choice)
        low, high = self.range
        return high - low + 1 if self.is_integer else math.inf

    def value(self, generator: random.Random) -> Any:
        """The next value."""
        if self.choice is not None:
            return generator.choice(self.choice)
        # the share of a whole number reaches half way to its neighbours
        margin = 0.5 if self.is_integer else 0.0
        low, high = self.range[0] - margin, self.range[1] + margin
        if self.is_log:
            return self.rounded(math.exp(generator.uniform(math.log(low), math.log(high))))
        return self.rounded(generator.uniform(low, high))

    def rounded(self, drawn: float) -> float:
        """A number of the range with as many digits as the name of a trial shows."""
        low, high = self.range
        return min(max(round(drawn) if self.is_integer else float(f"{drawn:.{_DIGITS}g}"), low), high)


def _dotted(key: str) -> str:
    if "." not in key:
        raise ValueError("neither a key of this section nor a dotted key of the config")
    return key


class Drawn(Section):
    """Beside its own keys, dotted keys of the config with a `Draw` each."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Annotated[str, AfterValidator(_dotted)], Draw]

    @model_validator(mode="after")
    def _check(self):
        if not self.draws:
            raise ValueError("names no key of the config to draw, such as optim.lr: {log_uniform: [1.0e-5, 1.0e-2]}")
        return self

    @property
    def draws(self) -> dict[str, Draw]:
        """Dotted key -> how its value is drawn."""
        return self.model_extra


class RandomSection(Drawn):
    """Trials drawn at random."""

    count: Count
    seed: Annotated[int, Field(ge=0)] = 0


class Component(Section):
    """A part of Optuna by the name of its class; beside `kind`, options of that class."""

    model_config = ConfigDict(extra="allow")
    kind: str

    @property
    def options(self) -> dict[str, Any]:
        return self.model_extra


class Sampler(Component):
    kind: str = "TPESampler"
    seed: Annotated[int, Field(ge=0)] = 0


class OptunaSection(Drawn):
    """Trials that Optuna chooses, generation by generation from the results of those before."""

    trials: Count
    generation: Count = 4
    """Trials that are suggested together, and the most that run at once. All of them end before the next generation."""
    sampler: Sampler = Sampler()
    pruner: Component | None = None
    """Ends a trial early where those before were better; its steps are epochs, counted from 0. None: never."""

    @model_validator(mode="after")
    def _check_space(self):
        changing = next((key for key in self.draws if changes_objective(key)), None)
        if changing is not None:
            raise ValueError(f"{changing} changes what the objective means, so trials could not be compared")
        if any(key in RunConfig.path_keys for key in self.draws):
            raise ValueError(f"{', '.join(RunConfig.path_keys)} are paths: try them with a list or grid")
        count = math.prod(draw.count for draw in self.draws.values())
        if count < self.trials:
            raise ValueError(f"there are no {self.trials} different trials, only {count:g}; lower trials")
        return self


class Sweep(Section):
    """SWEEP.yaml."""

    grid: Annotated[dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]], Field(min_length=1)] | None = None
    random: RandomSection | None = None
    list: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)] | None = None
    optuna: OptunaSection | None = None
    members: Count = 1
    """Members of each trial, which differ in their seed."""

    @model_validator(mode="after")
    def _check(self):
        drawn = [section.draws for section in (self.random, self.optuna) if section]
        keys = [set(part) for part in (self.grid, *drawn) if part]
        keys += [set().union(*self.list)] if self.list else []
        if not keys or not all(keys):
            raise ValueError("asks for no setting: give a grid, random or list of them, or optuna")
        if self.optuna and len(keys) > 1:
            raise ValueError("optuna chooses all settings: leave out grid, random and list, or leave out optuna")
        if self.optuna and self.optuna.pruner and self.members > 1:
            raise ValueError("a pruner judges one run, but members is more than 1: leave out one of them")
        twice = [key for a, b in itertools.combinations(keys, 2) for key in a & b]
        if twice:
            raise ValueError(f"'{min(twice)}' is given in two places of grid, random and list: leave it in one")
        if self.members > 1 and any(SEED in part for part in keys):
            raise ValueError(f"{SEED} is swept and members is {self.members}, which sets it too: leave out one of them")
        return self


def changes_objective(key: str) -> bool:
    """Whether trials that differ in this key of the config have objectives of different kinds."""
    return key in ("loss", "data") or key.startswith(("loss.", "data.stores", "data.levels"))


def load_sweep(path: Path) -> Sweep:
    """The sweep of a YAML file; raises ConfigError naming file and key."""
    return load(Sweep, path)


def trials(sweep: Sweep, seed: int) -> list[Trial]:
    """All trials in order; `seed`: that of the config, with which the members of a trial begin."""
    parts: list[Iterable[Trial]] = [sweep.list] if sweep.list else []
    if sweep.grid:
        combinations = itertools.product(*sweep.grid.values())
        parts.append([dict(zip(sweep.grid, values, strict=True)) for values in combinations])
    if sweep.random:
        parts.append(list(_drawn(sweep.random)))
    if sweep.members > 1:
        parts.append([{SEED: seed + i} for i in range(sweep.members)])
    return [{key: value for entry in entries for key, value in entry.items()} for entries in itertools.product(*parts)]


def members(sweep: Sweep, config: RunConfig, path: Path, before: Experiment | None) -> tuple[Member, ...]:
    """Members of the experiment, each a trial once: first those of `before`, under their names. `path`: SWEEP.yaml.

    Raises ConfigError naming the trial and the key where a config would be wrong.
    """
    asked: dict[str, tuple[Trial, Trial]] = {}
    for trial in trials(sweep, config.train.seed):
        made = changed(config, trial, path.parent, where=f"{path}: the trial {_text(trial)}")
        # as the config has it: with absolute paths
        values = json.loads(made.model_dump_json(exclude_unset=True))
        asked.setdefault(identity(made), (trial, {key: _at(values, key) for key in trial}))
    there = {identity(before.member_config(i)): member for i, member in enumerate(before.members)} if before else {}
    kept = [Member(member.name, asked[key][1]) for key, member in there.items() if key in asked]
    short = short_keys({key for trial, _ in asked.values() for key in trial})
    new = [found for key, found in asked.items() if key not in there]
    return (*kept, *(Member(name(len(there) + i, trial, short), values) for i, (trial, values) in enumerate(new)))


def name(number: int, trial: Trial, short: Mapping[str, str]) -> str:
    """Name of a trial's run directory, such as t003-lr0.0005-features64."""
    parts = [f"t{number:03d}", *(f"{short[key]}{_readable(value)}" for key, value in trial.items())]
    return "-".join(parts)[:_NAME_LENGTH]


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Dotted key -> its last words, as many as tell it from the others: optim.lr -> lr."""
    split = {key: key.split(".") for key in keys}
    ends = [".".join(words[i:]) for words in split.values() for i in range(len(words))]
    return {
        key: next((end for i in range(len(words))[::-1] if ends.count(end := ".".join(words[i:])) == 1), key)
        for key, words in split.items()
    }


def _readable(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        text = value if isinstance(value, str) else json.dumps(value)
        return "_" + re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_")
    return f"{value:.6g}"


def _at(values: dict, key: str) -> Any:
    for word in key.split("."):
        values = values[word]
    return values


def _drawn(section: RandomSection) -> Iterator[Trial]:
    """`count` different trials; a larger count begins with the same ones."""
    generator = random.Random(section.seed)
    seen: set[str] = set()
    while len(seen) < section.count:
        for _ in range(_DRAWS):
            trial = {key: draw.value(generator) for key, draw in section.draws.items()}
            if _text(trial) not in seen:
                break
        else:
            raise ConfigError(f"random: there are no {section.count} different trials, only {len(seen)}; lower count")
        seen.add(_text(trial))
        yield trial


def _text(trial: Mapping[str, Any]) -> str:
    return json.dumps(trial, sort_keys=True)
