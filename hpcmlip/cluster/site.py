"""What differs from cluster to cluster: `Site`, read from SITE.yaml; `slurm/site.yaml` explains the keys to users."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from hpcmlip import slurm
from hpcmlip.config import Count, Section, from_values, load
from hpcmlip.errors import ConfigError

PACKAGE_FOLDER = Path(slurm.__file__).parent
DEFAULT_FILE = PACKAGE_FOLDER / "site.yaml"

Word = Annotated[str, Field(pattern=r"^[^\s'\"\\]+$")]
"""Goes into an #SBATCH line as it is."""
Option = Annotated[str, Field(pattern=r"^-[^\n\r]+$")]
Line = Annotated[str, Field(pattern=r"^[^\n\r]+$")]


class Asked(Section):
    """What a job asks for, as far as it is said."""

    nodes: Count = 1
    tasks_per_node: Count = 2
    cpus_per_task: Count = 1
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """0 trains on CPUs; otherwise one process a GPU."""
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d\d){0,2}$")] = "24:00:00"
    mem: Annotated[str, Field(pattern=r"^\d+[KMGT]?$")] | None = None
    """Memory a node."""

    @property
    def ranks(self) -> int:
        """Processes of a job."""
        return self.nodes * self.tasks_per_node

    @field_validator("time", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError('write the time in quotes, as in "24:00:00": bare, YAML reads it as a number of base 60')
        return value


class Resources(Asked):
    """What one job asks for."""

    @model_validator(mode="after")
    def _check(self):
        if self.gpus_per_node not in (0, self.tasks_per_node):
            raise ValueError(
                f"one process uses one GPU: tasks_per_node is {self.tasks_per_node}, "
                f"gpus_per_node {self.gpus_per_node}; "
                "make them equal, or gpus_per_node 0"
            )
        return self


class Site(Resources):
    """SITE.yaml."""

    path_keys = frozenset({"templates"})
    account: Word | None = None
    partition: Word | None = None
    qos: Word | None = None
    throttle: Count = 8
    """Members that run at the same time."""
    warn_seconds: Count = 180
    """Seconds before the time limit at which training is asked to save; Slurm may be 60 s early."""
    modules: tuple[Word, ...] = ()
    setup: tuple[Line, ...] = ()
    """Shell lines before training starts."""
    container: Line | None = None
    """Command before python, as typed in a shell."""
    python: Line | None = None
    """Python of the jobs; default: the one that submits."""
    sbatch_options: tuple[Option, ...] = ()
    srun_options: tuple[Option, ...] = ()
    evaluate: Asked | None = None
    """Resources of the evaluation job where they differ from those of a member."""
    templates: Path | None = None
    """Folder with train.sbatch and evaluate.sbatch; default: the package's."""

    @property
    def evaluation(self) -> Resources:
        """What the evaluation job asks for. Raises ConfigError for a contradiction."""
        own = {key: getattr(self, key) for key in Asked.model_fields}
        other = self.evaluate.model_dump(exclude_unset=True) if self.evaluate else {}
        return from_values(Resources, own | other, Path(), where="evaluate")

    def check_ranks(self, micro_batches: int) -> None:
        """Raises ConfigError unless the processes of a member share its micro-batches evenly."""
        if micro_batches % self.ranks:
            raise ConfigError(
                f"the site asks for {self.nodes} x {self.tasks_per_node} = {self.ranks} processes a member, "
                f"which does not divide train.micro_batches_per_step = {micro_batches}; change one of them"
            )

    def template(self, name: str) -> str:
        """Text of `train.sbatch` or `evaluate.sbatch`; raises ConfigError if it cannot be read."""
        path = (self.templates or PACKAGE_FOLDER) / name
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the batch template {path}: {error}") from None


def load_site(path: Path) -> Site:
    """The site of a YAML file; raises ConfigError naming file and key."""
    site = load(Site, path)
    site.evaluation  # noqa: B018  (a contradiction is told now, not when the job is written)
    return site
