"""torchrun that keeps exit code 75: `python -m hpcmlip.cluster.torchrun [torchrun's options] -m hpcmlip train ...`.

torchrun itself ends with 1 whatever code its processes ended with, so "stopped on request, resumable" would be lost.
It passes Ctrl-C and TERM on to the processes and waits for them to save.
"""

import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from hpcmlip.errors import EXIT_FAILED, EXIT_RESUMABLE


def main(arguments: Sequence[str]) -> int:
    """Run torchrun; exit code 0, 75 if a process ended so or a signal ended them all, otherwise 1."""
    try:
        run.run(run.parse_args(list(arguments)))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        # the first to leave with 75 makes torchrun end the others, which are done as well
        return EXIT_RESUMABLE if EXIT_RESUMABLE in codes else EXIT_FAILED
    except SignalException:
        return EXIT_RESUMABLE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
