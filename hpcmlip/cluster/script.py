"""Batch scripts as text: pure functions of a site and an experiment; every value is quoted for the shell.

The templates in `slurm/` hold all shell code; @@{name} in them is replaced here. Paths stand in the body, never in an
#SBATCH line, which has quoting rules of its own: output goes below the folder in which sbatch is called.
"""

import dataclasses
import shlex
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcmlip.cluster.site import Resources, Site
from hpcmlip.errors import ConfigError


class Template(string.Template):
    """@@{name}: `$` and `%` belong to the shell."""

    delimiter = "@@"


@dataclass(frozen=True)
class Evaluation:
    """What the evaluation job is about."""

    store: Path
    split: str
    min_members: int = 1
    """With fewer finished members it fails instead."""


def train_script(
    site: Site, name: str, experiment: Path, names: Sequence[str], members: Sequence[int], *, is_suggested: bool = False
) -> str:
    """Text of the array job that trains these members of those with `names` (their indices are the task ids).

    `is_suggested`: members of a sweep by Optuna, whose names and settings a job asks for when it starts.
    """
    directives = [
        f"--array={array_text(members, site)}",
        "--output=slurm/train-%A_%a.out",
        # a preempted or requeued job goes on in the same log (Slurm would truncate it)
        "--requeue",
        "--open-mode=append",
        f"--signal=B:USR2@{site.warn_seconds}",
    ]
    header = _header(site, site, name, directives)
    known = f"members=({shlex.join(names)})\nmember=${{members[$SLURM_ARRAY_TASK_ID]}}"
    suggested = f'member=$({command(site)} suggest "$experiment" "$SLURM_ARRAY_TASK_ID")'
    fields = {
        "experiment": shlex.quote(str(experiment)),
        "members": shlex.join(names),
        "member": suggested if is_suggested else known,
        "try_again": "yes" if is_suggested else "no",
    }
    return _render(site, "train.sbatch", header, site.cpus_per_task, fields)


def evaluate_script(site: Site, name: str, experiment: Path, evaluation: Evaluation) -> str:
    """Text of the job that evaluates the experiment."""
    directives = ["--output=slurm/evaluate-%j.out", "--requeue", "--open-mode=append"]
    values = {"experiment": experiment, **dataclasses.asdict(evaluation)}
    fields = {key: shlex.quote(str(value)) for key, value in values.items()}
    header = _header(site, site.evaluation, f"{name}-evaluate", directives)
    return _render(site, "evaluate.sbatch", header, site.evaluation.cpus_per_task, fields)


def check_path(experiment: Path) -> None:
    """Raises ConfigError for a folder whose name Slurm would not take literally in the name of a log file.

    Seen with Slurm 22.05: it looks for patterns in the whole path, its folder included, and a backslash anywhere turns
    them off, so that all array tasks would write into one file. Anything else may stand in it, a line break too.
    """
    bad = [repr(c) for c in ("%", "\\") if c in str(experiment)]
    if bad:
        raise ConfigError(
            f"the path of the experiment, {experiment}, holds {' and '.join(bad)}, which Slurm gives "
            "a meaning of its own in the names of log files; name another folder with --run-dir"
        )


def array_text(members: Sequence[int], site: Site | None = None) -> str:
    """Slurm's notation of ascending indices: [0, 1, 2, 5] -> "0-2,5", with the throttle of a site."""
    parts: list[list[int]] = []
    for index in members:
        if parts and index == parts[-1][-1] + 1:
            parts[-1][1:] = [index]
        else:
            parts.append([index])
    return ",".join("-".join(map(str, part)) for part in parts) + (f"%{site.throttle}" if site else "")


def _render(site: Site, template: str, header: str, threads: int, own: dict[str, str]) -> str:
    modules = [f"module load {shlex.join(site.modules)}"] if site.modules else []
    fields = {
        "directives": header,
        "setup": "\n".join([*modules, *site.setup]) or ":",
        "cpus_per_task": str(threads),
        "srun_options": " ".join(map(shlex.quote, site.srun_options)),
        "command": command(site),
        **own,
    }
    try:
        return Template(site.template(template)).substitute(fields)
    except (KeyError, ValueError) as error:
        known = ", ".join(sorted(fields))
        raise ConfigError(f"the template {template} holds {error}; after @@ stands one of {{{known}}}") from None


def command(site: Site) -> str:
    """Shell text that starts hpcmlip, up to the name of its command."""
    # the site's own words are shell text on purpose: $HOME and quotes in them mean what they mean in a shell
    # a container has a python of its own
    python = site.python or ("python3" if site.container else shlex.quote(sys.executable))
    return " ".join([*([site.container] if site.container else []), python, "-m hpcmlip"])


def _header(site: Site, ask: Resources, name: str, directives: list[str]) -> str:
    # the site's own options last: they win
    lines = [f"--job-name={name}", *_resources(ask), *_accounting(site), *directives, *site.sbatch_options]
    return "\n".join(f"#SBATCH {line}" for line in lines)


def _resources(ask: Resources) -> list[str]:
    lines = [
        f"--nodes={ask.nodes}",
        f"--ntasks-per-node={ask.tasks_per_node}",
        f"--cpus-per-task={ask.cpus_per_task}",
        f"--time={ask.time}",
    ]
    lines += [f"--gpus-per-node={ask.gpus_per_node}"] if ask.gpus_per_node else []
    return lines + ([f"--mem={ask.mem}"] if ask.mem else [])


def _accounting(site: Site) -> list[str]:
    named = {"account": site.account, "partition": site.partition, "qos": site.qos}
    return [f"--{key}={value}" for key, value in named.items() if value]
