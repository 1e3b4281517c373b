"""`python recording.py PREFIX [MECHANISM] ARGUMENTS...`: hpcmlip that writes down which structures each step saw.

Rank R appends lines {"step", "sources"} to PREFIX.R; `sources` are (store, file, group, row) of what carries weight.
"""

import json
import sys
from pathlib import Path

from hpcmlip.training.loop import Training

PREFIX = Path(sys.argv.pop(1))
original = Training._flags


def flags(self, micro_batches, *arguments):
    blocks = [block for blocks in micro_batches for block in blocks]
    seen = [source for block in blocks for source in block.source[block.weight.cpu().numpy() > 0].tolist()]
    with PREFIX.with_name(f"{PREFIX.name}.{self.world.rank}").open("a") as file:
        file.write(json.dumps({"step": self.progress.step + 1, "sources": seen}) + "\n")
    return original(self, micro_batches, *arguments)


if __name__ == "__main__":
    Training._flags = flags
    import broken

    if sys.argv[1] in broken.BROKEN:
        broken.BROKEN[sys.argv.pop(1)]()
    from hpcmlip.cli import main

    main()
