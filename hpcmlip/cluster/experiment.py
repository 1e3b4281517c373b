"""The experiment directory: an ensemble or a sweep of one config, its members' configs, and who of them has finished.

experiment.json           members and the values in which each differs, what is evaluated, who made it
run.yaml                  what was set in RUN.yaml and on the command line
sweep.yaml                of a sweep: what was asked for
study.journal             of a sweep by Optuna: its trials, as Optuna's JournalStorage has them
configs/member_00.yaml    complete: `hpcmlip train configs/member_00.yaml --run-dir member_00` does one by hand
site.yaml                 what the batch scripts were made with
slurm/                    batch scripts, their output, one line for each thing that happened to a member
jobs.json                 ids of the jobs submitted
member_00/ ...            run directories; of a sweep t000-lr0.001-features64/ ...
evaluation/               of the dependent job
"""

import contextlib
import dataclasses
import getpass
import itertools
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hpcmlip
from hpcmlip.cluster.script import Evaluation
from hpcmlip.config import RunConfig, changed, dump, load
from hpcmlip.data.store import open_store
from hpcmlip.errors import ConfigError, RunError, UserError
from hpcmlip.files import write_atomic
from hpcmlip.training.rundir import CONFIG, differing, finished, fixed, pruned

SCHEMA = 2
RECORD = "experiment.json"
SWEEP = "sweep.yaml"
_BEGUN = ".experiment.begun"
"""Until the record is there: who is killed before has begun an experiment, which the next call may finish."""


@dataclass(frozen=True)
class Member:
    """One run of an experiment."""

    name: str
    """Of its run directory."""
    values: dict[str, Any]
    """Dotted key -> value, where its config differs from the experiment's."""


@dataclass(frozen=True)
class Growth:
    """Of a sweep by Optuna: members are suggested generation by generation."""

    size: int
    """Members in the end."""
    generation: int
    """Members that are suggested together."""


def ensemble(config: RunConfig, count: int) -> tuple[Member, ...]:
    """Members that differ in their seed: the config's plus their index."""
    return tuple(Member(f"member_{i:02d}", {"train.seed": config.train.seed + i}) for i in range(count))


@dataclass(frozen=True)
class Experiment:
    """Runs of `config` with other values each, in `folder` (absolute). A member is known by its index."""

    folder: Path
    config: RunConfig
    members: tuple[Member, ...]
    evaluation: Evaluation | None = None
    growth: Growth | None = None

    @property
    def size(self) -> int:
        """Members in the end; those without settings yet count."""
        return max(len(self.members), self.growth.size if self.growth else 0)

    def name(self, member: int) -> str:
        return self.members[member].name if member < len(self.members) else f"t{member:03d}"

    def generations(self, members: Sequence[int]) -> list[tuple[int, ...]]:
        """Ascending members by generation; all in one where nobody waits for results."""
        number = (lambda member: member // self.growth.generation) if self.growth else (lambda member: 0)
        return [tuple(group) for _, group in itertools.groupby(members, number)]

    def run_dir(self, member: int) -> Path:
        return self.folder / self.name(member)

    def config_file(self, member: int) -> Path:
        return self.folder / "configs" / f"{self.name(member)}.yaml"

    def history_file(self, member: int) -> Path:
        """Lines `time job what` about starts and ends, written by the job itself."""
        return self.folder / "slurm" / f"{self.name(member)}.jobs"

    def output_file(self, job: str) -> Path:
        """What the job ARRAY_TASK wrote, as slurm/train.sbatch names it."""
        return self.folder / "slurm" / f"train-{job}.out"

    @property
    def jobs_file(self) -> Path:
        """What was submitted."""
        return self.folder / "jobs.json"

    @property
    def site_file(self) -> Path:
        return self.folder / "site.yaml"

    @property
    def evaluation_folder(self) -> Path:
        return self.folder / "evaluation"

    def member_config(self, member: int) -> RunConfig:
        """Complete config of a member, as far as it has settings; raises ConfigError if they make none."""
        if member >= len(self.members):
            return self.config
        found = self.members[member]
        return changed(self.config, found.values, self.folder, where=found.name)

    def has_begun(self) -> bool:
        """Was anything submitted, or any member started?"""
        if self.jobs_file.exists() or any(self.history_file(i).exists() for i in range(self.size)):
            return True
        return any(run.is_dir() and any(run.iterdir()) for run in map(self.run_dir, range(self.size)))

    def unfinished(self) -> list[int]:
        """Members without a finished model, but for those that a pruner has ended."""
        ended = [is_finished(self.run_dir(i)) or is_pruned(self.run_dir(i)) for i in range(self.size)]
        return [member for member, has_ended in enumerate(ended) if not has_ended]

    def is_evaluated(self) -> bool:
        """Whether the evaluation that is asked for is there, and of the members' present weights."""
        try:
            metrics = json.loads((self.evaluation_folder / "metrics.json").read_text())
            runs = [self.run_dir(i) for i in range(self.size) if not is_pruned(self.run_dir(i))]
            done = [finished(run) or {} for run in runs]
            seen = (
                metrics["store"]["digest"],
                metrics["split"]["name"],
                sorted(m["weights_sha256"] for m in metrics["members"]),
            )
        except (UserError, OSError, ValueError, KeyError, TypeError):
            return False
        try:
            asked = open_store(self.evaluation.store).digest, self.evaluation.split
        except UserError:  # removed or damaged since: what was evaluated cannot be compared any more
            return False
        return seen == (*asked, sorted(str(member.get("weights_sha256")) for member in done))


def is_finished(run_dir: Path) -> bool:
    """Whether a run ended by itself. Raises RunError as `rundir.finished`, if it is no longer what it ended as."""
    return finished(run_dir) is not None


def is_pruned(run_dir: Path) -> bool:
    """Whether a pruner has ended a run."""
    return pruned(run_dir) is not None


def open_experiment(folder: Path) -> Experiment:
    """The experiment in a folder; raises ConfigError if there is none, RunError if it is damaged or too new."""
    folder = folder.absolute()
    path = folder / RECORD
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}")
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        hint = f"; the experiment is {folder.parent}" if (folder.parent / RECORD).is_file() else ""
        raise ConfigError(f"{folder} is no experiment directory: it holds no {RECORD}{hint}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("schema"), int):
        raise RunError(f"{path} is damaged: it has no schema number")
    if record["schema"] != SCHEMA:
        way = "upgrade hpcmlip" if record["schema"] > SCHEMA else "submit RUN.yaml with another --run-dir"
        raise RunError(f"{path} has schema {record['schema']}, this hpcmlip reads {SCHEMA}: {way}")
    config = load(RunConfig, folder / "run.yaml")
    try:
        wanted, members = record["evaluate"], tuple(Member(**member) for member in record["members"])
        evaluation = Evaluation(**wanted | {"store": Path(wanted["store"])}) if wanted else None
        growth = Growth(**record["growth"]) if record.get("growth") else None
    except (KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged: {error}") from None
    return Experiment(folder, config, members, evaluation, growth)


def open_single(folder: Path) -> Experiment | None:
    """A run by itself as an experiment of one member; None for anything else."""
    folder = folder.absolute()
    if not (folder / CONFIG).is_file() or (folder.parent / RECORD).is_file():
        return None
    return Experiment(folder.parent, load(RunConfig, folder / CONFIG), (Member(folder.name, {}),))


def identity(config: RunConfig) -> str:
    """The same for configs that give the same run."""
    return json.dumps(fixed(json.loads(config.model_dump_json())), sort_keys=True)


def previous(folder: Path) -> Experiment | None:
    """The experiment that a folder holds already, if any; raises ConfigError if it holds something else.

    One of which nothing was submitted or started, as after a dry run, counts as none.
    """
    folder = folder.absolute()
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / RECORD).is_file():
        if (folder / _BEGUN).is_file():
            return None
        what = "a single run" if (folder / "config.yaml").exists() else "something else"
        raise ConfigError(f"{folder} holds {what}, no experiment; name another folder with --run-dir")
    found = open_experiment(folder)
    return found if found.growth or found.has_begun() else None


def check_goes_on(before: Experiment, now: Experiment) -> None:
    """Raises ConfigError unless `now` begins with the members that were there before, each with the same config."""
    was, asked = len(before.members), len(now.members)
    missing = [member.name for member in before.members if member.name not in {m.name for m in now.members}]
    if missing:
        raise ConfigError(
            f"{now.folder} holds an experiment of {was} members, asked for are {asked} without {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}; ask for all that are there, and more if you like, "
            "or name another folder with --run-dir"
        )
    for member in range(was):
        configs = (json.loads(e.member_config(member).model_dump_json()) for e in (before, now))
        changes = differing(*configs)
        if changes:
            raise ConfigError(
                f"{now.folder} holds an experiment with another config ({'; '.join(changes[:5])}); "
                "name another folder with --run-dir, or give it the same config to finish it"
            )


def write(experiment: Experiment, site_text: str, sweep_text: str | None = None) -> None:
    """Make the directory: configs first, the record last. What is there already stays as it is where it is the same.

    Of a killed call nothing is left, or what `previous` takes for nothing. Raises ConfigError if no directory can be
    made.
    """
    record, begun = experiment.folder / RECORD, experiment.folder / _BEGUN
    try:
        experiment.folder.mkdir(parents=True, exist_ok=True)
        if not record.exists():
            begun.touch()
        for name in ("slurm", "configs"):
            (experiment.folder / name).mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {error.filename} ({error.strerror}); give another --run-dir") from None
    _forget_others(experiment)
    write_atomic(experiment.folder / "run.yaml", dump(experiment.config, defaults=False))
    write_atomic(experiment.site_file, site_text)
    if sweep_text is not None:
        write_atomic(experiment.folder / SWEEP, sweep_text)
    for member in range(len(experiment.members)):
        # a member that fails before its first line of log is still seen, and named, by the evaluation
        experiment.run_dir(member).mkdir(exist_ok=True)
        write_atomic(experiment.config_file(member), dump(experiment.member_config(member)))
    write_atomic(record, json.dumps(_record(experiment), indent=2) + "\n")
    begun.unlink(missing_ok=True)


def _forget_others(experiment: Experiment) -> None:
    """Remove what an experiment that never began has left of members that are not in this one."""
    names = {member.name for member in experiment.members}
    for path in (experiment.folder / "configs").glob("*.yaml"):
        if path.stem not in names:
            with contextlib.suppress(OSError):  # not empty: somebody's
                (experiment.folder / path.stem).rmdir()
            path.unlink()


def now() -> str:
    """UTC time as the batch scripts write it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _record(experiment: Experiment) -> dict:
    evaluation = experiment.evaluation
    return {
        "schema": SCHEMA,
        "name": experiment.config.name,
        "members": [dataclasses.asdict(member) for member in experiment.members],
        "evaluate": evaluation and dataclasses.asdict(evaluation) | {"store": str(evaluation.store)},
        "growth": experiment.growth and dataclasses.asdict(experiment.growth),
        "written": now(),
        "created_by": f"{getpass.getuser()}@{socket.gethostname()}, hpcmlip {hpcmlip.__version__}",
    }
