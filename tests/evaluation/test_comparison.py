"""The last lines of the demo: two evaluations side by side."""

import copy
import json

import pytest

from hpcmlip.evaluation import comparison

METRICS = {
    "levels": {
        "cc": {"energy": {"mae": 1.5, "rmse": 2.0, "ci95_mae": 0.1, "ci95_rmse": 0.25, "unit": "kcal/mol", "count": 9}}
    },
    "members": [{"name": "sf"}, {"name": "sf"}],
    "ensemble": {"cc": {"energy": {"mae": 1.4, "rmse": 1.8, "unit": "kcal/mol", "count": 9}}},
    "store": {"digest": "d"},
    "split": {"name": "test"},
    "trained": {"cc": "E"},
}


def folder(path, **changes):
    """Folder with a metrics.json; `changes` are dotted keys with `__` for the dot."""
    content = copy.deepcopy(METRICS)
    for key, value in changes.items():
        at = content
        *parents, last = key.split("__")
        for parent in parents:
            at = at[parent]
        at[last] = value
    path.mkdir()
    (path / "metrics.json").write_text(json.dumps(content))
    return path


def run(capsys, *arguments):
    code = comparison.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_figures_their_interval_and_the_ratio(tmp_path, capsys):
    first = folder(tmp_path / "a")
    second = folder(
        tmp_path / "b",
        members=[{"name": "mf"}] * 2,
        levels__cc__energy__rmse=0.8,
        levels__cc__energy__ci95_rmse=None,
        ensemble__cc__energy__rmse=0.6,
        trained={"dz": "EF", "cc": "E"},
    )
    code, out, _ = run(capsys, first, second, "--level", "cc")
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "RMSE of the cc energy on 9 labels of the test split, kcal/mol:"
    assert lines[1] == "  sf  member 2.00 ± 0.25 (95 %), mean of 2 members 1.80  trained on cc E"
    assert lines[2] == "  mf  member 0.80, mean of 2 members 0.60  trained on dz EF + cc E"
    assert "2.50 times smaller a member, 3.00 times smaller for the ensemble mean" in lines[3]
    assert str(second / "report.html") in out and str(second / "plots") in out


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"store__digest": "other"}, ["--level", "cc"], "different structures"),
        ({"split__name": "val"}, ["--level", "cc"], "different structures"),
        ({"levels__cc__energy__count": 8}, ["--level", "cc"], "different structures"),
        ({"levels__cc__energy__unit": "eV"}, ["--level", "cc"], "give both the same --units"),
        ({}, ["--level", "c"], "did you mean 'cc'"),
        ({}, ["--level", "cc", "--property", "forces"], "has no forces of the level 'cc'"),
    ],
)
def test_what_cannot_be_compared(tmp_path, capsys, changes, arguments, words):
    pair = folder(tmp_path / "a"), folder(tmp_path / "b", **changes)
    code, out, err = run(capsys, *pair, *arguments)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}"])
def test_an_unfinished_evaluation(tmp_path, capsys, text):
    pair = folder(tmp_path / "a"), tmp_path / "b"
    if text is not None:
        pair[1].mkdir()
        (pair[1] / "metrics.json").write_text(text)
    code, out, err = run(capsys, *pair, "--level", "cc")
    assert (code, out) == (1, "") and "is " + str(pair[1]) + " a finished" in err
