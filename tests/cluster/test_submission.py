"""`hpcmlip submit` up to the queue: what it writes, what it refuses before that, and what it would submit."""

import itertools
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from runs import pretend_finished

from hpcmlip.cluster import experiment as experiments
from hpcmlip.cluster.submission import How, retry, submit
from hpcmlip.config import RunConfig, TransferSection, load
from hpcmlip.errors import ConfigError, DataError, RunError


def _submit(config: RunConfig, folder: Path, **arguments) -> int:
    how = How(**{key: arguments.pop(key) for key in ("site", "local", "ranks") if key in arguments}, dry_run=True)
    defaults = {"members": 3, "sweep_file": None, "evaluate": None, "split": None, "min_members": None, "how": how}
    return submit(config, folder, **(defaults | arguments))


def _changed(config: RunConfig, **train) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def test_members_differ_in_their_seed_alone(config, tmp_path):
    assert _submit(config, tmp_path / "e") == 0
    for member in range(3):
        written = load(RunConfig, tmp_path / "e" / "configs" / f"member_{member:02d}.yaml")
        assert written == _changed(config, seed=11 + member)
        assert (tmp_path / "e" / f"member_{member:02d}").is_dir()
    assert load(RunConfig, tmp_path / "e" / "run.yaml") == config
    record = json.loads((tmp_path / "e" / "experiment.json").read_text())
    assert [m["values"] for m in record["members"]] == [{"train.seed": seed} for seed in (11, 12, 13)]
    assert record["evaluate"] is None


def test_dry_run_says_what_would_be_submitted(config, xtb_store, tmp_path, capsys):
    folder = tmp_path / "it's an experiment"
    _submit(config, folder, evaluate=xtb_store)
    said = capsys.readouterr().out
    assert "&& sbatch --parsable slurm/train.sbatch" in said
    assert "&& sbatch --parsable '--dependency=afterany:<train>' slurm/evaluate.sbatch" in said
    assert "--array=0-2%8" in (folder / "slurm" / "train.sbatch").read_text()
    assert not (folder / "jobs.json").exists()
    assert (folder / "site.yaml").read_text().startswith("# What `hpcmlip submit` tells Slurm")


def test_only_what_has_not_finished_is_submitted(config, xtb_store, tmp_path, capsys):
    folder = tmp_path / "e"
    _submit(config, folder, evaluate=xtb_store)
    for member in (0, 2):
        pretend_finished(folder / f"member_{member:02d}")
    _submit(config, folder, members=5)
    assert "--array=1,3-4%8" in (folder / "slurm" / "train.sbatch").read_text()
    assert "members 1,3-4; 2 have finished already" in capsys.readouterr().out
    # the evaluation asked for at first still counts
    assert experiments.open_experiment(folder).evaluation.store == xtb_store
    # weights that are not those a run ended with are neither finished nor to be trained: the user is asked
    (folder / "member_00" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(RunError, match=r"member_00 is damaged .* or remove the run directory to train again"):
        experiments.open_experiment(folder).unfinished()


def test_site_of_the_experiment_is_used_again(config, tmp_path):
    site = tmp_path / "my.yaml"
    site.write_text("{nodes: 2, tasks_per_node: 2, partition: long}")
    _submit(config, tmp_path / "e", site=site)
    site.unlink()
    _submit(config, tmp_path / "e")
    assert "#SBATCH --partition=long" in (tmp_path / "e" / "slurm" / "train.sbatch").read_text()


def test_another_config_or_fewer_members_are_refused(config, tmp_path):
    _submit(config, tmp_path / "e")
    (tmp_path / "e" / "member_00" / "log.txt").touch()
    before = _contents(tmp_path / "e")
    with pytest.raises(ConfigError, match=r"another config \(train\.epochs: 2 -> 9\)"):
        _submit(_changed(config, epochs=9), tmp_path / "e")
    with pytest.raises(ConfigError, match="experiment of 3 members, asked for are 2"):
        _submit(config, tmp_path / "e", members=2)
    assert _contents(tmp_path / "e") == before


def test_of_a_dry_run_nothing_stands_in_the_way(config, tmp_path):
    _submit(config, tmp_path / "e", members=4)
    _submit(_changed(config, epochs=9), tmp_path / "e", members=2)
    assert {path.name for path in (tmp_path / "e" / "configs").iterdir()} == {"member_00.yaml", "member_01.yaml"}
    assert sorted(path.name for path in (tmp_path / "e").glob("member_*")) == ["member_00", "member_01"]
    assert load(RunConfig, tmp_path / "e" / "configs" / "member_01.yaml").train.epochs == 9


def test_a_folder_that_holds_something_else_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: x")
    with pytest.raises(ConfigError, match="holds a single run, no experiment"):
        _submit(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="holds something else"):
        _submit(config, tmp_path)


def test_a_submission_killed_at_any_moment_can_be_given_again(config, tmp_path):
    (tmp_path / "s.yaml").write_text(
        "{optuna: {trials: 2, sampler: {kind: TPESampler, seed: 1}, optim.lr: {choice: [1, 2]}}}"
    )
    _submit(config, tmp_path / "undisturbed", members=None, sweep_file=tmp_path / "s.yaml")
    wanted = experiments.open_experiment(tmp_path / "undisturbed")
    sweep_text = (wanted.folder / experiments.SWEEP).read_text()
    moment, killed = 0, True
    while killed:
        experiment = replace(wanted, folder=tmp_path / f"killed {moment}")
        killed = _killed_at(moment, lambda: experiments.write(experiment, "", sweep_text))  # noqa: B023
        assert experiments.previous(experiment.folder) in (None, experiment)
        if killed:
            experiments.write(experiment, "", sweep_text)
        assert experiments.previous(experiment.folder) == experiment
        assert _names(experiment.folder) == _names(wanted.folder) - {
            "study.journal",
            "study.lock",
            "slurm/train.sbatch",
        }
        moment += 1
    assert moment > 20


def _killed_at(moment: int, call: Callable[[], object]) -> bool:
    """Whether a process that calls it is killed, before it opens, makes, renames or removes this (from 0) file."""
    child = os.fork()
    if child == 0:
        left = itertools.count(moment, -1)

        def hook(event: str, _: tuple) -> None:
            if event in ("open", "os.mkdir", "os.rename", "os.remove") and next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            call()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def _names(folder: Path) -> set[str]:
    """Files and folders, without what a killed process was about to write."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return {name for name in found if not name.endswith(".tmp")}


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        ({"site": "nodes: 3"}, (ConfigError, r"3 x 2 = 6 processes a member, which does not divide")),
        ({"local": True, "ranks": 3}, (ConfigError, r"--ranks 3 does not divide train.micro_batches_per_step = 4")),
        ({"evaluate": Path("absent.zarr")}, (DataError, "absent.zarr")),
        ({"min_members": 4}, (ConfigError, "--min-members 4 cannot be met by 3 members")),
        ({"split": "tset"}, (ConfigError, "no split 'tset'.*did you mean 'test'")),
        ({"site": "walltime: 3"}, (ConfigError, "unknown key 'walltime'")),
    ],
)
def test_what_would_fail_in_the_queue_is_refused_before_it(config, xtb_store, tmp_path, arguments, refusal):
    if isinstance(arguments.get("site"), str):
        (tmp_path / "site.yaml").write_text(arguments["site"])
        arguments = arguments | {"site": tmp_path / "site.yaml"}
    with pytest.raises(refusal[0], match=refusal[1]):
        _submit(config, tmp_path / "e", **({"evaluate": xtb_store} | arguments))
    assert not (tmp_path / "e").exists()


def test_unknown_level_and_absent_store_are_refused_before_the_queue(config, tmp_path):
    for update, error in (({"levels": {"ccsd": "E"}}, ConfigError), ({"stores": (tmp_path / "no.zarr",)}, DataError)):
        wrong = config.model_copy(update={"data": config.data.model_copy(update=update)})
        with pytest.raises(error):
            _submit(wrong, tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_a_model_to_start_from_that_is_not_there_is_refused_before_the_queue(config, tmp_path):
    started = config.model_copy(update={"transfer": TransferSection(model=tmp_path / "nowhere", freeze=(0,))})
    with pytest.raises(DataError, match="nowhere"):
        _submit(started, tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_without_slurm_the_way_out_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match=r"no sbatch on this machine.*--local"):
        _submit(config, tmp_path / "e", how=How())
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("", "cannot be read"),
        ("[]", "no schema number"),
        ('{"schema": 99}', "upgrade hpcmlip"),
        ('{"schema": 1}', "another --run-dir"),
        ('{"schema": 2, "evaluate": null, "members": 3}', "is damaged"),
    ],
)
def test_damaged_record_is_named(config, tmp_path, record, said):
    _submit(config, tmp_path / "e")
    (tmp_path / "e" / "experiment.json").write_text(record)
    with pytest.raises(RunError, match=said):
        _submit(config, tmp_path / "e")


def _contents(folder: Path) -> dict[str, str]:
    return {str(p): p.read_text() for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------------------------------ --retry


def test_retry_needs_no_config_and_takes_what_has_not_finished(config, xtb_store, tmp_path, capsys):
    folder = tmp_path / "e"
    _submit(config, folder, evaluate=xtb_store)
    pretend_finished(folder / "member_01")
    capsys.readouterr()
    assert retry(folder, How(dry_run=True)) == 0
    said = capsys.readouterr().out
    assert "To be trained: member_00, member_02.\n" in said
    assert "members 0,2; 1 have finished already" in said
    assert "'--dependency=afterany:<train>' slurm/evaluate.sbatch" in said
    assert "--array=0,2%8" in (folder / "slurm" / "train.sbatch").read_text()


def test_retry_leaves_alone_what_is_in_the_queue(config, xtb_store, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "e"
    _submit(config, folder, evaluate=xtb_store)
    pretend_finished(folder / "member_01")
    jobs = [{"id": "7", "kind": "train", "members": [0, 1, 2]}, {"id": "8", "kind": "evaluate", "members": []}]
    (folder / "jobs.json").write_text(json.dumps({"jobs": [{"submitted": ""} | job for job in jobs]}))
    queue = {"7_2": "RUNNING", "8": "PENDING"}
    monkeypatch.setattr("hpcmlip.cluster.scheduler.states", lambda jobs: queue if jobs == ["7", "8"] else None)
    capsys.readouterr()
    retry(folder, How(dry_run=True))
    said = capsys.readouterr().out
    assert "At work, and left alone: member_02 (running)." in said and "members 0; 1 have finished" in said
    # two evaluations at once would write into one folder
    assert "--dependency=afterany:<train>:7:8'" in said
    queue["7_0"] = "PENDING"
    retry(folder, How(dry_run=True))
    said = capsys.readouterr().out
    assert "nothing to do" in said and "sbatch" not in said
    # the evaluation alone was cancelled
    del queue["8"]
    retry(folder, How(dry_run=True))
    said = capsys.readouterr().out
    assert "afterany:7 slurm/evaluate.sbatch" in said and "train.sbatch" not in said


def test_retry_waits_for_no_process_of_this_machine(config, xtb_store, tmp_path, capsys):
    folder = tmp_path / "e"
    _submit(config, folder, members=2, evaluate=xtb_store)
    pretend_finished(folder / "member_01")
    starter = f"2026-01-01T00:00:00Z local-{os.getpid()}@{socket.gethostname()} started\n"
    (folder / "slurm" / "member_00.jobs").write_text(starter.replace("2026", "2999"))
    capsys.readouterr()
    retry(folder, How(local=True, dry_run=True))
    said = capsys.readouterr().out
    assert "left alone: member_00 (running)" in said and "nothing to do" in said and "evaluate" not in said


def test_retry_of_a_finished_experiment_does_nothing_even_without_slurm(config, tmp_path, capsys, monkeypatch):
    _submit(config, tmp_path / "e")
    for member in range(3):
        pretend_finished(tmp_path / "e" / f"member_{member:02d}")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert retry(tmp_path / "e", How()) == 0
    assert "All 3 members" in (said := capsys.readouterr().out) and "nothing to do" in said
    (tmp_path / "e" / "member_00" / "done.json").unlink()
    with pytest.raises(RunError, match=r"no sbatch on this machine.*--local"):
        retry(tmp_path / "e", How())


def test_retry_with_another_site(config, tmp_path):
    _submit(config, tmp_path / "e")
    site = tmp_path / "longer.yaml"
    site.write_text('{time: "3:00:00"}')
    retry(tmp_path / "e", How(site=site, dry_run=True))
    assert "#SBATCH --time=3:00:00" in (tmp_path / "e" / "slurm" / "train.sbatch").read_text()
    assert (tmp_path / "e" / "site.yaml").read_text() == site.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run.yaml", "--retry", "e"], "leave out RUN.yaml"),
        (["--retry", "e", "--members", 3, "--run-dir", "x"], "leave out --members, --run-dir"),
        (["--retry", "e", "--sweep", "s.yaml"], "leave out --sweep"),
        (["--retry", "e"], "there is no folder"),
        ([], "needs a RUN.yaml, or --retry DIR"),
        (["--local"], "needs a RUN.yaml, or --retry DIR"),
    ],
)
def test_contradicting_arguments_are_refused(cli, tmp_path, arguments, said):
    done = cli("submit", *arguments, expect=2, cwd=tmp_path)
    assert said in done.stderr and "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [{"split": "val"}, {"min_members": 2}])
def test_a_split_or_a_minimum_without_a_store_is_refused(config, tmp_path, option):
    with pytest.raises(ConfigError, match="give --evaluate STORE with it"):
        _submit(config, tmp_path / "e", **option)


def test_the_minimum_of_members_stays_with_the_experiment(config, xtb_store, tmp_path, capsys):
    folder = tmp_path / "e"
    _submit(config, folder, evaluate=xtb_store, min_members=2)
    (folder / "slurm" / "evaluate.sbatch").unlink()
    retry(folder, How(dry_run=True))
    assert "--min-members 2 " in (folder / "slurm" / "evaluate.sbatch").read_text()
    retry(folder, How(dry_run=True, local=True))
    assert "--min-members 2 " in capsys.readouterr().out
