"""R23: no line of the program unpickles or runs text as code, and no command does so through a library."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ase.io
import audited
import pytest
from ase.build import molecule
from test_layers import MODULES

AUDITED = Path(audited.__file__)

MODULES_THAT_RUN = set(
    "pickle _pickle cPickle cloudpickle dill joblib shelve marshal jsonpickle runpy code codeop pandas "
    "torch.package torch.hub numcodecs.pickles ase.io.pickletrajectory".split()
)
CALLS = set(
    "eval exec compile __import__ torch.load torch.jit.load torch.export.load torch.hub.load numpy.fromregex "
    "yaml.unsafe_load yaml.unsafe_load_all yaml.full_load yaml.full_load_all numcodecs.Pickle".split()
)
METHODS = set(
    "broadcast_object_list all_gather_object gather_object scatter_object_list send_object_list recv_object_list "
    "load_checkpoint read_pickle find_class".split()
)
"""Of whatever they are called on: the collectives of torch that pickle, DeepSpeed's own checkpoints, pandas."""
IMPORTS_BY_NAME = {"hpcmlip.plugins"}
"""importlib there loads modules of its own packages, from a list of those that exist."""
YAML_LOADERS = {"hpcmlip.config": {"_Loader"}}
"""Subclasses of SafeLoader."""


def offences(name: str, tree: ast.Module) -> Iterator[str]:
    """What in a module can unpickle or run code, as `line: what`."""
    aliases = _aliases(tree)
    safe = {"yaml.SafeLoader", "yaml.CSafeLoader"} | {c.name for c in ast.walk(tree) if _is_safe_loader(c, aliases)}
    for node in ast.walk(tree):
        for module in _imported(node):
            if any(module == bad or module.startswith(f"{bad}.") for bad in MODULES_THAT_RUN | CALLS):
                yield f"{node.lineno}: import of {module}"
        if not isinstance(node, ast.Call):
            continue
        called = _full(node.func, aliases)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if called in CALLS or called.rpartition(".")[2] in METHODS:
            yield f"{node.lineno}: {called}"
        if called.startswith("importlib.import_module") and name not in IMPORTS_BY_NAME:
            yield f"{node.lineno}: {called}"
        if called in ("numpy.load", "numpy.lib.format.read_array") and "allow_pickle" not in given:
            yield f"{node.lineno}: {called} without allow_pickle=False"
        for option, harmless in (("allow_pickle", False), ("weights_only", True)):
            if option in given and not _is(given[option], harmless):
                yield f"{node.lineno}: {option} is not {harmless}"
        if called in ("yaml.load", "yaml.load_all"):
            loader = given.get("Loader", node.args[1] if len(node.args) > 1 else None)
            if loader is None or _full(loader, aliases) not in safe:
                yield f"{node.lineno}: {called} without a safe loader"


def _aliases(tree: ast.Module) -> dict[str, str]:
    """Name in the module -> full name of what was imported under it."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []


def _full(node: ast.AST, aliases: dict[str, str]) -> str:
    first, dot, rest = ast.unparse(node).partition(".")
    return aliases.get(first, first) + dot + rest


def _is_safe_loader(node: ast.AST, aliases: dict[str, str]) -> bool:
    return isinstance(node, ast.ClassDef) and "yaml.SafeLoader" in [_full(base, aliases) for base in node.bases]


def _is(node: ast.AST, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.fault("R23", sample=1, soak=1)
def test_no_line_of_the_tree_unpickles_or_runs_text():
    found = [f"{module.name}:{what}" for module in MODULES for what in offences(module.name, module.tree)]
    assert not found and len(MODULES) > 100


@pytest.mark.control("R23", broken="lines that unpickle, for the search of the tree")
@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import dill as d",
        "import shelve, json",
        "import pandas as pd",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x', weights_only=True)",
        "import torch\ntorch.jit.load('x')",
        "import torch.distributed as d\nd.broadcast_object_list([1])",
        "from torch.distributed import all_gather_object as g\ng([1], 1)",
        "import numpy as np\nnp.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "from numpy import load\nload('x', allow_pickle=not False)",
        "import yaml\nyaml.load(t, Loader=yaml.Loader)",
        "import yaml\nyaml.load(t, yaml.UnsafeLoader)",
        "import yaml\nclass L(yaml.Loader): pass\nyaml.load(t, Loader=L)",
        "from yaml import unsafe_load",
        "import numcodecs\nnumcodecs.Pickle()",
        "eval(text)",
        "exec(text)",
        "__import__(text)",
        "import importlib\nimportlib.import_module(text)",
        "engine.load_checkpoint(folder)",
    ],
)
def test_the_search_finds_each_of_them(line):
    assert list(offences("hpcmlip.made_up", ast.parse(line)))


@pytest.mark.distributed
@pytest.mark.fault("R23", sample=1, soak=1)
def test_no_command_unpickles_through_a_library(undisturbed, ab_initio_store, mpirun, tmp_path):
    """Training on two ranks that goes on from its checkpoint, evaluation, prediction, verification."""
    watched, run = tmp_path / "watched", tmp_path / "run"
    watched.mkdir()
    program = [str(AUDITED), str(watched)]
    ase.io.write(tmp_path / "in.xyz", molecule("H2O"))
    (run / "STOP").parent.mkdir()
    (run / "STOP").touch()
    ended = mpirun(2, "train", undisturbed.config, "--run-dir", run, program=program)
    assert ended.returncode == 75, ended.output
    for arguments in (
        (2, "train", undisturbed.config, "--run-dir", run),
        (1, "evaluate", run, "--data", ab_initio_store, "--out", tmp_path / "evaluation"),
        (1, "predict", run, tmp_path / "in.xyz", "-o", tmp_path / "out.xyz"),
        (1, "verify", ab_initio_store),
    ):
        ended = mpirun(*arguments, program=program)
        assert ended.returncode == 0, ended.output
    assert len(list(watched.iterdir())) == 7 and not audited.found(watched)


@pytest.mark.control("R23", broken="a process that unpickles, for the watch over the commands")
def test_the_watch_sees_a_pickle(tmp_path):

    script = "import audited, pathlib, sys, pickle, fractions; audited.watch(pathlib.Path(sys.argv[1])); "
    script += "pickle.loads(pickle.dumps(fractions.Fraction(1, 3)))"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=AUDITED.parent)
    assert any(line.startswith("fractions.Fraction ") for line in audited.found(tmp_path))
