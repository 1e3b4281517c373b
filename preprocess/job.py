"""A sharding job: the config with presets resolved and sources found. Pure data; tasks receive it whole."""

import glob
import os
from dataclasses import dataclass
from pathlib import Path

from hpcmlip import plugins
from hpcmlip.config import flat
from hpcmlip.data.store import Level
from hpcmlip.errors import ConfigError, DataError
from hpcmlip.preprocess.config import DataConfig, LevelSource
from hpcmlip.preprocess.readers import RawFile, RawLevel
from hpcmlip.units import ATOMIC_NUMBERS, ENERGY_UNITS

MOST_LEVELS = 31  # label masks are 64 bits, two a level


@dataclass(frozen=True)
class SourceFile:
    """A raw file: where it is, and the name it has in the store."""

    path: Path
    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Job:
    config: DataConfig
    levels: tuple[RawLevel, ...]
    sources: tuple[SourceFile, ...]

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers, ascending."""
        return tuple(sorted(ATOMIC_NUMBERS[symbol] for symbol in self.config.elements))

    @property
    def force_levels(self) -> tuple[int, ...]:
        """Indices of the levels that have forces."""
        return tuple(i for i, level in enumerate(self.levels) if level.source.forces)

    @property
    def partial(self) -> Path:
        """Building site; nothing in it is a store before the one rename at the end."""
        return Path(f"{self.config.out}.partial")

    @property
    def store(self) -> Path:
        """The store while it is being built."""
        return self.partial / "store"

    @property
    def work(self) -> Path:
        """Receipts of finished tasks."""
        return self.partial / "work"

    def open(self, source: int) -> RawFile:
        """Source number `source`, opened by the reader."""
        reader = plugins.find("preprocess.readers", self.config.reader)
        return reader.open_file(self.sources[source].path, self.levels, self.config.options)

    def store_levels(self) -> tuple[Level, ...]:
        """The levels as the store describes them."""
        unit = ENERGY_UNITS[plugins.find("preprocess.readers", self.config.reader).ENERGY_UNIT]

        def in_ev(energies):
            return None if energies is None else {symbol: value * unit for symbol, value in sorted(energies.items())}

        return tuple(
            Level(
                lv.name,
                lv.source.method,
                lv.source.basis,
                lv.source.forces is not None,
                in_ev(lv.source.atomic_energies),
            )
            for lv in self.levels
        )

    def identity(self) -> dict:
        """What the store is made of, free of this machine's paths: flat, dotted key -> value."""
        config = self.config.model_copy(update={"levels": {level.name: level.source for level in self.levels}})
        values = config.model_dump(mode="json", exclude={"out", "sources", "sha256", "check_units"})
        return flat(values) | {"sources": [source.name for source in self.sources]}


def make(config: DataConfig) -> Job:
    """The job of a config. Raises ConfigError for unknown levels and options, DataError for absent sources."""
    reader = plugins.find("preprocess.readers", config.reader)
    _check_options(config, reader.OPTIONS)
    levels = _levels(config, reader)
    if len(levels) > MOST_LEVELS:
        raise ConfigError(f"levels: {len(levels)} levels of theory, a store holds at most {MOST_LEVELS}")
    sources = _sources(config)
    unknown = sorted(set(config.sha256) - {source.path.name for source in sources})
    if unknown:
        raise ConfigError(f"sha256 names {', '.join(unknown)}, and no source has that file name")
    return Job(config, levels, sources)


def _levels(config: DataConfig, reader) -> tuple[RawLevel, ...]:
    wanted = config.levels or {name: name for name in reader.DEFAULT_LEVELS}
    levels = []
    for name, source in wanted.items():
        if isinstance(source, LevelSource):
            missing = sorted(set(config.elements) - set(source.atomic_energies or config.elements))
            if missing:
                raise ConfigError(
                    f"levels.{name}.atomic_energies lacks {', '.join(missing)}: add them, leave them all out, or name "
                    "only the elements of your data in 'elements'"
                )
            levels.append(RawLevel(name, source))
        elif source in reader.PRESETS:
            levels.append(RawLevel(name, reader.PRESETS[source]))
        else:
            hint = plugins.suggest(source, reader.PRESETS)
            raise ConfigError(f"levels.{name}: the reader '{config.reader}' has no preset '{source}'{hint}")
    return tuple(levels)


def _check_options(config: DataConfig, known: dict) -> None:
    for name, value in config.options.items():
        if name not in known:
            hint = plugins.suggest(name, known) if known else " (it has no options)"
            raise ConfigError(f"options.{name}: unknown to the reader '{config.reader}'{hint}")
        if type(value) is not type(known[name]):
            raise ConfigError(f"options.{name}: expected {type(known[name]).__name__}, got {value!r}")


def _sources(config: DataConfig) -> tuple[SourceFile, ...]:
    try:
        paths = [path for pattern in config.sources for path in _matching(pattern)]
        resolved = {path.resolve(strict=True) for path in paths}
        stats = [path.stat() for path in paths]
    except (OSError, RuntimeError) as error:  # RuntimeError: pathlib's word for a loop of symbolic links
        raise DataError(f"cannot read a source ({error}); check 'sources' of the config") from None
    if len(resolved) != len(paths):
        raise ConfigError("sources: a file is named twice")
    for path in paths:
        if not path.is_file():
            raise DataError(f"the source {path} is no file; name the files, or a pattern such as {path}/*.h5")
    names = [path.name for path in paths]
    if len(set(names)) != len(names):
        top = os.path.commonpath([path.parent for path in paths])
        names = [str(path.relative_to(top)) for path in paths]
    return tuple(SourceFile(p, n, s.st_size, s.st_mtime_ns) for p, n, s in zip(paths, names, stats, strict=True))


def _matching(pattern: Path) -> list[Path]:
    """The file itself, or those that match the glob pattern."""
    found = [pattern] if pattern.exists() else [Path(p) for p in sorted(glob.glob(str(pattern), recursive=True))]
    if not found:
        raise DataError(f"there is no source file {pattern}; check 'sources' of the config")
    return found
