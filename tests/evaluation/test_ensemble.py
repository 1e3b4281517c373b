"""`evaluate` against numpy on the raw HDF5, in one and two processes; its rules about members, levels and splits."""

import json
import math
import shutil

import h5py
import numpy as np
import pytest
import torch
import zarr
from scipy import stats

from hpcmlip.config import RunConfig, from_values
from hpcmlip.data.store import open_store
from hpcmlip.errors import ConfigError, DataError, RunError
from hpcmlip.evaluation import predictions
from hpcmlip.evaluation.ensemble import evaluate
from hpcmlip.models.card import SCHEMA
from hpcmlip.models.export import load_model, save_model
from hpcmlip.sealing import seal, unseal
from hpcmlip.units import HARTREE, KCAL_PER_MOL

RAW_KEYS = {"dz": ("wb97x_dz.energy", "wb97x_dz.forces"), "cc": ("ccsd(t)_cbs.energy", None)}


@pytest.fixture(scope="module")
def metrics(evaluated) -> dict:
    return json.loads((evaluated / "metrics.json").read_text())


def raw_labels(path, source, key) -> np.ndarray:
    """Labels of [R, 3] sources in eV or eV/Å, straight from the HDF5 file."""
    with h5py.File(path) as file:
        names = sorted(file)
        return np.stack([file[names[group]][key][row] for _, group, row in source]) * HARTREE


def all_rows(folder) -> dict[int, dict[str, np.ndarray]]:
    return {n: {k: a[:] for k, a in group.arrays()} for n, group in predictions.groups(folder / "predictions.zarr")}


@pytest.mark.parametrize("level", ["dz", "cc"])
def test_energy_figures_are_those_of_numpy_on_the_raw_file(level, metrics, evaluated, samples):
    column = ["dz", "cc"].index(level)
    errors = []
    for rows in all_rows(evaluated).values():
        label = raw_labels(samples["ab_initio"], rows["source"], RAW_KEYS[level][0])
        errors.append(rows["energy_members"][:, :, column] - label[:, None])
    errors = np.concatenate(errors) / KCAL_PER_MOL
    found = metrics["levels"][level]["energy"]
    maes, rmses = np.abs(errors).mean(0), np.sqrt((errors**2).mean(0))
    assert found["mae"] == pytest.approx(maes.mean(), rel=1e-9)
    assert found["rmse"] == pytest.approx(rmses.mean(), rel=1e-9)
    assert found["count"] == len(errors) == metrics["num_structures"]
    low, high = stats.t.interval(0.95, 2, loc=rmses.mean(), scale=stats.sem(rmses))
    assert found["ci95_rmse"] == pytest.approx((high - low) / 2, rel=1e-9)
    low, high = stats.t.interval(0.95, 2, loc=maes.mean(), scale=stats.sem(maes))
    assert found["ci95_mae"] == pytest.approx((high - low) / 2, rel=1e-9)
    mean_error = errors.mean(1)
    assert metrics["ensemble"][level]["energy"]["rmse"] == pytest.approx(np.sqrt((mean_error**2).mean()), rel=1e-9)
    assert [m["levels"][level]["energy"]["rmse"] for m in metrics["members"]] == pytest.approx(list(rmses), rel=1e-9)
    spread = metrics["spread"][level]["energy"]
    sigma = errors.std(axis=1, ddof=1)
    assert spread["pearson"] == pytest.approx(np.corrcoef(sigma, np.abs(mean_error))[0, 1], rel=1e-6)
    assert spread["rms_sd"] == pytest.approx(np.sqrt((sigma**2).mean()), rel=1e-9)
    assert spread["within_1_sd"] == pytest.approx((np.abs(mean_error) <= sigma).mean())
    assert sum(row["count"] for row in spread["quantiles"]) == len(errors)
    spreads = [row["rms_sd"] for row in spread["quantiles"]]
    assert spreads == sorted(spreads)


def test_force_figures_are_those_of_numpy_on_the_raw_file(metrics, evaluated, samples):
    errors = []
    for rows in all_rows(evaluated).values():
        label = raw_labels(samples["ab_initio"], rows["source"], RAW_KEYS["dz"][1])
        errors.append((rows["forces_mean"][:, :, 0] - label).ravel())
    errors = np.concatenate(errors) / KCAL_PER_MOL
    found = metrics["ensemble"]["dz"]["forces"]
    # the file keeps forces in float32
    assert found["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-5)
    assert found["rmse"] == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-5)
    assert (found["count"], found["unit"]) == (len(errors), "kcal/mol/Å")


def test_errors_by_size_add_up_to_the_whole(metrics):
    for level, props in metrics["by_size"].items():
        for prop, rows in props.items():
            whole = metrics["ensemble"][level][prop]
            count = sum(row["count"] for row in rows)
            square = sum(row["count"] * row["ensemble_rmse"] ** 2 for row in rows)
            assert count == whole["count"]
            assert math.sqrt(square / count) == pytest.approx(whole["rmse"], rel=1e-9)


@pytest.mark.parametrize("level", ["dz", "cc"])
def test_conformer_differences_are_those_of_all_pairs(level, metrics, evaluated, ab_initio_store):
    """Against a loop over pairs, as spec §9.3 defines them."""
    column, store, errors = ["dz", "cc"].index(level), open_store(ab_initio_store), []
    for n, rows in all_rows(evaluated).items():
        (meta,) = [g for g in store.meta.groups if g.num_atoms == n]
        keys = store.read(meta, "source", 0, meta.rows).tolist()
        molecules = dict(zip(map(tuple, keys), store.read(meta, "molecule", 0, meta.rows).tolist(), strict=True))
        own = np.array([molecules[tuple(source)] for source in rows["source"].tolist()])
        label, said = rows["energy_label"][:, column], rows["energy_members"][:, :, column]
        for i in range(len(own)):
            for j in range(i + 1, len(own)):
                lowest = label[own == own[i]].min()
                if own[i] == own[j] and max(label[i], label[j]) <= lowest + 100 * KCAL_PER_MOL:
                    errors.append((said[i] - said[j]) - (label[i] - label[j]))
    errors = np.array(errors) / KCAL_PER_MOL
    found = metrics["conformers"][level]
    assert found["count"] == len(errors) > 50
    assert found["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-9)
    rmses = np.sqrt((errors**2).mean(0))
    assert found["rmse"] == pytest.approx(rmses.mean(), rel=1e-9)
    assert found["ci95_rmse"] == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(rmses), rel=1e-9)
    assert found["ensemble_rmse"] == pytest.approx(np.sqrt((errors.mean(1) ** 2).mean()), rel=1e-9)


def test_a_level_without_force_labels_has_no_force_row(metrics):
    assert set(metrics["levels"]["dz"]) == {"energy", "forces"}
    assert set(metrics["levels"]["cc"]) == {"energy"}
    assert metrics["trained"] == {"dz": "EF", "cc": "E"}


def test_predictions_hold_each_structure_of_the_split_once(evaluated, ab_initio_store):
    store = open_store(ab_initio_store)
    for meta in store.meta.groups:
        spans = [(s.start, s.stop) for s in meta.segments if s.split == "test"]
        if not spans:
            continue
        wanted = np.concatenate([store.read(meta, "source", *span) for span in spans])
        held = zarr.open_group(evaluated / "predictions.zarr", mode="r")[meta.path]
        assert sorted(map(tuple, wanted)) == sorted(map(tuple, held["source"][:]))
        members = held["energy_members"][:]
        np.testing.assert_allclose(held["energy_mean"][:], members.mean(1), rtol=1e-12)
        np.testing.assert_allclose(held["energy_std"][:], members.std(1, ddof=1), rtol=1e-6)


@pytest.mark.distributed
def test_two_ranks_give_the_figures_and_predictions_of_one(experiment, ab_initio_store, evaluated, tmp_path, launch):
    out = tmp_path / "two"
    launch("-m", "hpcmlip", "evaluate", experiment, "--data", ab_initio_store, "--out", out, timeout=150)
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (evaluated, out))
    assert_close(one, two)
    for n, rows in all_rows(evaluated).items():
        for name, values in all_rows(out)[n].items():
            np.testing.assert_allclose(values, rows[name], rtol=1e-9, atol=1e-6 if "forces" in name else 1e-9)
    assert not (out / ".partial").exists()


def assert_close(a, b, where=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_close(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_close(*pair, f"{where}/{i}")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-9), where
    else:
        assert a == b, where


def test_references_cancel(experiment, ab_initio_store, evaluated, tmp_path):
    """The same network with a constant per element moved from its reference into its head says the same totals."""
    moved = tmp_path / "moved"
    shutil.copytree(experiment / "member_00", moved)
    card = unseal((moved / "model.json").read_text(), SCHEMA)
    shift = np.array([0.3, -0.2, 0.1, 0.05])
    card["spec"]["reference_ev"] = (np.array(card["spec"]["reference_ev"]) + shift).tolist()
    (moved / "model.json").write_text(seal(card, SCHEMA))
    evaluate([moved], ab_initio_store, split="test", out=tmp_path / "out", unit="eV")
    for n, rows in all_rows(evaluated).items():
        elements = np.array(card["spec"]["elements"])
        counts = (rows["z"][:, :, None] == elements).sum(1)
        expected = rows["energy_members"][:, 0] + (counts @ shift)[:, None]
        np.testing.assert_allclose(all_rows(tmp_path / "out")[n]["energy_mean"], expected, rtol=1e-12)
    one = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert one["levels"]["cc"]["energy"]["ci95_rmse"] is None
    assert one["levels"]["cc"]["energy"]["unit"] == "eV"
    assert one["spread"] == {"dz": {}, "cc": {}}


def test_forces_of_a_level_trained_on_energies_are_compared(xtb_store, tmp_path, train_member):
    """The point of multi-fidelity training: forces that were never shown."""
    levels = {"gfn1": "EF", "gfn2": "E"}
    run = train_member(tmp_path / "run", xtb_store, seed=0, steps=3, levels=levels)
    evaluate([run], xtb_store, split="val", out=tmp_path / "out", unit="kcal/mol")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["trained"] == levels
    assert set(found["levels"]["gfn2"]) == {"energy", "forces"}
    assert found["levels"]["gfn2"]["forces"]["count"] == found["levels"]["gfn1"]["forces"]["count"] > 0
    # two heads, two forces
    assert found["levels"]["gfn2"]["forces"]["rmse"] != found["levels"]["gfn1"]["forces"]["rmse"]
    assert any("molecule" in note for note in found["notes"])
    assert any("chose the weights" in note for note in found["notes"])


def test_unfinished_members_are_named_and_left_out(experiment, ab_initio_store, tmp_path):
    copy = tmp_path / "exp"
    shutil.copytree(experiment, copy)
    (copy / "member_01" / "done.json").unlink()
    (copy / "member_03").mkdir()
    evaluate([copy], ab_initio_store, split="test", out=tmp_path / "out", unit="kcal/mol")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [m["run"].rsplit("/", 1)[1] for m in found["members"]] == ["member_00", "member_02"]
    assert [item["run"].rsplit("/", 1)[1] for item in found["left_out"]] == ["member_01", "member_03"]
    assert "member_03" in (tmp_path / "out" / "report.html").read_text()


def test_fewer_members_than_asked_for_are_refused_by_name(experiment, ab_initio_store, tmp_path, cli):
    copy = tmp_path / "exp"
    shutil.copytree(experiment, copy)
    (copy / "member_01" / "done.json").unlink()
    (copy / "member_03").mkdir()
    (copy / "member_01" / "log.txt").write_text("INFO step 1\n2026-11-21 ERROR 11 steps had non-finite numbers\n")
    (copy / "slurm").mkdir()
    (copy / "slurm" / "member_03.jobs").write_text("2026-11-21T07:00:00Z 12_3 failed with exit code 137\n")
    arguments = ["evaluate", copy, "--data", ab_initio_store, "--out", tmp_path / "out"]
    done = cli(*arguments, "--min-members", 3, expect=1)
    assert "2 finished models, at least 3 are needed" in done.stderr and "Traceback" not in done.output
    assert "member_01: not finished (there is no done.json; 2026-11-21 ERROR 11 steps had" in done.stderr
    assert "member_03: not finished (there is no done.json; failed with exit code 137)" in done.stderr
    assert not (tmp_path / "out").exists()
    cli(*arguments, "--min-members", 2)
    report = (tmp_path / "out" / "report.html").read_text()
    assert "failed with exit code 137" in report and "member_01" in report


def test_a_member_without_finite_predictions_is_named(experiment, ab_initio_store, tmp_path):
    potential, card = load_model(experiment / "member_00")
    with torch.no_grad():
        next(potential.parameters()).fill_(torch.nan)
    (tmp_path / "bad").mkdir()
    config = from_values(RunConfig, card["config"], tmp_path, where="test")
    save_model(tmp_path / "bad", potential, config=config, card={})
    runs = [experiment / "member_01", tmp_path / "bad"]
    with pytest.raises(
        RunError, match=r"bad gives no finite energy and forces for row \d+ of group \d+ of ab_initio_small"
    ):
        evaluate(runs, ab_initio_store, split="test", out=tmp_path / "out", unit="eV")
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_to_evaluate_is_refused(tmp_path, ab_initio_store):
    (tmp_path / "exp" / "member_00").mkdir(parents=True)
    with pytest.raises(RunError, match=r"no finished model.*member_00"):
        evaluate([tmp_path / "exp"], ab_initio_store, split="test", out=tmp_path / "out", unit="eV")
    with pytest.raises(ConfigError, match="no run directory"):
        evaluate([tmp_path / "absent"], ab_initio_store, split="test", out=tmp_path / "out", unit="eV")
    assert not (tmp_path / "out").exists()


def test_members_must_agree(experiment, ab_initio_store, tmp_path, train_member):
    other = train_member(tmp_path / "sf", ab_initio_store, seed=0, steps=1, levels={"cc": "E"})
    with pytest.raises(ConfigError, match=r"levels dz: EF.*must agree|levels cc: E, dz: EF.*must agree"):
        evaluate([experiment, other], ab_initio_store, split="test", out=tmp_path / "out", unit="eV")


@pytest.mark.parametrize(
    ("change", "message"), [({"split": "tset"}, "did you mean 'test'"), ({"unit": "ev"}, "known: eV")]
)
def test_misspelt_options(change, message, experiment, ab_initio_store, tmp_path):
    options = {"split": "test", "unit": "eV"} | change
    with pytest.raises(ConfigError, match=message):
        evaluate([experiment], ab_initio_store, out=tmp_path / "out", **options)


def test_a_store_without_a_common_level_is_refused(experiment, xtb_store, tmp_path):
    with pytest.raises(DataError, match=r"know the levels dz, cc.*holds gfn1, gfn2"):
        evaluate([experiment], xtb_store, split="test", out=tmp_path / "out", unit="eV")


def test_an_evaluation_replaces_an_earlier_one_and_nothing_else(experiment, ab_initio_store, tmp_path):
    out = tmp_path / "out"
    (out / ".partial" / "spill").mkdir(parents=True)
    (out / ".partial" / "spill" / "n003.z.00000").write_bytes(b"of a killed evaluation")
    (out / "slurm.log").write_text("mine")
    for split in ("val", "test"):
        evaluate([experiment / "member_00"], ab_initio_store, split=split, out=out, unit="eV")
        assert json.loads((out / "metrics.json").read_text())["split"]["name"] == split
    assert {p.name for p in out.iterdir()} == {
        *("metrics.json", "predictions.zarr", "plots", "report.html"),
        "slurm.log",
    }


def test_an_interrupted_evaluation_leaves_no_metrics(experiment, ab_initio_store, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise DataError("the disk is gone")

    monkeypatch.setattr("hpcmlip.evaluation.output.plots.draw", fail)
    with pytest.raises(DataError, match="disk is gone"):
        evaluate([experiment / "member_00"], ab_initio_store, split="test", out=tmp_path / "out", unit="eV")
    assert list((tmp_path / "out").iterdir()) == []
