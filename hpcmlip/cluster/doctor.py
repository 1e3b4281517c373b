"""`hpcmlip doctor`: looks at machine, environment and cluster before a job has waited for hours to find out."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hpcmlip.cluster import machine, site_check
from hpcmlip.cluster.checking import ERROR, Check, Finding, examine
from hpcmlip.errors import EXIT_FAILED


def checks(site: Path | None) -> list[Check]:
    """All checks in the order in which they are shown; the quick ones first."""
    return [
        Check("python", machine.python, 10),
        Check("packages", machine.packages, 30),
        Check("compiler", machine.compiler, 10),
        Check("extension builds", machine.builds, 30),
        Check("folder", machine.folder, 60),
        Check("network", machine.network, 30),
        Check("slurm", partial(site_check.slurm, site), 120),
        Check("torch", machine.torch, 180),
        Check("two processes", machine.processes, 180),
        Check("mpi", machine.mpi, 90),
    ]


def diagnose(site: Path | None, *, as_json: bool) -> int:
    """Run all checks and print what they find, a line each; exit code: 1 if one found an error."""
    found: list[Finding] = []
    show: Callable[[Finding], None] = (lambda finding: None) if as_json else _show
    for check in checks(site):
        for finding in examine(check):
            found.append(finding)
            show(finding)
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in found], indent=2))
    return EXIT_FAILED if any(finding.state == ERROR for finding in found) else 0


def _show(finding: Finding) -> None:
    remedy = f"; {finding.remedy}" if finding.remedy else ""
    print(f"{finding.state:8} {finding.check:17} {finding.text}{remedy}", flush=True)
