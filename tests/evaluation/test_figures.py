"""Figures, tables and small pure parts of the evaluation."""

import json

import numpy as np
import pytest
from scipy import stats

from hpcmlip.evaluation import figures, plot_data, table
from hpcmlip.evaluation.predictions import take
from hpcmlip.evaluation.sums import SPREAD_COLUMNS, SPREAD_EDGES, _spread_sums


@pytest.mark.parametrize("n", [2, 3, 8])
def test_interval_is_the_t_interval(n):
    values = np.random.default_rng(n).normal(2.0, 0.3, n)
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert figures.interval(values) == pytest.approx((high - low) / 2, rel=1e-12)


def test_eight_members_use_2365_of_spec():
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert figures.interval(values) == pytest.approx(2.365 * np.std(values, ddof=1) / np.sqrt(8), rel=1e-3)


def test_one_member_has_no_interval():
    assert figures.interval([1.0]) is None


def test_calibrated_members_are_seen_as_calibrated():
    rng = np.random.default_rng(0)
    sigma = rng.lognormal(-3, 1, 40_000)
    found = figures.calibration(_spread_sums(sigma, rng.normal(0, sigma)), scale=1.0)
    assert found["rmse_over_rms_sd"] == pytest.approx(1, abs=0.05)
    assert found["within_1_sd"] == pytest.approx(0.683, abs=0.01)
    assert found["within_2_sd"] == pytest.approx(0.954, abs=0.01)
    assert len(found["quantiles"]) == 10
    for row in found["quantiles"]:
        assert row["rmse"] == pytest.approx(row["rms_sd"], rel=0.1)
        assert row["count"] == pytest.approx(4000, rel=0.15)


def test_spread_sums_add_over_parts_and_leave_out_missing_labels():
    rng = np.random.default_rng(1)
    sigma, error = rng.random(100), rng.normal(size=100)
    error[::7] = np.nan
    sigma[0] = 0.0
    whole = _spread_sums(sigma, error)
    np.testing.assert_allclose(_spread_sums(sigma[:30], error[:30]) + _spread_sums(sigma[30:], error[30:]), whole)
    assert whole.shape == (len(SPREAD_EDGES) - 1, len(SPREAD_COLUMNS))
    assert whole[:, 0].sum() == np.isfinite(error).sum()


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (1.3449, 0.0212, "1.345 ± 0.021"),
        (13.517, 0.5, "13.52 ± 0.50"),
        (0.012345, 0.00234, "0.0123 ± 0.0023"),
        (1.0, None, "1.00"),
        (123.456, None, "123.5"),
        (0.04567, None, "0.0457"),
        (2.0, 0.0, "2.00000000 ± 0.00000000"),
    ],
)
def test_estimates_are_written_to_the_digits_of_their_interval(value, half, text):
    assert table.estimate(value, half) == text


def test_take_gathers_rows_over_parts():
    parts = [np.arange(5), np.arange(0), np.arange(5, 12)]
    rows = np.array([11, 0, 5, 4, 7])
    np.testing.assert_array_equal(take(parts, rows), rows)


def test_learning_curves_survive_a_killed_run(tmp_path):
    def record(step, objective):
        return {"kind": "validation", "step": step, "epoch": step / 10, "objective": objective, "levels": {}}

    lines = [json.dumps(r) for r in (record(10, 3.0), {"kind": "train", "step": 11}, record(20, 2.5), record(20, 2.0))]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "valid']))
    (curve,) = plot_data.learning_curves([tmp_path, tmp_path / "absent"])
    assert (curve.quantity, list(curve.epoch), list(curve.value)) == ("objective", [1.0, 2.0], [3.0, 2.0])
