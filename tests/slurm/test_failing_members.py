"""R12: members that fail, are killed, diverge; and a whole ensemble under requeues, cancellations and kills.

The others go on, everything is named, --retry starts just what is missing, and in the end no number is another.
"""

import hashlib
import json
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from experiments import JOB_SECONDS, ONE_PROCESS, TWO_NODES, Submitted, run_yaml, wait_until, write_yaml
from faults import inflict, kill_one

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(3 * 3600)]

BROKEN = Path(__file__).parents[1] / "reliability" / "broken.py"
FAILS, KILLED, DIVERGES, GOOD = "exits 1", "kill -9", "diverges", "good"
LEARNING_RATES = {FAILS: 1.0e-3, KILLED: 2.0e-3, DIVERGES: 1.0e30, GOOD: 3.0e-3}


def _status(cli, queue, experiment: Submitted) -> dict[str, dict]:
    found = json.loads(cli("status", experiment.folder, "--json", env=queue.env).stdout)["members"]
    return {member["member"]: member for member in found}


def _fingerprint(folder: Path) -> dict[str, tuple[str, int]]:
    """{file: (hash, time of its last change)} of what a finished run is."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.fault("R12", sample=1, soak=5)
def test_three_of_five_fail_each_in_its_way(queue, cli, xtb_store, tmp_path, draw, record_property):
    fates = draw.rng.sample([FAILS, KILLED, DIVERGES, GOOD, GOOD], 5)
    run = run_yaml(tmp_path, xtb_store, epochs=10, max_bad_steps=2, log_seconds=0.05)
    values = [{"optim.lr": LEARNING_RATES[fate], "train.seed": i} for i, fate in enumerate(fates)]
    sweep = write_yaml(tmp_path / "sweep.yaml", {"list": values})
    experiment, site = Submitted(tmp_path / "experiment"), write_yaml(tmp_path / "site.yaml", ONE_PROCESS)
    arguments = ["submit", run, "--sweep", sweep, "--evaluate", xtb_store, "--min-members", 2, "--site", site]
    arguments += ["--run-dir", experiment.folder]
    cli(*arguments, "--dry-run", env=queue.env)
    assert not queue.jobs() and not experiment.jobs()
    names = sorted(path.stem for path in (experiment.folder / "configs").iterdir())
    fate_of = dict(zip(names, fates, strict=True))
    of = {fate: name for name, fate in fate_of.items()}
    # finds a run of another config in its place, which has come as far as a checkpoint
    foreign = experiment.folder / of[FAILS] / "config.yaml"
    (foreign.parent / "checkpoints" / "one").mkdir(parents=True)
    foreign.write_text((experiment.folder / "configs" / f"{of[KILLED]}.yaml").read_text())
    cli(*arguments, env=queue.env)
    killed = f"{experiment.array}_{fates.index(KILLED)}"
    wait_until(lambda: queue.processes(killed), 120, lambda: str(queue.jobs()))
    moment = draw.rng.uniform(0, 8)
    time.sleep(moment)
    what = kill_one(queue, killed, draw.rng)
    print(f"{fate_of}: kill -9 of {what} after {moment:.1f} s")
    assert what is not None, experiment.output()
    queue.wait_empty(JOB_SECONDS)

    found, told = _status(cli, queue, experiment), experiment.output()
    good = [name for name in names if fate_of[name] == GOOD]
    bad = [name for name in names if fate_of[name] != GOOD]
    assert [name for name in names if found[name]["state"] == "finished"] == good, told
    assert found[of[FAILS]]["state"] == found[of[DIVERGES]]["state"] == "failed", told
    assert found[of[KILLED]]["state"] == ("lost" if what == "the batch shell" else "failed"), told
    assert "belongs to a run with another config" in "\n".join(found[of[FAILS]]["log"]["lines"])
    assert "non-finite" in "\n".join(found[of[DIVERGES]]["log"]["lines"])
    _evaluated_are(experiment, good)
    before = [_fingerprint(experiment.folder / name) for name in good]

    foreign.unlink()
    # from inside of a job that has a size of its own
    job = ["srun", "--nodes=1", "--ntasks=1", "--cpus-per-task=3", sys.executable, "-m", "hpcmlip"]
    said = queue.run(*job, "submit", "--retry", str(experiment.folder), timeout=240)
    assert f"To be trained: {', '.join(bad)}." in said and "2 have finished already" in said
    assert experiment.jobs()[-1]["members"] == [names.index(name) for name in bad]
    queue.wait_empty(JOB_SECONDS)
    found, told = _status(cli, queue, experiment), experiment.output()
    unfinished = [name for name in names if found[name]["state"] != "finished"]
    assert unfinished == [of[DIVERGES]], told
    _evaluated_are(experiment, [name for name in names if name != of[DIVERGES]])
    assert [_fingerprint(experiment.folder / name) for name in good] == before
    record_property("killed", what)


def _evaluated_are(experiment: Submitted, names: list[str]) -> None:
    """The evaluation is of these members, and names the others."""
    metrics, configs = experiment.metrics(), sorted((experiment.folder / "configs").iterdir())
    assert sorted(Path(member["run"]).name for member in metrics["members"]) == names
    absent = {path.stem for path in configs} - set(names)
    assert {Path(item["run"]).name for item in metrics["left_out"]} == absent
    report = (experiment.folder / "evaluation" / "report.html").read_text()
    assert all(f"Left out: {experiment.folder / name}" in report for name in absent)


@pytest.mark.control("R12", broken="evaluation after the success of all")
def test_an_evaluation_that_waits_for_success_is_seen_to_be_absent(queue, cli, xtb_store, tmp_path):
    run, experiment = run_yaml(tmp_path, xtb_store), Submitted(tmp_path / "experiment")
    site = write_yaml(tmp_path / "site.yaml", ONE_PROCESS)
    arguments = ["submit", run, "--members", 2, "--evaluate", xtb_store, "--site", site]
    arguments += ["--run-dir", experiment.folder]
    cli(*arguments, "--dry-run", env=queue.env)
    foreign = experiment.folder / "member_00" / "config.yaml"
    foreign.write_text((experiment.folder / "configs" / "member_01.yaml").read_text())
    (foreign.parent / "checkpoints" / "one").mkdir(parents=True)
    queue.run(sys.executable, str(BROKEN), "after_success", *map(str, arguments))
    wait_until(
        lambda: [job.split()[-1] for job in queue.jobs()] == ["DependencyNeverSatisfied"], 240, experiment.output
    )
    assert (experiment.folder / "member_01" / "done.json").exists()
    with pytest.raises(FileNotFoundError):
        _evaluated_are(experiment, ["member_01"])


# ------------------------------------------------------------------------------------------------ a campaign of faults

MEMBERS = {True: 8, False: 2}
FAULTS = {True: 24, False: 2}


@pytest.mark.fault("R12", sample=0, soak=1)
def test_an_ensemble_ends_as_if_nobody_had_touched_it(
    queue, cli, xtb_store, ensemble_run, undisturbed_ensemble, tmp_path, draw, record_property
):
    members, num_faults = MEMBERS[draw.is_soak], FAULTS[draw.is_soak]
    expected = undisturbed_ensemble(members)
    experiment, site = Submitted(tmp_path / "experiment"), write_yaml(tmp_path / "site.yaml", TWO_NODES)
    arguments = ["--members", members, "--evaluate", xtb_store, "--min-members", members, "--site", site]
    began = time.monotonic()
    cli("submit", ensemble_run, *arguments, "--run-dir", experiment.folder, env=queue.env)
    faults: Counter[str] = Counter()
    end = time.monotonic() + 2 * 3600
    while not (experiment.folder / "evaluation" / "metrics.json").exists():
        assert time.monotonic() < end, experiment.output()
        if not queue.jobs():
            cli("submit", "--retry", experiment.folder, env=queue.env)
        time.sleep(draw.rng.uniform(0, 12) if faults.total() < num_faults else 1)
        if faults.total() < num_faults and (what := inflict(queue, experiment, draw.rng)):
            faults[what] += 1
    seconds = time.monotonic() - began
    queue.wait_empty(JOB_SECONDS)
    wait_until(lambda: not queue.processes(), 30, lambda: str(queue.processes()))
    names = [f"member_{i:02d}" for i in range(members)]
    different = [name for name in names if experiment.weights(name) != expected.weights(name)]
    assert not different, f"{faults}\n{experiment.output()}"
    steps = expected.steps("member_00")
    assert all(experiment.steps(name) == steps for name in names)
    here, there = experiment.metrics(), expected.metrics()
    for key in ("levels", "ensemble", "left_out", "num_structures", "conformers"):
        assert here[key] == there[key], key
    figures = [[{k: v for k, v in member.items() if k != "run"} for member in m["members"]] for m in (here, there)]
    assert figures[0] == figures[1]
    assert faults.total(), "done before the first fault"
    starts = [experiment.count(name, "started") for name in names]
    record_property("members", members)
    record_property("faults", ", ".join(f"{count} x {what}" for what, count in sorted(faults.items())))
    record_property("starts of the members", " ".join(map(str, starts)))
    record_property("arrays submitted", len(experiment.jobs()))
    record_property("seconds", round(seconds))
