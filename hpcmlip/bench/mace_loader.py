"""`PYTHON mace_loader.py FOLDER CUTOFF BATCH CORE`: shuffled epochs of MACE's own HDF5 data set with its own loader.

Imports MACE only. Answers {"version"}, then for each line of its input, a number of seconds, {"structures", "seconds"}.
"""

import json
import os
import sys
import time
from importlib import metadata

import torch


def batches(folder: str, cutoff: float, batch: int):
    """Epoch after epoch."""
    from mace.data import dataset_from_sharded_hdf5
    from mace.tools import AtomicNumberTable
    from mace.tools.torch_geometric.dataloader import DataLoader

    data = dataset_from_sharded_hdf5(folder, z_table=AtomicNumberTable([1, 6, 7, 8]), r_max=cutoff)
    loader = DataLoader(data, batch_size=batch, shuffle=True, drop_last=False)
    while True:
        yield from loader


def main() -> None:
    """Answer until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what the peer prints must not come between the answers
    folder, cutoff, batch, core = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    source = batches(folder, cutoff, batch)
    next(source)
    print(json.dumps({"version": metadata.version("mace-torch")}), file=answers, flush=True)
    for line in sys.stdin:
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < float(line):
            count += next(source).num_graphs
        print(json.dumps({"structures": count, "seconds": time.perf_counter() - begin}), file=answers, flush=True)


if __name__ == "__main__":
    main()
