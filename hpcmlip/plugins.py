"""Components by module name: `find("models", "hipnn")` is the module `hpcmlip.models.hipnn`.

A new model, reader or benchmark is one new file; no registry, no import side effect.
"""

import difflib
import importlib
import importlib.util
import pkgutil
from types import ModuleType

from hpcmlip.errors import ConfigError


def names(package: str) -> list[str]:
    """Modules of `hpcmlip.<package>` that define a component: those whose source text sets `COMPONENT`."""
    parent = importlib.import_module(f"hpcmlip.{package}")
    found = []
    for info in pkgutil.iter_modules(parent.__path__):
        spec = importlib.util.find_spec(f"hpcmlip.{package}.{info.name}")
        if "\nCOMPONENT = " in spec.loader.get_source(spec.name):
            found.append(info.name)
    return sorted(found)


def find(package: str, name: str) -> ModuleType:
    """Module `hpcmlip.<package>.<name>`; raises ConfigError with the nearest name if there is none."""
    known = names(package)
    if name not in known:
        raise ConfigError(f"no {package.rpartition('.')[2].removesuffix('s')} named '{name}'{suggest(name, known)}")
    return importlib.import_module(f"hpcmlip.{package}.{name}")


def suggest(name: str, known) -> str:
    """` (did you mean 'x'? known: ...)`, the tail of an error about an unknown name."""
    known = [str(k) for k in known]
    near = difflib.get_close_matches(str(name), known, n=1)
    return f" ({f'did you mean {near[0]!r}? ' if near else ''}known: {', '.join(known)})"
