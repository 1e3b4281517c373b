"""`hpcmlip doctor`: what it finds on a sound machine, and what it says of each thing that can be wrong."""

import json
import os
import subprocess
import sys
import time
from importlib import metadata

import pytest
from runs import wait_for_end

from hpcmlip.cluster import checking, machine, site_check
from hpcmlip.cluster.checking import Check, Finding, ask, examine
from hpcmlip.cluster.site import Site

SINFO = """\
main*|up|1-00:00:00|4|idle|64|256000|(null)
main*|up|1-00:00:00|2|down*|64|256000|(null)
gpu|up|2:00:00|3|mixed|128|512000|gpu:a100:4(S:0-1)
old|down|infinite|8|idle|16|32000|(null)
"""


def _one(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


@pytest.mark.distributed
def test_a_sound_machine_without_slurm(cli, tmp_path):
    programs, folder = tmp_path / "programs", tmp_path / "here"
    for path in (programs, folder):
        path.mkdir()
    (programs / "c++").symlink_to("/bin/true")
    (programs / "sh").symlink_to("/bin/sh")
    env = {"PATH": programs, "TORCH_EXTENSIONS_DIR": tmp_path}
    done = cli("doctor", "--json", cwd=folder, env=env, expect=None)
    found = {item["check"]: item for item in json.loads(done.stdout)}
    assert {name for name, item in found.items() if item["state"] == "error"} == set(), found
    assert done.returncode == 0 and "Traceback" not in done.output
    names = {"python", "packages", "extension builds", "space", "writing", "file locks", "clock", "network", "slurm"}
    assert names | {"compiler", "torch", "two processes", "mpi"} == set(found)
    assert "submit --local" in found["slurm"]["text"]
    assert list(folder.iterdir()) == []


def test_lines_carry_the_remedy_and_the_exit_code_is_1(cli, tmp_path):
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    # a torch that cannot be imported must not keep the doctor from looking at the rest
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    (tmp_path / "site.yaml").write_text("partitoin: x")
    env = {"TORCH_EXTENSIONS_DIR": tmp_path, "PYTHONPATH": tmp_path}
    done = cli("doctor", "--site", tmp_path / "site.yaml", cwd=tmp_path, env=env, expect=1)
    lines = done.stdout.splitlines()
    assert any(f"rm {lock}" in line and line.startswith("error    extension builds") for line in lines)
    assert any("libcudart" in line and line.startswith("error    torch") for line in lines)
    assert any(line.startswith("error    two processes") for line in lines)
    assert any(line.startswith("error    s") for line in lines)
    assert any(line.startswith("ok       writing") for line in lines)
    assert "Traceback" not in done.output


def test_the_doctor_itself_needs_no_torch():
    code = "import sys, hpcmlip.cluster.doctor; print([m for m in ('torch', 'deepspeed', 'zarr') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout == "[]\n"


# ---------------------------------------------------------------------------------------------------- never a hang


def test_a_check_that_hangs_or_fails_is_a_finding():
    begun = time.monotonic()
    found = _one(examine(Check("mount", lambda: time.sleep(60), 0.2)))
    assert (found.state, found.check) == ("error", "mount") and "no answer within 0.2 s" in found.text
    assert time.monotonic() - begun < 30
    found = _one(examine(Check("disk", lambda: 1 / 0, 5)))
    assert found.state == "error" and "ZeroDivisionError" in found.text


def test_a_program_ends_in_time_with_its_children(tmp_path):
    pid = tmp_path / "pid"
    answer = ask(["bash", "-c", f"sleep 300 & echo $! > '{pid}'; wait"], 1.0)
    assert answer.code is None and "not done within 1 s" in answer.stderr
    wait_for_end(int(pid.read_text()), 30)  # killed, but the kernel may still be taking it down
    assert ask(["/no/such/program"], 1.0).code is None


# --------------------------------------------------------------------------------------------------- the machine


def test_packages_out_of_range_are_named(monkeypatch):
    assert _one(machine.packages()).state == "ok"
    asked = ["numpy<2", "no-such-package>=1", "zarr>=3", "alsono>=1; extra == 'test'"]
    monkeypatch.setattr(metadata, "requires", lambda name: asked)
    wrong, missing = machine.packages()
    assert wrong.state == missing.state == "error"
    assert wrong.text == f"numpy {metadata.version('numpy')}, needed <2"
    assert missing.text == "no-such-package is missing, needed >=1"
    assert wrong.remedy == "pip install 'numpy<2' 'no-such-package>=1'"


def test_an_old_python_is_named(monkeypatch):
    assert _one(machine.python()).state == "ok"
    monkeypatch.setattr("platform.python_version", lambda: "3.9.2")
    assert "3.9.2" in (found := _one(machine.python())).text and found.state == "error"


def test_builds_that_were_killed(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "absent"))
    assert _one(machine.builds()).state == "ok"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "shm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert _one(machine.builds()).state == "warning"
    os.utime(lock, (time.time() - 3600,) * 2)
    found = _one(machine.builds())
    assert found.state == "error" and "60 min" in found.text and found.remedy == f"rm {lock}"


@pytest.mark.parametrize(("constant", "state"), [("NO_SPACE", "error"), ("LITTLE_SPACE", "warning")])
def test_space(monkeypatch, tmp_path, constant, state):
    for name in ("NO_SPACE", "LITTLE_SPACE"):
        monkeypatch.setattr(machine, name, 0.0)
    assert _one(machine._space(tmp_path)).state == "ok"
    monkeypatch.setattr(machine, constant, 1e18)
    assert _one(machine._space(tmp_path)).state == state


def test_locks_that_keep_nobody_off(monkeypatch, tmp_path):
    assert _one(machine._lock(tmp_path)).state == "ok"
    monkeypatch.setattr(machine, "_TRY_LOCK", "pass")
    assert "do not keep a second process off" in _one(machine._lock(tmp_path)).text
    monkeypatch.setattr(machine, "_TRY_LOCK", "raise OSError(37, 'No locks available')")
    assert "No locks available" in _one(machine._lock(tmp_path)).text


def test_clock_and_name(monkeypatch, tmp_path):
    assert _one(machine._clock(tmp_path)).state == "ok"
    now = time.time()
    monkeypatch.setattr(machine.time, "time", lambda: now - 100)
    assert "+100 s" in _one(machine._clock(tmp_path)).text
    monkeypatch.setattr(machine.socket, "gethostname", lambda: "no-such-host.invalid")
    found = _one(machine.network())
    assert found.state == "warning" and "no-such-host.invalid" in found.text


@pytest.mark.distributed
def test_processes_that_cannot_talk(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonsense0")
    found = _one(machine.processes())
    assert found.state == "error" and "GLOO_SOCKET_IFNAME" in found.remedy
    assert list(tmp_path.iterdir()) == []


def test_an_mpirun_that_fails_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "mpirun").write_text("#!/bin/sh\necho 'no slots' >&2; exit 1\n")
    (tmp_path / "mpirun").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    found = _one(machine.mpi())
    assert found.state == "warning" and "no slots" in found.text


# ---------------------------------------------------------------------------------------------------- the cluster


@pytest.mark.parametrize(
    ("site", "state", "said"),
    [
        (Site(), "ok", "1 x (2 cores) for 24:00:00: 4 such nodes"),
        (Site(partition="gpu", tasks_per_node=4, gpus_per_node=4, time="2:00:00"), "ok", "4 GPUs"),
        (Site(partition="main,gpu", time="1-0"), "ok", "7 such nodes"),
        (Site(partition="gpus"), "error", "none named 'gpus' (did you mean 'gpu'?"),
        (Site(partition="old"), "error", "old is down"),
        (Site(partition="gpu"), "error", "time 24:00:00 is above the partition's limit"),
        (Site(tasks_per_node=16, cpus_per_task=5), "error", "of 80 cores asked for; there are 4 of 64 cores"),
        (Site(mem="300G"), "error", "300G asked for"),
        (Site(tasks_per_node=1, gpus_per_node=1), "error", "1 GPUs asked for"),
        (Site(nodes=7), "error", "7 nodes of 2 cores"),
        (Site(nodes=5), "warning", "of which 4 work now"),
        (Site(time="4", warn_seconds=180), "error", "leaves nothing before the warning"),
        (Site(evaluate={"cpus_per_task": 100}), "error", "200 cores"),
    ],
)
def test_a_site_against_the_table_of_sinfo(site, state, said):
    found = site_check.compare(site, site_check.parse(SINFO))
    worst = [item for item in found if item.state == state]
    assert any(said in item.text for item in worst), found
    if state == "ok":
        assert len(worst) == len(found)
    else:
        assert all(item.remedy for item in worst)


def test_without_a_default_partition_one_must_be_named():
    found = site_check.compare(Site(), site_check.parse(SINFO.replace("*|up", "|up")))
    assert _one(found).remedy == "set partition to one of main, gpu, old"


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30", 1800), ("30:05", 1805), ("2:00:00", 7200), ("1-0", 86400), ("1-02:30", 95400), ("1-02:30:01", 95401)],
)
def test_times_of_slurm(time, seconds):
    assert site_check._seconds(time) == seconds
    assert site_check._seconds("infinite") == float("inf")


def test_a_site_that_cannot_be_asked_about(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _one(site_check.slurm(None)).state == "ok"
    assert _one(site_check.slurm(tmp_path / "site.yaml")).state == "error"


def test_last_words():
    assert checking.Answer(1, "out", "first\nlast \n").last_words == "last"
    assert checking.Answer(1, "out\n", "").last_words == "out"
    assert checking.Answer(1, "", "").last_words == "without a word"
