"""SWEEP.yaml: which settings a sweep tries; expansion into trials is a pure function of the file and the config.

```yaml
grid: {optim.lr: [1.0e-3, 5.0e-4], model.features: [64, 128]}          # every combination
random: {count: 20, seed: 0, optim.lr: {log_uniform: [1.0e-5, 1.0e-2]}, model.features: {choice: [32, 64]}}
list: [{model.kind: hipnn, model.lmax: 2}, {model.kind: hipnn, model.lmax: 0}]
members: 2                                                             # seeds of each trial
```
Of grid, random and list any may be left out; where several are given, each entry of one meets each of the others. A
trial is what its complete config says: a sweep that is made larger later keeps the trials that are there.
"""

import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

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
    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check(self):
        given = [key for key in Draw.model_fields if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(Draw.model_fields)}, not {' and '.join(given) or 'none'}")
        low, high = self.uniform or self.log_uniform or (1.0, 2.0)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"the range from {low:g} to {high:g} is none")
        if self.log_uniform and low <= 0:
            raise ValueError(f"log_uniform needs a lower end above 0, not {low:g}")
        return self

    def value(self, generator: random.Random) -> Any:
        """The next value."""
        if self.choice is not None:
            return generator.choice(self.choice)
        if self.log_uniform is not None:
            drawn = math.exp(generator.uniform(*map(math.log, self.log_uniform)))
        else:
            drawn = generator.uniform(*self.uniform)
        low, high = self.log_uniform or self.uniform
        return min(max(float(f"{drawn:.{_DIGITS}g}"), low), high)


class RandomSection(Section):
    """Trials drawn at random; beside these two, dotted keys of the config with a `Draw` each."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Draw]
    count: Count
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self):
        if not self.model_extra:
            raise ValueError("names no key of the config to draw, such as optim.lr: {log_uniform: [1.0e-5, 1.0e-2]}")
        return self


class Sweep(Section):
    """SWEEP.yaml."""

    grid: Annotated[dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]], Field(min_length=1)] | None = None
    random: RandomSection | None = None
    list: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)] | None = None
    members: Count = 1
    """Members of each trial, which differ in their seed."""

    @model_validator(mode="after")
    def _check(self):
        keys = [set(part) for part in (self.grid, self.random and self.random.model_extra) if part]
        keys += [set().union(*self.list)] if self.list else []
        if not keys or not all(keys):
            raise ValueError("asks for no setting: give a grid, random or list of them")
        twice = [key for a, b in itertools.combinations(keys, 2) for key in a & b]
        if twice:
            raise ValueError(f"'{min(twice)}' is given in two places of grid, random and list: leave it in one")
        if self.members > 1 and any(SEED in part for part in keys):
            raise ValueError(f"{SEED} is swept and members is {self.members}, which sets it too: leave out one of them")
        return self


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
            trial = {key: draw.value(generator) for key, draw in section.model_extra.items()}
            if _text(trial) not in seen:
                break
        else:
            raise ConfigError(f"random: there are no {section.count} different trials, only {len(seen)}; lower count")
        seen.add(_text(trial))
        yield trial


def _text(trial: Mapping[str, Any]) -> str:
    return json.dumps(trial, sort_keys=True)
