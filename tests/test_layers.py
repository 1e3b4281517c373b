"""Imports point down, and one module reads the launcher's variables: read from the source text."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {"hpcmlip": ROOT / "hpcmlip", "hpcmlip.preprocess": ROOT / "preprocess", "hpcmlip.slurm": ROOT / "slurm"}
SOURCES["hpcmlip.configs"] = ROOT / "configs"

# lowest first; a module may import from lower layers and from its own
LAYERS = [
    {
        "hpcmlip",
        "hpcmlip.units",
        "hpcmlip.lattice",
        "hpcmlip.errors",
        "hpcmlip.files",
        "hpcmlip.progress",
        "hpcmlip.sealing",
        "hpcmlip.launch",
    },
    {
        "hpcmlip.graph",
        "hpcmlip.neighbours",
        "hpcmlip.batch",
        "hpcmlip.plugins",
        "hpcmlip.explain",
        "hpcmlip.config",
    },
    {"hpcmlip.rendezvous", "hpcmlip.dist", "hpcmlip.trackers", "hpcmlip.configs", "hpcmlip.slurm"},
    {"hpcmlip.models", "hpcmlip.data"},
    {"hpcmlip.training"},
    {"hpcmlip.cluster", "hpcmlip.evaluation"},
    {"hpcmlip.bench"},
    {"hpcmlip.reference"},
    {"hpcmlip.cli", "hpcmlip.__main__"},
]
PREPROCESS_USES = {
    "hpcmlip",
    "hpcmlip.units",
    "hpcmlip.errors",
    "hpcmlip.files",
    "hpcmlip.progress",
    "hpcmlip.lattice",
    "hpcmlip.config",
    "hpcmlip.plugins",
    "hpcmlip.data",
    "hpcmlip.preprocess",
}
MAY_USE_PREPROCESS = {"hpcmlip.reference", "hpcmlip.cli", "hpcmlip.bench"}
DASK_MODULES = {"hpcmlip.preprocess.pipeline", "hpcmlip.preprocess.schedule"}
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_", "OMPI_", "PMI_")
READS_LAUNCHER = {"hpcmlip.launch"}


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module

    @property
    def part(self) -> str:
        """The layer entry it belongs to: the module itself or its package right below hpcmlip."""
        return ".".join(self.name.split(".")[:2])


def modules() -> list[Module]:
    found = []
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Module(name, path, ast.parse(path.read_text(encoding="utf-8"))))
    return found


MODULES = modules()
NAMES = {module.name for module in MODULES}


def imports(module: Module) -> set[str]:
    """Full names of the modules it imports, anywhere in its text."""
    found = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in NAMES else node.module)
    return found


def part_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


def layer(part: str) -> int:
    return next(index for index, parts in enumerate(LAYERS) if part in parts)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_imports_point_down(module):
    own = [name for name in imports(module) if part_of(name).startswith("hpcmlip")]
    if module.part == "hpcmlip.preprocess":
        wrong = [name for name in own if part_of(name) not in PREPROCESS_USES]
    else:
        wrong = [
            name
            for name in own
            if (part_of(name) == "hpcmlip.preprocess" and module.part not in MAY_USE_PREPROCESS)
            or (part_of(name) != "hpcmlip.preprocess" and layer(part_of(name)) > layer(module.part))
            # models and data stand side by side, and so do cluster and evaluation
            or (
                part_of(name) != module.part
                and {part_of(name), module.part}
                in ({"hpcmlip.models", "hpcmlip.data"}, {"hpcmlip.cluster", "hpcmlip.evaluation"})
            )
        ]
    assert not wrong, f"{module.name} imports {wrong}"


def test_only_sharding_knows_dask():
    users = {m.name for m in MODULES if any(name.split(".")[0] in ("dask", "distributed") for name in imports(m))}
    assert users <= DASK_MODULES and users


def test_a_tracker_is_imported_in_its_own_process_only():
    trackers = {"wandb", "mlflow"}
    users = {m.name for m in MODULES if any(name.split(".")[0] in trackers for name in imports(m))}
    own = {f"hpcmlip.trackers.{name}" for name in trackers}
    assert users == own and not [m.name for m in MODULES if imports(m) & own]


def test_only_one_module_reads_the_variables_of_launchers():
    """By subscript, get or getenv; training sets LOCAL_RANK for DeepSpeed, which is no reading."""
    readers = {
        module.name
        for module in MODULES
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Subscript | ast.Call) and _reads_environment(node)
        for name in ast.walk(node)
        if isinstance(name, ast.Constant) and isinstance(name.value, str) and name.value.startswith(LAUNCHER_VARIABLES)
    }
    assert readers <= READS_LAUNCHER


def _reads_environment(node: ast.Subscript | ast.Call) -> bool:
    """os.environ[...], os.environ.get(...), os.getenv(...)"""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
        return False
    text = ast.unparse(node.value if isinstance(node, ast.Subscript) else node.func)
    return "environ" in text or "getenv" in text


def test_no_module_is_named_after_nothing():
    vague = {"utils", "util", "common", "helpers", "helper", "misc", "core"}
    assert not [module.name for module in MODULES if set(module.name.split(".")) & vague]


def test_only_the_command_line_imports_its_own_package_inside_functions():
    """Elsewhere such an import hides a cycle."""
    late = {
        (module.name, name)
        for module in MODULES
        if module.part not in ("hpcmlip.cli", "hpcmlip.bench")
        for function in ast.walk(module.tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if part_of(name).startswith("hpcmlip")
    }
    assert not late
