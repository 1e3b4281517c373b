"""Which structures meet in which micro-batch: pure functions of (rows, seed, epoch, budget), the same on every rank.

A group (one atom count of one store) is a sequence of pieces, the wanted rows of a chunk. An epoch shuffles the pieces,
then the rows within a window of pieces, so that each chunk is decoded once. Micro-batch m of every optimizer step comes
from stream m; a stream owns a contiguous part of each group's sequence and cuts it into blocks. What enters a step
depends on the number of streams, never on the number of processes; a step is found again from its number alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hpcmlip.lattice import needs_lists

WINDOW = 4
"""Pieces whose rows are shuffled together: large enough to mix molecules, small enough to stay in memory."""

LIST_LENGTH = 64
"""Neighbours of an atom in a list, for a budget: what a cutoff of 5.3 Å holds at 0.1 atoms/Å³, the density of water."""

# purposes of a random generator: no two draws share a seed
_PIECES, _ROWS, _BLOCKS = range(3)


@dataclass(frozen=True)
class Rows:
    """The wanted rows of one group, as pieces that do not cross a chunk border."""

    num_atoms: int
    pieces: np.ndarray
    """[C, 2] int64: start and stop row of each piece, ascending."""
    periodic: bool = False

    @property
    def pairs(self) -> int:
        """Pairs of a structure, for the budget."""
        return pairs(self.num_atoms, periodic=self.periodic)

    @cached_property
    def count(self) -> int:
        return int((self.pieces[:, 1] - self.pieces[:, 0]).sum())


def pairs(num_atoms: int, *, periodic: bool) -> int:
    """What a structure counts in a budget of pairs: N² if all are computed, else N lists of neighbours.

    Lists count as `LIST_LENGTH` whatever the cutoff: a plan follows from counts alone.
    """
    return num_atoms * (LIST_LENGTH if needs_lists(num_atoms, periodic=periodic) else num_atoms)


def wanted_rows(
    num_atoms: int, ranges: Sequence[tuple[int, int]], rows_per_chunk: int, *, periodic: bool = False
) -> Rows:
    """Cut row ranges at chunk borders; adjoining ranges in one chunk become one piece."""
    pieces: list[list[int]] = []
    for start, stop in sorted(ranges):
        for chunk in range(start // rows_per_chunk, -(-stop // rows_per_chunk)):
            a, b = max(start, chunk * rows_per_chunk), min(stop, (chunk + 1) * rows_per_chunk)
            if pieces and pieces[-1][1] == a and a % rows_per_chunk:
                pieces[-1][1] = b
            elif a < b:
                pieces.append([a, b])
    return Rows(num_atoms, np.array(pieces, dtype=np.int64).reshape(-1, 2), periodic)


@dataclass(frozen=True)
class Order:
    """The sequence in which the rows of a group are visited: windows of pieces, each window's rows permuted."""

    pieces: np.ndarray
    """[C, 2] in visiting order."""
    seed: tuple[int, ...] | None
    """Of the permutation within a window (the window's number is added); None: rows in file order."""

    @cached_property
    def edges(self) -> np.ndarray:
        """[windows + 1] positions in the sequence at which a window begins."""
        ends = np.concatenate([[0], np.cumsum(self.pieces[:, 1] - self.pieces[:, 0])])
        return np.append(ends[:-1:WINDOW], ends[-1])

    def window_pieces(self, window: int) -> np.ndarray:
        """[<= WINDOW, 2] pieces of a window."""
        return self.pieces[window * WINDOW : (window + 1) * WINDOW]

    def permutation(self, window: int) -> np.ndarray:
        """Order of the window's rows (indices into its pieces laid end to end)."""
        size = int(self.edges[window + 1] - self.edges[window])
        if self.seed is None:
            return np.arange(size)
        return np.random.default_rng([*self.seed, window]).permutation(size)

    def locate(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Positions [start, stop) of the sequence as (window, first, last) with positions within the window."""
        found = []
        window = int(np.searchsorted(self.edges, start, side="right")) - 1
        while start < stop:
            last = min(stop, int(self.edges[window + 1]))
            found.append((window, start - int(self.edges[window]), last - int(self.edges[window])))
            start, window = last, window + 1
        return found


def order(rows: Rows, *, group: int, seed: int | None, epoch: int = 0) -> Order:
    """Visiting order of a group in an epoch; `seed` None: file order."""
    if seed is None:
        return Order(rows.pieces, None)
    shuffled = np.random.default_rng([seed, epoch, group, _PIECES]).permutation(len(rows.pieces))
    return Order(rows.pieces[shuffled], (seed, epoch, group, _ROWS))


@dataclass(frozen=True)
class StreamPlan:
    """The micro-batches of one stream in one epoch, as blocks of one group each."""

    blocks: np.ndarray
    """[n, 3] int64: group, start, stop (positions in the group's sequence), in visiting order."""
    edges: np.ndarray
    """[steps + 1] int64: micro-batch t consists of blocks edges[t]:edges[t+1]; none: it is filled with weight 0."""

    def micro_batch(self, step: int) -> list[tuple[int, int, int]]:
        """(group, start, stop) of each block; blocks of one group that adjoin are joined."""
        joined: dict[int, list[int]] = {}
        for group, start, stop in self.blocks[self.edges[step] : self.edges[step + 1]].tolist():
            # blocks of a group follow each other, so joining is extending
            joined.setdefault(group, [start, stop])[1] = stop
        return [(group, start, stop) for group, (start, stop) in joined.items()]


def plan(
    groups: Sequence[Rows], *, num_streams: int, budget: int, blocks_per_batch: int, seed: int | None, epoch: int = 0
) -> list[StreamPlan]:
    """Plan of every stream for one epoch; all have the same number of micro-batches, of at most `budget` pairs each.

    Structures larger than a block (pairs > budget / blocks_per_batch) may exceed it by one. `seed` None: groups and
    rows in file order.
    """
    cost = np.array([rows.pairs for rows in groups], dtype=np.int64)
    size = np.maximum(1, budget // (blocks_per_batch * cost))
    streams = []
    for stream in range(num_streams):
        cuts = [_cut(rows.count, int(size[g]), stream, num_streams, g + epoch) for g, rows in enumerate(groups)]
        labels = np.repeat(np.arange(len(groups)), [len(c) for c in cuts])
        if seed is not None:
            labels = np.random.default_rng([seed, epoch, stream, _BLOCKS]).permutation(labels)
        # the k-th block with label g is the k-th of that group: each group is walked through in order, window by window
        ranks = np.empty_like(labels)
        ranks[np.argsort(labels, kind="stable")] = np.arange(len(labels))
        blocks = np.concatenate([np.empty((0, 2), np.int64), *cuts])[ranks]
        streams.append(np.column_stack([labels, blocks]))
    costs = [(b[:, 2] - b[:, 1]) * cost[b[:, 0]] for b in streams]
    # a batch ends in the block in which it reaches its share, so the share leaves room for one block
    share = budget - budget // blocks_per_batch
    steps = max([1, *(int(-(-c.sum() // share)) for c in costs)])
    taken_in = [_steps(c, steps) for c in costs]
    steps = max([1, *(int(own[-1]) + 1 for own in taken_in if len(own))])
    return [StreamPlan(b, _edges(own, steps)) for b, own in zip(streams, taken_in, strict=True)]


def _cut(count: int, size: int, stream: int, num_streams: int, shift: int) -> np.ndarray:
    """[n, 2] blocks of at most `size` rows of this stream's part of a sequence; `shift` moves the odd rows around."""
    lo, hi = ((s * count + shift % num_streams) // num_streams for s in (stream, stream + 1))
    # equally filled blocks instead of full ones and a rest
    edges = np.linspace(lo, hi, -(-(hi - lo) // size) + 1).round().astype(np.int64) if hi > lo else np.array([lo])
    return np.column_stack([edges[:-1], edges[1:]])


def _steps(costs: np.ndarray, steps: int) -> np.ndarray:
    """[n] the step of each block, so that at most `steps` have about equal costs (pairs); none is left empty between.

    A block that costs more than a step takes one all the same.
    """
    ends = np.cumsum(costs)
    total = int(ends[-1]) if len(ends) else 0
    begins_in = (ends - costs) * steps // max(total, 1)
    return np.minimum(np.diff(begins_in, prepend=begins_in[:1]), 1).cumsum()


def _edges(taken_in: np.ndarray, steps: int) -> np.ndarray:
    """[steps + 1] of `StreamPlan`, from the step of each block; none are left for the last steps of a short stream."""
    return np.searchsorted(taken_in, np.arange(steps + 1))


def work(groups: Sequence[Rows], streams: Sequence[StreamPlan]) -> np.ndarray:
    """[steps, streams, 3] int64: blocks, atoms and pairs of each micro-batch; 0 where it is filled with weight 0."""
    atoms, cost = (np.array([getattr(rows, name) for rows in groups]) for name in ("num_atoms", "pairs"))
    found = np.zeros((len(streams[0].edges) - 1, len(streams), 3), dtype=np.int64)
    for i, stream in enumerate(streams):
        group, size = stream.blocks[:, 0], stream.blocks[:, 2] - stream.blocks[:, 1]
        step = np.repeat(np.arange(len(found)), np.diff(stream.edges))
        # blocks of one group in a micro-batch are joined
        found[:, i, 0] = np.bincount(np.unique(step * len(groups) + group) // len(groups), minlength=len(found))
        np.add.at(found[:, i, 1], step, size * atoms[group])
        np.add.at(found[:, i, 2], step, size * cost[group])
    return found
