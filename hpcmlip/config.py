"""Configs: typed, frozen, read from YAML once and never changed afterwards.

`Section` is the base of every config class; `load(RunConfig, path, overrides)` reads one. Unknown keys, wrong types and
contradictions end in a `ConfigError` that names the key and what was expected. Relative paths resolve against the
folder of the YAML file they stand in (against the current directory for an override from the command line).
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from hpcmlip import plugins
from hpcmlip.errors import ConfigError
from hpcmlip.explain import explain
from hpcmlip.units import ENERGY_UNITS


class Section(BaseModel):
    """A frozen config section: unknown keys are errors, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
    path_keys: ClassVar[frozenset[str]] = frozenset()
    """Dotted keys below this section that hold paths."""


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
EnergyUnit = Literal[tuple(ENERGY_UNITS)]
LevelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_().+*-]+$")]
SplitName = Literal["train", "val", "test"]


def _belongs(section: Any, option: str, kinds: Sequence[str]) -> None:
    """Raises ValueError for an option of other kinds than the section's: it would have no effect."""
    kind = section.kind
    if kind not in kinds and getattr(section, option) != type(section).model_fields[option].default:
        raise ValueError(f"{option} has no effect with kind {kind}, only with {' or '.join(kinds)}: leave it out")


def _needs(section: Any, option: str, kind: str) -> None:
    """Raises ValueError unless the option is given with its kind, and only with it."""
    _belongs(section, option, (kind,))
    if section.kind == kind and getattr(section, option) is None:
        raise ValueError(f"{kind} needs {option}")


# ---------------------------------------------------------------------------------------------------- RUN.yaml

Labels = Literal["E", "EF"]


class DataSection(Section):
    stores: Annotated[tuple[Path, ...], Field(min_length=1)]
    """What `shard` wrote; several are one data set."""
    levels: Annotated[dict[LevelName, Labels], Field(min_length=1)]
    """Levels that are trained: E energies only, EF energies and forces."""
    pairs_per_batch: Count = 20000
    """Budget of a micro-batch: sum over its structures of N² atom pairs, or 64 N in a store with periodic structures
    and for molecules of more than 64 atoms. One with larger structures than a block holds (more pairs than budget /
    blocks_per_batch) may exceed it by one of them."""
    blocks_per_batch: Annotated[int, Field(ge=2)] = 4
    """A micro-batch mixes about this many molecule sizes."""
    cache_mb: NonNegative = 1024
    """Decoded chunks that a process keeps in memory, besides four of each molecule size for each stream at work; and
    as much again of neighbour lists (about 0.4 MB for a periodic structure of 225 atoms), where there are any."""


class LevelWeights(Section):
    energy: NonNegative = 1.0
    forces: NonNegative = 1.0
    """Counts only where the level is trained EF."""
    hierarchicality: NonNegative = 0.0


class LossSection(Section):
    kind: Literal["rmse_mae", "mse", "mae", "log_cosh", "huber"] = "rmse_mae"
    """Of each level's energies and forces, added up by `weights`; rmse_mae is RMSE + MAE."""
    unit: EnergyUnit = "kcal/mol"
    """Energies enter in this unit, forces per component in this unit per Å."""
    energy_per: Literal["molecule", "atom", "sqrt_atom"] = "molecule"
    """Energy errors of a molecule of N atoms count as they are, divided by N, or divided by N^(1/4), which makes a
    squared error 1/√N of itself (torchani)."""
    sharpness: Positive | None = None
    """log_cosh: p of ln(cosh(p x)) / p, in 1/unit; about |x| beyond 1/p, a parabola within."""
    delta: Positive | None = None
    """huber: error in `unit` beyond which the penalty grows linearly."""
    weights: dict[LevelName, LevelWeights] = {}
    """Default 1 for each energy and each trained force, 0 for hierarchicality."""
    hierarchicality: Literal["atom", "molecule", "batch"] = "atom"
    """HIP-NN: what the regulariser that asks later terms of the energy to be small divides and averages over."""

    @model_validator(mode="after")
    def _check(self):
        for option, kind in (("sharpness", "log_cosh"), ("delta", "huber")):
            _needs(self, option, kind)
        return self


class ScheduleSection(Section):
    kind: Literal["constant", "plateau", "cosine", "exponential", "one_cycle", "one_cycle_linear"] = "plateau"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear rise from 0 before the schedule proper."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """plateau: the rate is multiplied by this; exponential: decay over `decay_epochs`."""
    patience: Count = 15
    """plateau: validations without improvement before the rate falls."""
    min_lr: NonNegative = 0.0
    """plateau: training ends when the rate falls below; cosine, one_cycle, one_cycle_linear: rate at the end."""
    decay_epochs: Positive = 10.0
    """exponential: epochs in which the rate falls by `factor`."""
    staircase: bool = False
    """exponential: the rate falls at once every `decay_epochs` and is constant between."""
    start_lr: Positive | None = None
    """one_cycle, one_cycle_linear: rate at the start; none: lr / 25."""
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """one_cycle: part of the cycle in which the rate rises from `start_lr` to lr, to fall to `min_lr` in the rest;
    one_cycle_linear: to fall as fast back to `start_lr`, and to `min_lr` in the rest; at most 0.5."""
    per: Literal["run", "epoch"] = "run"
    """one_cycle, one_cycle_linear: one cycle a run, or one in each epoch."""

    @model_validator(mode="after")
    def _check(self):
        cycles = ("one_cycle", "one_cycle_linear")
        for option, kinds in (("staircase", ("exponential",)), ("start_lr", cycles), ("per", cycles)):
            _belongs(self, option, kinds)
        if self.kind == "one_cycle_linear" and self.rise > 0.5:
            raise ValueError(f"rise is {self.rise:g}, but one_cycle_linear falls as long as it rises: at most 0.5")
        if self.per == "epoch" and self.warmup_steps:
            raise ValueError("a cycle in each epoch begins low by itself: set warmup_steps to 0")
        return self


class OptimSection(Section):
    kind: Literal["adam", "adamw", "yogi"] = "adam"
    lr: Positive = 5.0e-4
    """Learning rate; what becomes of it, `schedule` says."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and the second moment."""
    eps: Positive = 1.0e-8
    """Added to the root of the second moment; 1e-3 is usual for yogi."""
    weight_decay: NonNegative = 0.0
    clip_norm: NonNegative = 0.0
    """Gradient norm is clipped to this; 0 does not clip."""
    ema_decay: Decay = 0.0
    """Decay a step of the moving average of the weights, which is then what is validated and kept; 0: no average."""
    schedule: ScheduleSection = ScheduleSection()


class TrainSection(Section):
    epochs: Count = 100
    """At most; `patience` and a plateau schedule with `min_lr` end a run before."""
    micro_batches_per_step: Count = 2
    """Micro-batches of an optimizer step; the number of processes must divide it."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Initial weights and order of the data."""
    validate_every: Count = 1
    """Epochs between validations."""
    checkpoint_minutes: NonNegative = 10.0
    """Minutes between checkpoints; one is also written at each validation that is the best, and at the end.
    0: at every step."""
    checkpoint_steps: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints, besides; 0: by time only."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """The newest ones; older ones are removed."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Validations without improvement after which training ends; 0: never."""
    max_bad_steps: Annotated[int, Field(ge=0)] = 10
    """Steps with non-finite numbers that are skipped before the run ends with an error."""
    log_seconds: Positive = 10.0
    """Between two lines of the log, two points in TensorBoard and of a tracker."""


class EngineSection(Section):
    zero_stage: Literal[0, 1, 2] = 1
    """DeepSpeed ZeRO stage."""
    precision: Literal["fp32"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    compile: bool = False
    """Compile what training takes of molecules: minutes at the start, then faster steps with most models."""
    timeout_minutes: Positive = 30.0
    """A collective that waits longer than this ends the run."""

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _check_stage(cls, value: Any) -> Any:
        if value == 3:
            raise ValueError("stage 3 cannot train forces, it releases weights that the second backward needs: 0, 1, 2")
        return value


class TransferSection(Section):
    """A start from the weights of a trained model with the same settings."""

    model: Path
    """Run directory of the trained model, or its model.json."""
    freeze: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Layers that stay as they are, counted from 0 at the input."""
    level: LevelName | None = None
    """Level of the trained model from which levels start that it lacks; its only level if it has one."""


class TrackSection(Section):
    """The figures of TensorBoard in a tracker as well; one that fails never stops the run."""

    kind: str
    """wandb or mlflow: a module in `hpcmlip/trackers/`."""
    project: Annotated[str, Field(min_length=1)] = "hpcmlip"
    """Project of W&B, experiment of MLflow."""
    server: str | None = None
    """Where to send them while the run goes on: address of a W&B server, tracking URI of MLflow. none: nothing is
    sent, they are kept in the run directory."""

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        known = plugins.names("trackers")
        if kind not in known:
            raise ValueError(f"there is no tracker '{kind}'{plugins.suggest(kind, known)}")
        return kind


MODEL_LIMITS = {
    "rotation": "energies follow a rotation of the structure only approximately",
    "reflection": "a structure and its mirror image have different energies",
    "additivity": "structures far apart from each other still interact",
    "smooth_cutoff": "energies or forces jump where an atom crosses the cutoff",
    "conservative": "forces are not the gradient of the energy",
    "periodic": "molecules only",
}
"""Properties that a model may lack by design, with what that means for its user."""


class ModelSection(Section):
    """Base of every model's `Config`; `kind` is the module name in `hpcmlip/models/`."""

    kind: str
    cutoff: Positive
    """Å."""

    @property
    def limits(self) -> dict[str, str]:
        """What potentials of these settings do not satisfy by design -> why; for keys see `MODEL_LIMITS`."""
        return {}

    @property
    def not_compiled(self) -> str:
        """Why energies and forces of these settings are not compiled; empty if they can be."""
        return MODEL_LIMITS["conservative"] if "conservative" in self.limits else ""


class RunConfig(Section):
    """RUN.yaml: one training run."""

    path_keys = frozenset({"data.stores", "transfer.model"})
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$")]
    """Of the run, and of its folder in `runs/` under the current folder."""
    data: DataSection
    model: SerializeAsAny[ModelSection]
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    engine: EngineSection = EngineSection()
    transfer: TransferSection | None = None
    track: TrackSection | None = None

    @field_validator("model", mode="wrap")
    @classmethod
    def _model_by_kind(cls, value: Any, handler):
        # of a section as a whole, the handler would see Python values and refuse a list for a tuple
        if not isinstance(value, dict):
            return handler(value)
        kind = value.get("kind")
        if kind is None:
            raise ConfigError(f"model.kind is missing{plugins.suggest('', plugins.names('models'))}")
        return _validate(plugins.find("models", kind).Config, value, prefix="model.")

    @model_validator(mode="after")
    def _check(self):
        unknown = sorted(set(self.loss.weights) - set(self.data.levels))
        if unknown:
            raise ValueError(
                f"loss.weights names the level '{unknown[0]}', which data.levels does not train"
                + plugins.suggest(unknown[0], self.data.levels)
            )
        weights = [(self.weights(level), labels) for level, labels in self.data.levels.items()]
        if not any(weight.energy or (weight.forces and labels == "EF") for weight, labels in weights):
            raise ValueError("every weight in loss.weights is 0: nothing would be trained")
        if self.optim.schedule.min_lr >= self.optim.lr:
            raise ValueError(f"optim.schedule.min_lr is {self.optim.schedule.min_lr:g}, not below optim.lr")
        if self.engine.compile and self.model.not_compiled:
            raise ValueError(
                f"engine.compile is true, but model '{self.model.kind}' is not compiled: {self.model.not_compiled}"
            )
        if self.engine.compile and "EF" not in self.data.levels.values():
            raise ValueError(
                "engine.compile is true, but no level in data.levels has forces (EF), for which it is made"
            )
        if (self.optim.schedule.start_lr or 0.0) > self.optim.lr:
            raise ValueError(f"optim.schedule.start_lr is {self.optim.schedule.start_lr:g}, above optim.lr")
        return self

    def weights(self, level: str) -> LevelWeights:
        """Loss weights of a trained level."""
        return self.loss.weights.get(level, LevelWeights())


# ------------------------------------------------------------------------------------------------ reading YAML


class _Loader(yaml.SafeLoader):
    """YAML with 1e-3 a number (as in YAML 1.2) and a repeated key an error."""

    def construct_mapping(self, node, deep=False):
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"line {node.start_mark.line + 1}: the key '{key}' stands there twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)

ConfigT = TypeVar("ConfigT", bound=Section)


def load(cls: type[ConfigT], path: Path | str, overrides: Sequence[str] = ()) -> ConfigT:
    """Config of type `cls` from a YAML file; `overrides` are `key.sub=value` with a YAML value.

    Raises ConfigError naming the file and the key.
    """
    path = Path(path)
    values = read_yaml(path)
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"'{text}' is not of the form key=value")
        _set(values, key.split("."), _resolve(cls, key, _parse(value, f"override '{text}'"), Path.cwd()))
    return from_values(cls, values, path.parent, where=str(path))


def changed(config: ConfigT, changes: Mapping[str, Any], folder: Path, *, where: str) -> ConfigT:
    """`config` with other values at dotted keys; relative paths among them resolve against `folder`."""
    # what was not set is left out: a default may belong to a kind that is changed
    values = json.loads(config.model_dump_json(exclude_unset=True))
    for key, value in changes.items():
        try:
            _set(values, key.split("."), value)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    return from_values(type(config), values, folder, where=where)


def from_values(cls: type[ConfigT], values: dict, folder: Path, *, where: str) -> ConfigT:
    """Config of type `cls` from plain values; relative paths among them resolve against `folder`."""
    try:
        return _validate(cls, {key: _resolve(cls, key, value, folder) for key, value in values.items()})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def read_yaml(path: Path) -> dict:
    """Mapping in a YAML file; raises ConfigError if it is absent, not YAML or no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {getattr(error, 'strerror', None) or error}") from None
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, expected a mapping of keys to values")
    return values


def dump(config: Section, *, defaults: bool = True) -> str:
    """YAML text of a config, with every default written out or only what was set."""
    values = json.loads(config.model_dump_json(exclude_unset=not defaults))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested values; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _parse(text: str, where: str):
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {str(error).replace(chr(10), ' ')}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _set(values: dict, keys: list[str], value) -> None:
    for key in keys[:-1]:
        if values.get(key) is None:  # a section that is absent may be written out as null
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise ConfigError(f"cannot set '{'.'.join(keys)}': '{key}' is not a section")
    values[keys[-1]] = value


def _resolve(cls, key: str, value, folder: Path):
    """`value` with relative paths made absolute, where `key` of `cls` holds paths."""
    if isinstance(value, dict):
        return {sub: _resolve(cls, f"{key}.{sub}", item, folder) for sub, item in value.items()}
    if key not in cls.path_keys:
        return value
    if isinstance(value, list):
        return [_resolve(cls, key, item, folder) for item in value]
    if not isinstance(value, str):
        return value
    try:
        return str((folder / Path(value).expanduser()).absolute())
    except RuntimeError:
        raise ConfigError(f"{key}: nobody's home directory is meant by '{value}'") from None


def _validate(cls: type[ConfigT], values: dict, prefix: str = "") -> ConfigT:
    try:
        # JSON mode: strict about scalars, yet a YAML list may fill a tuple and a string a path
        return cls.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ConfigError(explain(cls, error.errors(), prefix)) from None
    except (TypeError, ValueError) as error:  # a date as a key, an anchor that holds itself
        raise ConfigError(f"holds what no config can hold: {error}") from None
