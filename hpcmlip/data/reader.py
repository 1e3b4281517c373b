"""Chunks of stores -> arrays that a network takes: decoded pieces, permuted windows, neighbour lists, kept a while.

A decoded piece lives in the cache, a window is a permuted copy of some pieces, a block is a slice of a window.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Generic, TypeVar

import numpy as np

from hpcmlip import neighbours
from hpcmlip.batch import DataSpec
from hpcmlip.data import plan
from hpcmlip.data.dataset import Group
from hpcmlip.errors import DataError
from hpcmlip.neighbours import Edges

Arrays = dict[str, np.ndarray]
"""species (R, N), pos (R, N, 3), energy (R, L), forces (R, N, Lf, 3), source (R, 4); of a periodic store also
cell (R, 3, 3) and pbc (R, 3); of a block in list form also edges (R) of `neighbours.Edges`."""
T = TypeVar("T")


class Cache(Generic[T]):
    """Values by key; the first are kept, as many as `room` bytes hold.

    An epoch asks for everything once, in an order of its own: half the room then spares half the work. Keeping what was
    used last instead would spare a sixth.
    """

    def __init__(self, room: float, size: Callable[[T], int]):
        self._room, self._size = room, size
        self._values: dict[Hashable, T] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, made where it is not kept."""
        if key in self._values:
            return self._values[key]
        value = make()
        if self._size(value) <= self._room:
            self._room -= self._size(value)
            self._values[key] = value
        return value


class Reader:
    """Decodes pieces of groups into what a network of a cutoff (Å) takes; keeps some pieces and neighbour lists.

    Each of the two has room for `cache_bytes`.
    """

    def __init__(self, groups: Sequence[Group], spec: DataSpec, cutoff: float, cache_bytes: float):
        self._groups = groups
        self._spec = spec
        self._cutoff = cutoff
        self._pieces: Cache[Arrays] = Cache(cache_bytes, _size)
        self._edges: Cache[Edges] = Cache(cache_bytes, lambda edges: edges.nbytes)
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
        arrays = _join(parts)
        return arrays | {"edges": self._lists(arrays)} if self._groups[group].has_lists else arrays

    def _lists(self, arrays: Arrays) -> np.ndarray:
        """[R] neighbours of structures."""
        R = len(arrays["pos"])
        cell, pbc = arrays.get("cell", np.zeros((R, 3, 3))), arrays.get("pbc", np.zeros((R, 3), dtype=bool))
        found = np.empty(R, dtype=object)
        for row, (key, *structure) in enumerate(zip(arrays["source"].tolist(), arrays["pos"], cell, pbc, strict=True)):
            found[row] = self._edges.get(tuple(key), partial(neighbours.edges, *structure, self._cutoff))
        return found

    def _window(self, group: int, visit: plan.Order, window: int) -> Arrays:
        pieces = [self._piece(group, int(a), int(b)) for a, b in visit.window_pieces(window)]
        chosen = visit.permutation(window)
        return {name: x[chosen] for name, x in _join(pieces).items()}

    def _piece(self, group: int, start: int, stop: int) -> Arrays:
        return self._pieces.get((group, start, stop), partial(self._decode, self._groups[group], start, stop))

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
        arrays = {"species": species, "pos": read("pos"), "energy": energy, "forces": forces, "source": source}
        return arrays | ({name: read(name) for name in ("cell", "pbc")} if meta.periodic else {})


def _join(parts: Sequence[Arrays]) -> Arrays:
    return parts[0] if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def _size(arrays: Arrays) -> int:
    return sum(x.nbytes for x in arrays.values())
