"""A real two-node Slurm of its own on this machine: own configuration, folders, ports and daemons.

By hand: `python tests/slurm/private_slurm.py FOLDER` starts it, prints the line to type in the shell that shall use
it, and stops it on Ctrl-C or SIGTERM. Nothing of it is shared with a Slurm that the machine may have: SLURM_CONF leads
clients here.
"""

import argparse
import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
START_SECONDS = 60

CONF = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire={requeue_seconds}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=verbose
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,defer
KillWait=30
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.log
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=4 RealMemory=4096
PartitionName=main Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Programs of Slurm that this machine lacks, as a sentence; empty where all are there."""
    absent = [name for name in PROGRAMS if find(name) is None]
    return f"Slurm is not installed: no {', '.join(absent)} (Debian: apt install slurm-wlm)" if absent else ""


def find(program: str) -> str | None:
    """Path of a program; the daemons live in sbin, which a user's PATH often lacks."""
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


def three_free_ports() -> list[int]:
    """Three neighbouring ports that nobody listens on, below the range from which the kernel deals out its own."""
    for first in range(20000 + os.getpid() % 1000 * 3, 32000, 3):
        sockets = [socket.socket() for _ in range(3)]
        try:
            for offset, sock in enumerate(sockets):
                sock.bind(("", first + offset))
            return [first, first + 1, first + 2]
        except OSError:
            continue
        finally:
            for sock in sockets:
                sock.close()
    raise RuntimeError("no three neighbouring free ports")


class PrivateSlurm:
    """Context manager: a running Slurm of two nodes of 4 declared cores; `env` leads clients to it."""

    def __init__(self, folder: Path, *, requeue_seconds: int = 10):
        """`folder`: state and logs. `requeue_seconds`: how long a requeued job waits (Slurm's default is 120)."""
        self.folder = folder.absolute()
        self.requeue_seconds = requeue_seconds
        self.daemons: list[subprocess.Popen] = []

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """This process's environment for a client of this Slurm."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        return kept | {"SLURM_CONF": str(self.conf)}

    def __enter__(self) -> "PrivateSlurm":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc) -> None:
        self.stop()

    def run(self, *command: str, check: bool = True, **options) -> str:
        """Standard output of a client program."""
        done = subprocess.run(command, env=self.env, check=False, text=True, capture_output=True, **options)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout.strip()

    def jobs(self) -> list[str]:
        """Pending and running jobs, one line each: id, state, reason."""
        return self.run("squeue", "--noheader", "--all", "--format=%i %T %r").splitlines()

    def wait_empty(self, seconds: float) -> None:
        """Return when no job is left; raises TimeoutError with those that are."""
        self._wait(lambda: not self.jobs(), seconds, self.jobs)

    def wait_idle(self, seconds: float) -> None:
        """Return when both nodes are idle; raises TimeoutError with their states."""
        self._wait(lambda: self._states() == ["idle", "idle"], seconds, self._states)

    def processes(self, job: str | None = None) -> list[psutil.Process]:
        """What runs on the nodes for jobs, or for one JOB or ARRAY_TASK: batch shells, srun, the processes of steps."""
        found = []
        for process in psutil.process_iter(["environ", "status"]):
            env = process.info["environ"] or {}
            if env.get("SLURM_CONF") != str(self.conf) or "SLURM_JOB_ID" not in env:
                continue
            array = "SLURM_ARRAY_TASK_ID" in env
            name = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"]
            if job in (None, name) and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    @contextlib.contextmanager
    def silent_controller(self) -> Iterator[None]:
        """slurmctld takes connections and answers nothing, as one that is overloaded does."""
        controller = self.daemons[0]
        controller.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            controller.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Cancel what runs, end the daemons and whatever steps they left; touches no process but its own."""
        if self.daemons:
            self.run("scancel", "--user", getpass.getuser(), check=False)
            self._soon(lambda: not self.jobs(), 20)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons = []

    def logs(self) -> str:
        """The last lines of each daemon's log."""
        texts = [f"== {path.name}\n" + path.read_text(errors="replace")[-3000:] for path in self.folder.glob("*.log")]
        return "\n".join(texts)

    def _start(self) -> None:
        host = socket.gethostname().split(".")[0]
        for name in ("state", "spool-n0", "spool-n1"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.conf.write_text(
            CONF.format(
                host=host,
                user=getpass.getuser(),
                folder=self.folder,
                ports=three_free_ports(),
                requeue_seconds=self.requeue_seconds,
            )
        )
        self._daemon("slurmctld", "-D", "-i", "-f", str(self.conf))
        for node in ("n0", "n1"):
            self._daemon("slurmd", "-D", "-N", node, "-f", str(self.conf))
        self.wait_idle(START_SECONDS)

    def _daemon(self, program: str, *arguments: str) -> None:
        with open(self.folder / f"{program}.out", "ab") as out:
            # its own session: Ctrl-C in the terminal must not reach it before the jobs are cancelled
            self.daemons.append(
                subprocess.Popen(
                    [find(program), *arguments],
                    env=self.env,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )

    def _states(self) -> list[str]:
        return self.run("sinfo", "--noheader", "--Node", "--format=%t", check=False).split()

    def _soon(self, is_true, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not is_true():
            dead = [daemon.args[0] for daemon in self.daemons if daemon.poll() is not None]
            if dead or time.monotonic() > end:
                return False
            time.sleep(0.3)
        return True

    def _wait(self, is_true, seconds: float, what) -> None:
        if not self._soon(is_true, seconds):
            raise TimeoutError(f"not within {seconds} s: {what()}\n{self.logs()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="state and logs; on a local disk")
    folder = parser.parse_args().folder
    if missing():
        sys.exit(missing())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with PrivateSlurm(folder) as slurm:
        print(f"export SLURM_CONF={slurm.conf}", flush=True)
        print("Two idle nodes of 4 cores, partition main. Ctrl-C stops them and cancels what runs.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
