"""Where tasks run: Dask on local processes, on MPI ranks, or on Slurm jobs.

Tasks leave files; only receipts come back.
"""

import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from hpcmlip.errors import ConfigError, RunError, UserError

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLOSC_NTHREADS")}
IN_FLIGHT = 4
"""Tasks a worker that are handed to Dask at a time: memory of the scheduler stays bounded."""

STARTS = 3

Done = Callable[[object, object], None]
"""Called with each finished task and its receipt."""
Execute = Callable[[Callable, Sequence, Done], None]
"""(function, tasks, done): run function(task) for all tasks. Raises the UserError of the first that fails."""


def warm_up() -> None:
    """Start the process that workers are forked from, which imports what they need while this one imports its own.

    Optional: without it the first tasks wait for that.
    """
    from multiprocessing import forkserver

    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    # Ctrl-C in a terminal reaches all processes: the workers leave it to this one
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
    try:
        forkserver.set_forkserver_preload(["distributed", "distributed.nanny", "hpcmlip.preprocess.pipeline"])
        forkserver.ensure_running()
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def executor(scheduler: str, workers: int | None) -> Iterator[Execute | None]:
    """What runs tasks; None on the MPI ranks that served as workers (they have nothing left to do)."""
    opening = {"processes": _processes, "mpi": _mpi, "slurm": _slurm}[scheduler]
    with opening(workers) as execute:
        yield execute


@dataclass(frozen=True)
class Failure:
    """A user's error as a value: Dask and MPI wrap exceptions in tracebacks of their own."""

    error: UserError


@dataclass(frozen=True)
class Guarded:
    """`function` in a worker: one thread, errors of the user as values."""

    function: Callable

    def __call__(self, task):
        _limit_threads()
        try:
            return self.function(task)
        except UserError as error:
            return Failure(error)
        except OSError as error:
            return Failure(RunError(f"{error.filename or 'a file'}: {error.strerror or error}"))


def _limit_threads() -> None:
    import numcodecs.blosc
    import zarr

    # workers are processes; threads on top of them only get in each other's way
    zarr.config.set({"async.concurrency": 1, "threading.max_workers": 1})
    numcodecs.blosc.use_threads = False


def _result(value):
    if isinstance(value, Failure):
        raise value.error
    return value


@contextmanager
def _processes(workers: int | None) -> Iterator[Execute]:
    with ExitStack() as stack:
        yield _started_by_need(stack, lambda tasks: _local_client(workers or min(_cores(), max(len(tasks), 1))))


def _started_by_need(stack: ExitStack, open_client: Callable) -> Execute:
    """Starts the workers with the first tasks: a wrong config is told at once."""
    started: list[Execute] = []

    def execute(function: Callable, tasks: Sequence, done: Done) -> None:
        if not started:
            started.append(_on_client(stack.enter_context(open_client(tasks))))
        started[0](function, tasks, done)

    return execute


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def _local_client(workers: int) -> Iterator:
    import dask
    from distributed import Client

    warm_up()
    quiet = {
        # one process imports, the workers are its forks; spawned ones import all of it again, a second each
        "distributed.worker.multiprocessing-method": "forkserver",
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.terminate": False,
        "distributed.nanny.environ": ONE_THREAD,
    }
    with dask.config.set(quiet), _local_cluster(workers) as cluster, Client(cluster) as client:
        yield client


def _local_cluster(workers: int):
    """A started `LocalCluster`. Dask replaces a worker that dies, but gives up on one that dies while it starts."""
    from distributed import LocalCluster

    for _ in range(STARTS):
        try:
            return LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
                # its scheduler has an HTTP server all the same, and warns where two jobs want its usual port
                scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
                silence_logs=logging.CRITICAL,
            )
        except RuntimeError as error:
            died = error
    raise RunError(
        f"workers died {STARTS} times while they started ({died}): out of memory? Try fewer --workers"
    ) from died


def _on_client(client) -> Execute:
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    def execute(function: Callable, tasks: Sequence, done: Done) -> None:
        waiting = iter(tasks)
        guarded = Guarded(function)
        running = {}
        finished = as_completed()

        def submit_next() -> None:
            task = next(waiting, None)
            if task is not None:
                future = client.submit(guarded, task, pure=False)
                running[future.key] = task
                finished.add(future)

        for _ in range(IN_FLIGHT * max(len(client.scheduler_info(n_workers=-1)["workers"]), 1)):
            submit_next()
        for future in finished:
            try:
                value = _result(future.result())
            except KilledWorker as error:
                raise RunError(
                    f"a worker died several times in the same task ({error.task}): out of memory? Try fewer --workers"
                ) from None
            done(running.pop(future.key), value)
            future.release()
            submit_next()

    return execute


@contextmanager
def _mpi(workers: int | None) -> Iterator[Execute | None]:
    if workers is not None:
        raise ConfigError("--workers does not go with --scheduler mpi: the number of MPI ranks says it")
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"--scheduler mpi needs a working MPI and mpi4py: {str(error).splitlines()[0]}") from None

    os.environ.update(ONE_THREAD)
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as pool:
        yield None if pool is None else _on_pool(pool)


def _on_pool(pool) -> Execute:
    import dask
    from dask.callbacks import Callback

    def execute(function: Callable, tasks: Sequence, done: Done) -> None:
        guarded = Guarded(function)
        names = {f"task-{i}": task for i, task in enumerate(tasks)}
        lazy = [dask.delayed(guarded)(task, dask_key_name=name) for name, task in names.items()]

        def posttask(key, value, dsk, state, worker_id) -> None:
            if key in names:
                done(names[key], _result(value))

        with Callback(posttask=posttask):
            dask.compute(*lazy, scheduler="processes", pool=pool, optimize_graph=False)

    return execute


@contextmanager
def _slurm(workers: int | None) -> Iterator[Execute]:
    if importlib.util.find_spec("dask_jobqueue") is None:
        raise ConfigError("--scheduler slurm needs dask-jobqueue: pip install 'hpcmlip[slurm]'")
    with ExitStack() as stack:
        yield _started_by_need(stack, lambda tasks: _slurm_client(workers or 4))


@contextmanager
def _slurm_client(workers: int) -> Iterator:
    from dask_jobqueue import SLURMCluster
    from distributed import Client

    # account, partition, walltime: the user's own dask configuration (jobqueue.slurm), which dask-jobqueue reads
    with SLURMCluster(cores=1, processes=1, memory="4GB") as cluster, Client(cluster) as client:
        cluster.scale(jobs=workers)
        client.wait_for_workers(1)
        yield client
