"""Which structures of a split were trained on, told by the rows of the raw files that both stores were made of."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from hpcmlip.data.store import Store, open_store
from hpcmlip.errors import UserError

ROW_BITS = 40
"""Of a key; group numbers take the bits above."""


def trained_on(store: Store, split: str, training: Sequence[dict]) -> int | None:
    """Structures of a split that the training splits of the stores `training` ({"path", "digest"}) hold as well.

    None if one of those stores is no longer there, or no longer the same. A structure that came by another raw file is
    not recognized.
    """
    stores = []
    for item in training:
        try:
            stores.append(open_store(Path(item["path"])))
        except (UserError, OSError):
            return None
        if stores[-1].digest != item["digest"]:
            return None
    keys = list(_keys(store, split))
    seen = {sha: np.zeros(len(own), dtype=bool) for sha, own in keys}
    for other in stores:
        for sha, theirs in _keys(other, "train"):
            for name, own in keys:
                if name == sha:
                    seen[name] |= np.isin(own, theirs)
    return sum(int(found.sum()) for found in seen.values())


def _keys(store: Store, split: str) -> Iterator[tuple[str, np.ndarray]]:
    """(sha256 of a raw file, [n] group and row of each structure of a split that came from it)."""
    parts = [
        store.read(group, "source", segment.start, segment.stop).astype(np.int64)
        for group in store.meta.groups
        for segment in group.segments
        if segment.split == split
    ]
    file, group, row = np.concatenate([np.empty((0, 3), dtype=np.int64), *parts]).T
    for number, source in enumerate(store.meta.sources):
        mine = file == number
        yield source.sha256, (group[mine] << ROW_BITS) | row[mine]
