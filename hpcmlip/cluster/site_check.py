"""`hpcmlip doctor`: SITE.yaml against the Slurm of this machine, by the table of sinfo and by sbatch's own opinion."""

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcmlip.cluster import scheduler, script
from hpcmlip.cluster.checking import ERROR, OK, WARNING, Answer, Finding, ask
from hpcmlip.cluster.script import Evaluation
from hpcmlip.cluster.site import DEFAULT_FILE, Resources, Site, load_site
from hpcmlip.errors import ConfigError
from hpcmlip.plugins import suggest

SECONDS = 30
EARLY_SECONDS = 60
"""Slurm's warning may come so much earlier than asked for (sbatch(1), --signal)."""
_SINFO = ["sinfo", "--noheader", "--exact", "--format=%P|%a|%l|%D|%T|%c|%m|%G"]
_MEGABYTES = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind and state in a partition: a line of sinfo."""

    partition: str
    is_default: bool
    is_up: bool
    seconds: float
    """Longest time of a job."""
    count: int
    state: str
    cpus: int
    megabytes: int
    gpus: int


def slurm(site_file: Path | None) -> list[Finding]:
    """Whether Slurm would take the jobs of a site; without a file, of the package's."""
    absent = [name for name in ("sbatch", "sinfo", "squeue", "scancel", "scontrol") if shutil.which(name) is None]
    if absent and site_file is None:
        return [Finding("slurm", OK, "none here: 'hpcmlip submit --local' runs the members on this machine")]
    if absent:
        return [Finding("slurm", ERROR, f"no {', '.join(absent)}", "check the site on a login node of the cluster")]
    try:
        site = load_site(site_file or DEFAULT_FILE)
    except ConfigError as error:
        return [Finding("site", ERROR, str(error), "see slurm/site.yaml, which explains the keys")]
    env = scheduler.clean(os.environ)
    answer = ask(_SINFO, SECONDS, env=env)
    if answer.code != 0:
        state = ERROR if site_file else WARNING  # a machine may have Slurm's programs and be of no cluster
        return [Finding("slurm", state, f"sinfo: {answer.last_words}", "the controller is down or out of reach")]
    found = compare(site, parse(answer.stdout))
    return found if any(item.state == ERROR for item in found) else [*found, *_opinion(site, env)]


def parse(text: str) -> list[Nodes]:
    """The lines that sinfo prints in our format."""
    found = []
    for line in text.splitlines():
        name, avail, limit, count, state, cpus, megabytes, gres = line.strip().split("|")
        gpus = sum(int(n) for n in re.findall(r"gpu:(?:[^:,(]+:)?(\d+)", gres))
        node = (int(count), state, int(cpus), int(megabytes), gpus)
        found.append(Nodes(name.rstrip("*"), name.endswith("*"), avail == "up", _seconds(limit), *node))
    return found


def compare(site: Site, nodes: Sequence[Nodes]) -> list[Finding]:
    """What of a site this cluster has not."""
    names = list(dict.fromkeys(item.partition for item in nodes))
    asked = site.partition.split(",") if site.partition else [n.partition for n in nodes if n.is_default][:1]
    unknown = [name for name in asked if name not in names]
    if not asked or unknown:
        text = f"there is none named '{unknown[0]}'{suggest(unknown[0], names)}" if unknown else "there is no default"
        return [Finding("partition", ERROR, text, f"set partition to one of {', '.join(names)}")]
    mine = [item for item in nodes if item.partition in asked]
    if not any(item.is_up for item in mine):
        return [Finding("partition", ERROR, f"{', '.join(asked)} is down", "name another partition, or wait")]
    found = [*_compare("members", site, mine), *_compare("evaluation", site.evaluation, mine)]
    if _seconds(site.time) <= site.warn_seconds + EARLY_SECONDS:
        text = f"time {site.time} leaves nothing before the warning, {site.warn_seconds} s before its end or earlier"
        found.append(Finding("members", ERROR, text, "raise time, or lower warn_seconds"))
    return found


def _compare(what: str, ask_for: Resources, nodes: Sequence[Nodes]) -> list[Finding]:
    cpus, megabytes = ask_for.tasks_per_node * ask_for.cpus_per_task, _megabytes(ask_for.mem)
    longest = max(item.seconds for item in nodes)
    if _seconds(ask_for.time) > longest:
        remedy = f"ask for at most {longest / 3600:g} h: what is left goes on in the next job by itself"
        return [Finding(what, ERROR, f"time {ask_for.time} is above the partition's limit", remedy)]
    wanted = f"{cpus} cores" + (f", {ask_for.mem}" if ask_for.mem else "")
    wanted += f", {ask_for.gpus_per_node} GPUs" if ask_for.gpus_per_node else ""
    fits = [n for n in nodes if n.cpus >= cpus and n.megabytes >= megabytes and n.gpus >= ask_for.gpus_per_node]
    if sum(item.count for item in fits) < ask_for.nodes:
        kinds = ", ".join(dict.fromkeys(f"{n.count} of {n.cpus} cores, {n.megabytes} MB, {n.gpus} GPUs" for n in nodes))
        text = f"{ask_for.nodes} nodes of {wanted} asked for; there are {kinds}"
        return [Finding(what, ERROR, text, "lower nodes, tasks_per_node, cpus_per_task, mem or gpus_per_node")]
    works = sum(item.count for item in fits if not re.match("down|drain|fail|unk|maint|power", item.state))
    if works < ask_for.nodes:
        text = f"{ask_for.nodes} nodes of {wanted} asked for, of which {works} work now"
        return [Finding(what, WARNING, text, "jobs will wait for nodes that are down or drained")]
    return [Finding(what, OK, f"{ask_for.nodes} x ({wanted}) for {ask_for.time}: {works} such nodes")]


def _opinion(site: Site, env: dict[str, str]) -> list[Finding]:
    """What sbatch says of the scripts themselves: it knows accounts, limits and the site's own options."""
    try:
        scripts = {
            "train job": script.train_script(site, "doctor", Path("/experiment"), ["member_00"], [0]),
            "evaluate job": script.evaluate_script(site, "doctor", Path("/experiment"), Evaluation(Path("/s"), "test")),
        }
    except ConfigError as error:
        return [Finding("templates", ERROR, str(error), "see hpcmlip/slurm for the package's own")]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for what, text in scripts.items():
            path = Path(folder) / "job.sbatch"
            path.write_text(text)
            found.append(_judge(what, ask(["sbatch", "--test-only", str(path)], SECONDS, env=env)))
    return found


def _judge(what: str, answer: Answer) -> Finding:
    if answer.code == 0:
        return Finding(what, OK, answer.last_words.removeprefix("sbatch: "))
    said = " ".join(line.removeprefix("sbatch: ").strip() for line in answer.stderr.splitlines())
    return Finding(what, ERROR, f"sbatch would refuse it: {said}", "change the site file as it says")


def _seconds(time: str) -> float:
    """Slurm's notation of a time: minutes, min:s, h:min:s, days-h[:min[:s]], infinite."""
    days, separator, clock = time.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
    except ValueError:  # infinite, n/a
        return float("inf")
    if separator:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = 0, *(*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60.0 + seconds


def _megabytes(mem: str | None) -> float:
    if mem is None:
        return 0.0
    return float(mem.rstrip("KMGT")) * _MEGABYTES[mem[-1] if mem[-1] in _MEGABYTES else "M"]
