"""The experiment directory: an ensemble of one config, its members' configs, and who of them has finished.

experiment.json           members, seeds, what is evaluated, who made it
run.yaml                  the resolved config; member i differs in train.seed alone
configs/member_00.yaml    complete: `hpcmlip train configs/member_00.yaml --run-dir member_00` does one by hand
site.yaml                 what the batch scripts were made with
slurm/                    batch scripts, their output, one line for each thing that happened to a member
jobs.json                 ids of the jobs submitted
member_00/ ...            run directories
evaluation/               of the dependent job
"""

import getpass
import hashlib
import json
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import hpcmlip
from hpcmlip.cluster.script import Evaluation
from hpcmlip.config import RunConfig, dump, load
from hpcmlip.data.store import open_store
from hpcmlip.errors import ConfigError, RunError, UserError
from hpcmlip.training.rundir import DONE, differing, write_atomic

SCHEMA = 1
RECORD = "experiment.json"


@dataclass(frozen=True)
class Experiment:
    """An ensemble of `members` runs of `config`, in `folder` (absolute)."""

    folder: Path
    config: RunConfig
    members: int
    evaluation: Evaluation | None = None

    def name(self, member: int) -> str:
        return f"member_{member:02d}"

    def run_dir(self, member: int) -> Path:
        return self.folder / self.name(member)

    def config_file(self, member: int) -> Path:
        return self.folder / "configs" / f"{self.name(member)}.yaml"

    def history_file(self, member: int) -> Path:
        """Lines `time job what` about starts and ends, written by the job itself."""
        return self.folder / "slurm" / f"{self.name(member)}.jobs"

    @property
    def site_file(self) -> Path:
        return self.folder / "site.yaml"

    @property
    def evaluation_folder(self) -> Path:
        return self.folder / "evaluation"

    def member_config(self, member: int) -> RunConfig:
        """Config of a member: its seed is the config's plus its index."""
        train = self.config.train.model_copy(update={"seed": self.config.train.seed + member})
        return self.config.model_copy(update={"train": train})

    def unfinished(self) -> list[int]:
        """Members without a finished model."""
        return [member for member in range(self.members) if not is_finished(self.run_dir(member))]

    def is_evaluated(self) -> bool:
        """Whether the evaluation that is asked for is there, and of the members' present weights."""
        try:
            metrics = json.loads((self.evaluation_folder / "metrics.json").read_text())
            done = [json.loads((self.run_dir(i) / DONE).read_text()) for i in range(self.members)]
            seen = (
                metrics["store"]["digest"],
                metrics["split"]["name"],
                [m["weights_sha256"] for m in metrics["members"]],
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False
        try:
            asked = open_store(self.evaluation.store).digest, self.evaluation.split
        except UserError:  # removed or damaged since: what was evaluated cannot be compared any more
            return False
        return seen == (*asked, [member.get("weights_sha256") for member in done])


def is_finished(run_dir: Path) -> bool:
    """Whether a run ended by itself and its weights are still those it ended with."""
    try:
        done = json.loads((run_dir / DONE).read_text())
        weights = hashlib.sha256((run_dir / "model.safetensors").read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False
    return done.get("state") == "finished" and done.get("weights_sha256") == weights


def open_experiment(folder: Path) -> Experiment:
    """The experiment in a folder; raises ConfigError if there is none, RunError if it is damaged or too new."""
    folder = folder.absolute()
    path = folder / RECORD
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{folder} is no experiment directory: it holds no {RECORD}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("schema"), int):
        raise RunError(f"{path} is damaged: it has no schema number")
    if record["schema"] > SCHEMA:
        raise RunError(f"{path} has schema {record['schema']}, this hpcmlip reads up to {SCHEMA}: upgrade hpcmlip")
    config = load(RunConfig, folder / "run.yaml")
    wanted = record["evaluate"]
    evaluation = Evaluation(Path(wanted["store"]), wanted["split"]) if wanted else None
    return Experiment(folder, config, record["members"], evaluation)


def check_folder(experiment: Experiment) -> None:
    """Raises ConfigError if the folder holds something else, or an experiment that this one does not continue."""
    folder = experiment.folder
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / RECORD).is_file():
        what = "a single run" if (folder / "config.yaml").exists() else "something else"
        raise ConfigError(f"{folder} holds {what}, no experiment; name another folder with --run-dir")
    before = open_experiment(folder)
    changed = differing(*(json.loads(config.model_dump_json()) for config in (before.config, experiment.config)))
    if changed:
        raise ConfigError(
            f"{folder} holds an experiment with another config ({'; '.join(changed[:5])}); "
            "name another folder with --run-dir, or give it the same config to finish it"
        )
    if before.members > experiment.members:
        raise ConfigError(
            f"{folder} holds an experiment of {before.members} members, asked for are {experiment.members}; "
            f"give --members {before.members} or more to finish it, or name another folder with --run-dir"
        )


def write(experiment: Experiment, site_text: str) -> None:
    """Make the directory: configs first, the record last. What is there already stays as it is where it is the same."""
    for folder in (experiment.folder / "slurm", experiment.folder / "configs"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make {folder} ({error.strerror}); give another --run-dir") from None
    write_atomic(experiment.folder / "run.yaml", dump(experiment.config))
    write_atomic(experiment.site_file, site_text)
    for member in range(experiment.members):
        # a member that fails before its first line of log is still seen, and named, by the evaluation
        experiment.run_dir(member).mkdir(exist_ok=True)
        write_atomic(experiment.config_file(member), dump(experiment.member_config(member)))
    write_atomic(experiment.folder / RECORD, json.dumps(_record(experiment), indent=2) + "\n")


def now() -> str:
    """UTC time as the batch scripts write it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _record(experiment: Experiment) -> dict:
    evaluation = experiment.evaluation
    return {
        "schema": SCHEMA,
        "name": experiment.config.name,
        "members": experiment.members,
        "seeds": [experiment.member_config(i).train.seed for i in range(experiment.members)],
        "evaluate": evaluation and {"store": str(evaluation.store), "split": evaluation.split},
        "written": now(),
        "created_by": f"{getpass.getuser()}@{socket.gethostname()}, hpcmlip {hpcmlip.__version__}",
    }
