"""Complete configs and samples that come with the package: one YAML a run or data set, and two small raw files.

`hpcmlip configs` lists them, `hpcmlip configs --to FOLDER` copies them to work on.
"""

import filecmp
import shutil
from pathlib import Path

from hpcmlip.errors import ConfigError
from hpcmlip.plugins import suggest

ROOT = Path(__file__).parent
KINDS = (".yaml", ".h5", ".md")


def listing() -> list[str]:
    """Names of all configs and samples, relative to this package, sorted."""
    return sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if p.suffix in KINDS and p.is_file())


def path(name: str) -> Path:
    """Where the file `name` of `listing()` lies; raises ConfigError with the nearest name if there is none."""
    if name not in listing():
        raise ConfigError(f"no config or sample named '{name}' comes with the package{suggest(name, listing())}")
    return ROOT / name


def copy_to(folder: Path) -> list[Path]:
    """Copy all of them below `folder`, keeping their places (the YAML files name each other by relative paths).

    Returns the copies. Files that are there already and equal are left alone. Raises ConfigError, before anything is
    copied, if one differs.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"cannot copy the configs to {folder}: it is a file, give a folder")
    targets = {name: folder / name for name in listing()}
    changed = [name for name, target in targets.items() if target.exists() and not _equal(ROOT / name, target)]
    if changed:
        raise ConfigError(
            f"{folder} holds other versions of {', '.join(changed)}; nothing was copied: "
            "give another folder or move them away"
        )
    for name, target in targets.items():
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
    return list(targets.values())


def _equal(a: Path, b: Path) -> bool:
    return b.is_file() and filecmp.cmp(a, b, shallow=False)
