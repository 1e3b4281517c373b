"""Rows of stores -> batches: `TrainLoader` (shuffled epochs) and `split_batches` (each structure once).

A thread prepares the next steps while the network computes.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from hpcmlip import neighbours
from hpcmlip.batch import AtomsBatch
from hpcmlip.config import DataSection
from hpcmlip.data import plan
from hpcmlip.data.dataset import Dataset, Group
from hpcmlip.data.reader import Arrays, Reader
from hpcmlip.errors import ConfigError
from hpcmlip.graph import DenseTopology

PREFETCH = 4
"""Optimizer steps that are kept ready."""


def collate(arrays: Arrays, dtype: torch.dtype, *, cutoff: float, weight: float = 1.0) -> AtomsBatch:
    """Structures of one atom count as a batch for models of a cutoff (Å)."""
    B, N = arrays["species"].shape

    def tensor(x: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(x, dtype=dtype).reshape(shape)

    return AtomsBatch(
        species=torch.from_numpy(np.ascontiguousarray(arrays["species"])).reshape(B * N),
        pos=tensor(arrays["pos"], (B * N, 3)),
        topology=neighbours.padded(arrays["edges"], N, cutoff).to(dtype=dtype)
        if "edges" in arrays
        else DenseTopology(B, N),
        energy=tensor(arrays["energy"], (B, -1)),
        forces=tensor(arrays["forces"], (B * N, arrays["forces"].shape[2], 3)),
        weight=torch.full((B,), weight, dtype=dtype),
        source=arrays["source"],
        force_labels=tuple(np.flatnonzero(~np.isnan(arrays["forces"]).all(axis=(0, 1, 3))).tolist()),
    )


# ------------------------------------------------------------------------------------------------------ batches


class TrainLoader:
    """Shuffled epochs of the training split for the streams that this process owns; `cutoff` of the model in Å.

    Raises ConfigError if nothing in the training split carries a wanted label.
    """

    def __init__(
        self,
        dataset: Dataset,
        section: DataSection,
        *,
        streams: Sequence[int],
        num_streams: int,
        seed: int,
        cutoff: float,
        dtype: torch.dtype = torch.float32,
    ):
        self._groups = [group for group in dataset.groups("train") if group.rows.count]
        if not self._groups:
            raise ConfigError(f"no structure of the training split carries a label of {', '.join(dataset.spec.levels)}")
        self._section, self._streams, self._num_streams = section, tuple(streams), num_streams
        self._seed, self._cutoff, self._dtype = seed, cutoff, dtype
        self._reader = Reader(self._groups, dataset.spec, cutoff, section.cache_mb * 2**20)
        self._plans: dict[int, list[plan.StreamPlan]] = {}
        self._lock = threading.Lock()
        self._worker: _Prefetch | None = None
        self.waited = 0.0
        """Seconds that the consumer has waited for data."""

    def steps(self, epoch: int) -> int:
        """Optimizer steps of an epoch, the same on every process."""
        return len(self._plan(epoch)[0].edges) - 1

    def work(self, epoch: int) -> np.ndarray:
        """[steps, streams, 3] blocks, atoms and pairs of the micro-batches of an epoch, those of all processes."""
        return plan.work([group.rows for group in self._groups], self._plan(epoch))

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[list[tuple[AtomsBatch, ...]]]:
        """Of each step from `first_step`: the micro-batches of this process, each a tuple of blocks."""
        if self._worker is None or self._worker.position != (epoch, first_step):
            self.close()
            self._worker = _Prefetch(self._produce(epoch, first_step), (epoch, first_step))
        for step in range(first_step, self.steps(epoch)):
            begin = time.perf_counter()
            item = self._worker.get()
            self.waited += time.perf_counter() - begin
            self._worker.position = (epoch, step + 1) if step + 1 < self.steps(epoch) else (epoch + 1, 0)
            yield item

    def close(self) -> None:
        """Stop preparing; the loader can be used again."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _plan(self, epoch: int) -> list[plan.StreamPlan]:
        # the consumer asks for this epoch while the thread may be at the next one: two are kept
        with self._lock:
            if epoch not in self._plans:
                self._plans = {e: p for e, p in self._plans.items() if e == epoch - 1}
                self._plans[epoch] = plan.plan(
                    [group.rows for group in self._groups],
                    num_streams=self._num_streams,
                    budget=self._section.pairs_per_batch,
                    blocks_per_batch=self._section.blocks_per_batch,
                    seed=self._seed,
                    epoch=epoch,
                )
            return self._plans[epoch]

    def _produce(self, epoch: int, first_step: int) -> Iterator[list[tuple[AtomsBatch, ...]]]:
        while True:
            streams = self._plan(epoch)
            visits = [plan.order(g.rows, group=i, seed=self._seed, epoch=epoch) for i, g in enumerate(self._groups)]
            for step in range(first_step, len(streams[0].edges) - 1):
                yield [self._micro_batch(streams[s], s, visits, step) for s in self._streams]
            epoch, first_step = epoch + 1, 0

    def _micro_batch(self, stream_plan, stream: int, visits, step: int) -> tuple[AtomsBatch, ...]:
        # a stream that has run out: one structure without weight keeps all processes in step
        blocks, weight = stream_plan.micro_batch(step), 1.0
        if not blocks:
            blocks, weight = [(0, 0, 1)], 0.0
        return tuple(
            collate(self._reader.block(stream, g, visits[g], a, b), self._dtype, cutoff=self._cutoff, weight=weight)
            for g, a, b in blocks
        )


def split_batches(
    dataset: Dataset,
    section: DataSection,
    split: str,
    *,
    cutoff: float,
    rank: int,
    size: int,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[AtomsBatch, ...]]:
    """Structures of a split with a wanted label, each exactly once over all `size` processes, in file order.

    `cutoff` of the model in Å.
    """
    groups = [group for group in dataset.groups(split) if group.rows.count]
    reader = Reader(groups, dataset.spec, cutoff, 0)
    mine = _split_plan(groups, section, size)[rank]
    visits = [plan.order(group.rows, group=i, seed=None) for i, group in enumerate(groups)]

    def produce():
        for step in range(len(mine.edges) - 1):
            blocks = mine.micro_batch(step)
            if blocks:
                yield tuple(collate(reader.block(0, g, visits[g], a, b), dtype, cutoff=cutoff) for g, a, b in blocks)

    worker = _Prefetch(produce(), None)
    try:
        yield from iter(worker.get, None)
    finally:
        worker.close()


def split_work(dataset: Dataset, section: DataSection, split: str, *, size: int) -> np.ndarray:
    """[steps, size, 3] blocks, atoms and pairs of the batches that `split_batches` gives each of `size` processes."""
    groups = [group for group in dataset.groups(split) if group.rows.count]
    return plan.work([group.rows for group in groups], _split_plan(groups, section, size))


def _split_plan(groups: Sequence[Group], section: DataSection, size: int) -> list[plan.StreamPlan]:
    return plan.plan(
        [group.rows for group in groups],
        num_streams=size,
        budget=section.pairs_per_batch,
        blocks_per_batch=section.blocks_per_batch,
        seed=None,
    )


class _Prefetch:
    """Runs an iterator in a thread, a few items ahead; an error there is raised at `get`; the end is None."""

    def __init__(self, items: Iterator, position):
        self.position = position
        self._queue: queue.Queue = queue.Queue(maxsize=PREFETCH)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), daemon=True, name="loader")
        self._thread.start()

    def get(self):
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self, items: Iterator) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
            self._put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            self._put(error)

    def _put(self, item) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
