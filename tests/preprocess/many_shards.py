"""A raw file that becomes a store of a dozen shards, and the store that nobody disturbed."""

from dataclasses import dataclass
from pathlib import Path

import raw_files
from in_process import contents, shard

NUM_TASKS = 1 + 10 + 12
"""Its hash, units of the scan, shards."""


@dataclass(frozen=True)
class ManyShards:
    config: Path
    expected: dict[str, bytes]
    """Files of the undisturbed store."""


def make(folder: Path) -> ManyShards:
    molecules = {f"m{n}": [6] * (n // 3 + 1) + [1] * (n - n // 3 - 1) for n in range(2, 14)}
    raw_files.write_ani1x(folder / "raw.h5", rows=80, molecules=molecules)
    config = raw_files.write_config(folder, "raw.h5", "ani1x", split={"by": "structure"})
    return ManyShards(config, contents(shard(config, f"out={folder / 'undisturbed.zarr'}").path))
