"""The members of an ensemble: found in run and experiment directories, loaded, checked to belong together, and asked.

What they say is always totals in float64: a member's own reference energies are added to what its network gives, so
members (and stores) with different references can be compared.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from hpcmlip.batch import AtomsBatch, DataSpec
from hpcmlip.errors import ConfigError, DataError, RunError
from hpcmlip.models.export import load_model
from hpcmlip.models.potential import Potential
from hpcmlip.plugins import suggest
from hpcmlip.training.rundir import finished, fixed, pruned
from hpcmlip.units import SYMBOLS

log = logging.getLogger(__name__)

MODEL_FILE = "model.json"
MEMBER_FOLDERS = ("member_*", "t[0-9][0-9][0-9]*-*")
"""Run directories in an experiment: of the members of an ensemble, of the trials of a sweep."""


@dataclass(frozen=True)
class Found:
    """What a list of directories holds."""

    runs: tuple[Path, ...]
    left_out: tuple[dict[str, str], ...]
    """{"run", "reason"} of the members without a finished model."""


@dataclass(frozen=True)
class Member:
    """One trained model."""

    path: Path
    potential: Potential
    info: dict
    """`model.json`."""

    @property
    def spec(self) -> DataSpec:
        return self.potential.spec

    @property
    def trained(self) -> dict[str, str]:
        """Level -> labels (E or EF) it was trained on."""
        return dict(self.info["config"]["data"]["levels"])

    @cached_property
    def species_of(self) -> np.ndarray:
        """[256] int64: atomic number -> index of the species, -1 for an element that the model does not know."""
        table = np.full(256, -1, dtype=np.int64)
        table[list(self.spec.elements)] = np.arange(len(self.spec.elements))
        return table

    def baseline(self, numbers: np.ndarray, levels: Sequence[str]) -> np.ndarray:
        """[B, L] eV totals of the composition alone (the model's atomic energies) for atomic numbers [B, N]."""
        columns = [self.spec.levels.index(name) for name in levels]
        atomic = (self.spec.reference + self.spec.residual)[columns]
        return atomic.T[self.species_of[numbers]].sum(axis=1)


@dataclass(frozen=True)
class Answer:
    """What P members say of the B structures of one block (N atoms each)."""

    energy: np.ndarray
    """[P, B, L] float64 eV, totals."""
    forces: np.ndarray
    """[P, B, N, Lf, 3] float64 eV/Å."""
    stress: np.ndarray | None = None
    """[P, B, Lf, 3, 3] float64 eV/Å³ of the levels of the forces, where asked for and the block is periodic."""


def find_members(paths: Sequence[Path], *, at_least: int = 1) -> Found:
    """Runs named directly or as members of an experiment directory.

    A member of an experiment counts when it is finished (done.json says so); a run that is named itself only needs its
    model. Raises ConfigError for a path that is neither, RunError naming the absent if fewer than `at_least` are left.
    """
    runs: list[Path] = []
    left_out: list[dict[str, str]] = []
    for path in map(Path, paths):
        members = sorted(p for pattern in MEMBER_FOLDERS for p in path.glob(pattern) if p.is_dir())
        if path.name == MODEL_FILE or (path / MODEL_FILE).is_file():
            candidates, reasons = [path], [None]
        elif members:
            candidates, reasons = members, [_unfinished(p) for p in members]
        elif path.is_dir():
            candidates, reasons = [path], [f"there is no {MODEL_FILE}"]
        else:
            raise ConfigError(f"there is no run directory {path}; name a run, or an experiment with member_00, ...")
        for run, reason in zip(candidates, reasons, strict=True):
            if reason:
                left_out.append({"run": str(run), "reason": reason})
            elif run.resolve() not in [other.resolve() for other in runs]:
                runs.append(run)
    if len(runs) < at_least:
        reasons = "; ".join(f"{item['run']}: {item['reason']}" for item in left_out) or "no other was named"
        what = f"{len(runs)} finished models, at least {at_least} are needed" if runs else "no finished model"
        raise RunError(f"{what} ({reasons}); train first, see 'hpcmlip status' and 'hpcmlip submit --retry'")
    return Found(tuple(runs), tuple(left_out))


def _unfinished(run: Path) -> str | None:
    """Why a member of an experiment does not count; None if it does."""
    try:
        done, early = finished(run), pruned(run)
    except RunError as error:
        return str(error)
    if early is not None:
        return f"ended early: {early['reason']}"
    if done is None:
        return f"not finished (there is no done.json{_last_words(run)})"
    return None


def _last_words(run: Path) -> str:
    """What happened last to a member, by its jobs, and the error in its log; empty where neither says anything."""
    history = _lines(run.parent / "slurm" / f"{run.name}.jobs")[-1:]
    errors = [line for line in _lines(run / "log.txt") if " ERROR " in line]
    return "".join(f"; {words}" for words in [*(line.split(" ", 2)[-1] for line in history), *errors[-1:]])


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        return []


def load_members(runs: Sequence[Path], *, device: str | torch.device = "cpu", dtype=torch.float64) -> "Ensemble":
    """The models of these runs. Raises ConfigError naming what differs if they are no ensemble.

    In float64 what is predicted for a structure does not depend on what it is batched with, hence not on the number of
    ranks; in float32 energies change in the sixth digit. It costs about a factor of two on a CPU.
    """
    members = []
    for run in runs:
        potential, info = load_model(run, dtype)
        potential.to(device).eval().requires_grad_(False)
        members.append(Member(run, potential, info))
    first = members[0]
    for other in members[1:]:
        for what, a, b in (
            ("the elements", _symbols(first.spec.elements), _symbols(other.spec.elements)),
            ("the levels", _labels(first.trained), _labels(other.trained)),
        ):
            if a != b:
                raise ConfigError(
                    f"{first.path} was trained on {what} {a}, {other.path} on {b}: members of one ensemble must agree; "
                    "evaluate each experiment on its own"
                )
    return Ensemble(tuple(members), torch.device(device), dtype)


def _symbols(elements: Sequence[int]) -> str:
    return " ".join(SYMBOLS[z] for z in sorted(elements))


def _labels(trained: dict[str, str]) -> str:
    return ", ".join(f"{name}: {labels}" for name, labels in sorted(trained.items()))


@dataclass(frozen=True)
class Ensemble:
    """Members that agree in elements, levels and labels."""

    members: tuple[Member, ...]
    device: torch.device
    dtype: torch.dtype

    @property
    def first(self) -> Member:
        return self.members[0]

    @property
    def cutoff(self) -> float:
        """Å; the largest of the members."""
        return max(member.potential.config.cutoff for member in self.members)

    @property
    def is_conservative(self) -> bool:
        """Are the forces of all members gradients of their energies? Otherwise there is no stress."""
        return all(member.potential.is_conservative for member in self.members)

    def gives_forces(self, level: str) -> bool:
        """Do all members predict forces of this level?"""
        return all(m.potential.gives_forces(m.spec.levels.index(level)) for m in self.members)

    def settings(self) -> list[dict[str, object]]:
        """For each member, dotted key -> value of the settings that are not the same for all; seed and name aside."""
        configs = [fixed(member.info["config"]) for member in self.members]
        keys = dict.fromkeys(key for config in configs for key in config if key not in ("name", "train.seed"))
        different = [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]
        return [{key: config.get(key) for key in different} for config in configs]

    def check_level(self, level: str) -> None:
        """Raises ConfigError if the models have no such level."""
        if level not in self.first.spec.levels:
            raise ConfigError(f"the models have no level '{level}'{suggest(level, self.first.spec.levels)}")

    def check_elements(self, numbers: np.ndarray, where: str) -> None:
        """Raises DataError if there is an element that the models do not know."""
        unknown = sorted({int(z) for z in np.unique(numbers)} - set(self.first.spec.elements))
        if unknown:
            raise DataError(
                f"{where} holds {' '.join(SYMBOLS[z] for z in unknown)}; "
                f"the models know {_symbols(self.first.spec.elements)} only"
            )

    def check_periodic(self, where: str) -> None:
        """Raises DataError, for something periodic, if a model computes molecules only."""
        for member in self.members:
            config = member.potential.config
            if "periodic" in config.limits:
                raise DataError(
                    f"{where} is periodic, which model '{config.kind}' does not compute: {config.limits['periodic']}"
                )

    def ask(
        self,
        blocks: Sequence[AtomsBatch],
        numbers: Sequence[np.ndarray],
        levels: Sequence[str],
        forces: Sequence[str],
        *,
        stress: bool = False,
    ) -> list[Answer]:
        """Answers for blocks of equally sized structures with atomic numbers [B, N] (the blocks' own species and labels
        are not used): energies of `levels`, forces and, of periodic blocks, `stress` of the levels `forces`."""
        bare = [replace(block, energy=None, forces=None, force_labels=None) for block in blocks]
        moved = [block.to(self.device, self.dtype) for block in bare]
        each = [self._ask_member(member, moved, numbers, levels, forces, stress) for member in self.members]
        return [
            Answer(*(None if parts[0] is None else np.stack(parts) for parts in zip(*answers, strict=True)))
            for answers in zip(*each, strict=True)
        ]

    def _ask_member(self, member: Member, blocks, numbers, levels, forces, stress) -> list[tuple]:
        """(energy, forces, stress or None) of one member, by block."""
        spec = member.spec
        species = [member.species_of[z] for z in numbers]
        inputs = [
            replace(block, species=torch.from_numpy(s.reshape(-1)).to(self.device))
            for block, s in zip(blocks, species, strict=True)
        ]
        columns = [spec.levels.index(name) for name in levels]
        # the model takes its force levels in ascending order
        wanted = sorted(spec.levels.index(name) for name in forces)
        planes = [wanted.index(spec.levels.index(name)) for name in forces]
        answers = []
        predictions = member.potential(inputs, force_levels=wanted, stress=stress)
        for block, s, said in zip(inputs, species, predictions, strict=True):
            energy = _array(said.energy)[:, columns] + spec.reference_energy(s)[:, columns]
            B, N = s.shape
            force = np.zeros((B, N, 0, 3)) if not wanted else _array(said.forces).reshape(B, N, -1, 3)[:, :, planes]
            answers.append((energy, force, None if said.stress is None else _array(said.stress)[:, planes]))
            assert block.num_structures == B
        return answers


def _array(x: torch.Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()
