"""Components are found by their file name alone."""

import importlib
import sys

import pytest

from hpcmlip import plugins
from hpcmlip.errors import ConfigError

PACKAGES = ("models", "preprocess.readers", "bench")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_component_has_one_line_for_humans(package):
    found = plugins.names(package)
    assert found
    for name in found:
        module = plugins.find(package, name)
        assert module.COMPONENT.strip() and "\n" not in module.COMPONENT


def test_the_readers_of_the_ani_data_sets():
    assert {"ani1", "ani1x", "comp6"} <= set(plugins.names("preprocess.readers"))


def test_a_new_file_is_a_new_component_and_nothing_else_is_edited(tmp_path, monkeypatch):
    package = importlib.import_module("hpcmlip.models")
    (tmp_path / "brandnew.py").write_text('"""A model."""\n\nCOMPONENT = "a new one"\n')
    (tmp_path / "no_component.py").write_text('"""Shared layers."""\n')
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    assert "brandnew" in plugins.names("models") and "no_component" not in plugins.names("models")
    assert plugins.find("models", "brandnew").COMPONENT == "a new one"
    sys.modules.pop("hpcmlip.models.brandnew")


def test_listing_imports_no_component(tmp_path, monkeypatch):
    package = importlib.import_module("hpcmlip.models")
    (tmp_path / "explosive.py").write_text('COMMENT = 0\nCOMPONENT = "boom"\nraise RuntimeError("imported")\n')
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    assert "explosive" in plugins.names("models")


@pytest.mark.parametrize(
    ("package", "name", "message"),
    [
        ("models", "hipn", r"no model named 'hipn' \(did you mean 'hipnn'\?"),
        ("preprocess.readers", "ANI1X", r"no reader named 'ANI1X'"),
        ("models", "potential", "no model named 'potential'"),
        ("models", "../hipnn", "no model named"),
        ("models", "hipnn.Net", "no model named"),
    ],
)
def test_an_unknown_name(package, name, message):
    with pytest.raises(ConfigError, match=message):
        plugins.find(package, name)


def test_suggestions():
    assert plugins.suggest("enrgy", ["energy", "forces"]) == " (did you mean 'energy'? known: energy, forces)"
    assert plugins.suggest("zzz", ["energy"]) == " (known: energy)"
