"""Rows of stores -> batches: `TrainLoader` (shuffled epochs) and `split_batches` (each structure once).

Owner of the data on its way: a decoded piece lives in the cache, a window is a permuted copy of some pieces, a block is
a slice of a window, as tensors. A thread prepares the next steps while the network computes.
"""

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from hpcmlip.batch import AtomsBatch, DataSpec
from hpcmlip.config import DataSection
from hpcmlip.data import plan
from hpcmlip.data.dataset import Dataset, Group
from hpcmlip.errors import ConfigError, DataError
from hpcmlip.graph import DenseTopology

PREFETCH = 4
"""Optimizer steps that are kept ready."""


# ------------------------------------------------------------------------------------------------------ reading

Arrays = dict[str, np.ndarray]
"""species (R, N), pos (R, N, 3), energy (R, L), forces (R, N, Lf, 3), source (R, 4)."""


class Reader:
    """Decodes pieces of groups into what the network takes, with a cache of the last ones."""

    def __init__(self, groups: Sequence[Group], spec: DataSpec, cache_bytes: float):
        self._groups = groups
        self._spec = spec
        self._room = cache_bytes
        self._pieces: OrderedDict[tuple[int, int, int], Arrays] = OrderedDict()
        self._windows: dict[tuple[int, int], tuple[plan.Order, int, Arrays]] = {}
        self._index = np.full(256, -1, dtype=np.int64)
        self._index[list(spec.elements)] = np.arange(len(spec.elements))

    def block(self, stream: int, group: int, visit: plan.Order, start: int, stop: int) -> Arrays:
        """Positions [start, stop) of a group's sequence; a stream keeps its current window of each group."""
        parts = []
        for window, first, last in visit.locate(start, stop):
            held = self._windows.get((stream, group))
            if held is None or held[0] is not visit or held[1] != window:
                held = (visit, window, self._window(group, visit, window))
                self._windows[stream, group] = held
            parts.append({name: x[first:last] for name, x in held[2].items()})
        return _join(parts)

    def _window(self, group: int, visit: plan.Order, window: int) -> Arrays:
        pieces = [self._piece(group, int(a), int(b)) for a, b in visit.window_pieces(window)]
        chosen = visit.permutation(window)
        return {name: x[chosen] for name, x in _join(pieces).items()}

    def _piece(self, group: int, start: int, stop: int) -> Arrays:
        key = (group, start, stop)
        if key in self._pieces:
            self._pieces.move_to_end(key)
            return self._pieces[key]
        arrays = self._decode(self._groups[group], start, stop)
        self._pieces[key] = arrays
        self._room -= _size(arrays)
        while self._room < 0 and len(self._pieces) > 1:
            self._room += _size(self._pieces.popitem(last=False)[1])
        return arrays

    def _decode(self, group: Group, start: int, stop: int) -> Arrays:
        spec, meta, names = self._spec, group.store.meta, [level.name for level in group.store.meta.levels]

        def read(name: str) -> np.ndarray:
            return group.store.read(group.meta, name, start, stop)

        species = self._index[read("z")]
        if (species < 0).any():
            raise DataError(f"store {group.store.path} holds elements that its metadata does not name: shard it again")
        total = read("energy")
        columns = [total[:, names.index(n)] if n in names else np.full(stop - start, np.nan) for n in spec.levels]
        energy = np.stack(columns, axis=1) - spec.reference_energy(species)
        source = np.empty((stop - start, 4), dtype=np.int64)
        source[:, 0], source[:, 1:] = group.store_index, read("source")
        planes = [names.index(spec.levels[i]) if spec.levels[i] in names else None for i in spec.force_levels]
        held = [meta.force_levels.index(p) if p in meta.force_levels else None for p in planes]
        shape = (stop - start, group.meta.num_atoms, len(held), 3)
        forces = np.full(shape, np.nan, dtype=np.float32)
        if any(plane is not None for plane in held):
            raw = read("forces")
            for k, plane in enumerate(held):
                if plane is not None:
                    forces[:, :, k] = raw[:, plane]
        return {"species": species, "pos": read("pos"), "energy": energy, "forces": forces, "source": source}


def _join(parts: Sequence[Arrays]) -> Arrays:
    return parts[0] if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def _size(arrays: Arrays) -> int:
    return sum(x.nbytes for x in arrays.values())


def collate(arrays: Arrays, dtype: torch.dtype, *, weight: float = 1.0) -> AtomsBatch:
    """Structures of one atom count as a batch."""
    B, N = arrays["species"].shape

    def tensor(x: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(x, dtype=dtype).reshape(shape)

    return AtomsBatch(
        species=torch.from_numpy(np.ascontiguousarray(arrays["species"])).reshape(B * N),
        pos=tensor(arrays["pos"], (B * N, 3)),
        topology=DenseTopology(B, N),
        energy=tensor(arrays["energy"], (B, -1)),
        forces=tensor(arrays["forces"], (B * N, arrays["forces"].shape[2], 3)),
        weight=torch.full((B,), weight, dtype=dtype),
        source=arrays["source"],
    )


# ------------------------------------------------------------------------------------------------------ batches


class TrainLoader:
    """Shuffled epochs of the training split for the streams that this process owns.

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
        dtype: torch.dtype = torch.float32,
    ):
        self._groups = [group for group in dataset.groups("train") if group.rows.count]
        if not self._groups:
            raise ConfigError(f"no structure of the training split carries a label of {', '.join(dataset.spec.levels)}")
        self._section, self._streams, self._num_streams = section, tuple(streams), num_streams
        self._seed, self._dtype = seed, dtype
        self._reader = Reader(self._groups, dataset.spec, section.cache_mb * 2**20)
        self._plans: dict[int, list[plan.StreamPlan]] = {}
        self._lock = threading.Lock()
        self._worker: _Prefetch | None = None
        self.waited = 0.0
        """Seconds that the consumer has waited for data."""

    def steps(self, epoch: int) -> int:
        """Optimizer steps of an epoch, the same on every process."""
        return len(self._plan(epoch)[0].edges) - 1

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
        blocks = stream_plan.micro_batch(step)
        if not blocks:
            # this stream has run out: one structure without weight keeps all processes in step
            return (collate(self._reader.block(stream, 0, visits[0], 0, 1), self._dtype, weight=0.0),)
        return tuple(collate(self._reader.block(stream, g, visits[g], a, b), self._dtype) for g, a, b in blocks)


def split_batches(
    dataset: Dataset, section: DataSection, split: str, *, rank: int, size: int, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[AtomsBatch, ...]]:
    """Structures of a split with a wanted label, each exactly once over all `size` processes, in file order."""
    groups = [group for group in dataset.groups(split) if group.rows.count]
    reader = Reader(groups, dataset.spec, 0)
    mine = plan.plan(
        [group.rows for group in groups],
        num_streams=size,
        budget=section.pairs_per_batch,
        blocks_per_batch=section.blocks_per_batch,
        seed=None,
    )[rank]
    visits = [plan.order(group.rows, group=i, seed=None) for i, group in enumerate(groups)]

    def produce():
        for step in range(len(mine.edges) - 1):
            blocks = mine.micro_batch(step)
            if blocks:
                yield tuple(collate(reader.block(0, g, visits[g], a, b), dtype) for g, a, b in blocks)

    worker = _Prefetch(produce(), None)
    try:
        yield from iter(worker.get, None)
    finally:
        worker.close()


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
