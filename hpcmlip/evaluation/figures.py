"""Figures of an evaluation out of its sums: means over members with t interval, errors of the ensemble, calibration.

All pure functions of numbers; `metrics` gives the content of metrics.json.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit  # Student's t; scipy.stats takes half a second to import

from hpcmlip.evaluation.sums import SPREAD_COLUMNS, Sums
from hpcmlip.training.errors import PROPERTIES, level_figures, mae_rmse, unit_of
from hpcmlip.units import ENERGY_UNITS

CONFIDENCE = 0.95
QUANTILES = 10
LABELS_PER_QUANTILE = 50
"""Of fewer labels there are fewer groups: an RMSE over less than this is mostly noise."""
ENSEMBLE, BASELINE = -2, -1
"""Places on the predictor axis of `Sums.errors`; the members stand before them."""


def interval(values: Sequence[float]) -> float | None:
    """Half-width of the 95 % t interval of a mean of independent values, t(0.975, n - 1) s / √n; None for one value."""
    n = len(values)
    if n < 2:
        return None
    return float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2) * np.std(values, ddof=1) / np.sqrt(n))


def estimates(sums: np.ndarray, unit: str) -> dict:
    """[P, 3] -> means over members and half-widths of their interval: {"mae", "rmse", "ci95_mae", "ci95_rmse"}."""
    members = [mae_rmse(own, unit) for own in sums]
    means = {key: float(np.mean([m[key] for m in members])) for key in ("mae", "rmse")}
    return means | {f"ci95_{key}": interval([m[key] for m in members]) for key in ("mae", "rmse")}


def over_members(members: Sequence[dict]) -> dict:
    """Means over members and half-widths of the interval, in the shape of `level_figures`."""
    first = members[0]
    return {
        level: {
            prop: {
                **{key: float(np.mean([m[level][prop][key] for m in members])) for key in ("mae", "rmse")},
                **{f"ci95_{key}": interval([m[level][prop][key] for m in members]) for key in ("mae", "rmse")},
                "unit": values["unit"],
                "count": values["count"],
            }
            for prop, values in props.items()
        }
        for level, props in first.items()
    }


def by_size(sums: Sums, levels: Sequence[str], sizes: Sequence[int], unit: str) -> dict:
    """{level: {property: [{"num_atoms", "mae", "rmse", "ci95_*", "ensemble_mae", "ensemble_rmse", "count"}]}}."""
    result: dict = {name: {} for name in levels}
    for g, size in enumerate(sizes):
        members = [level_figures(q[g], levels, unit) for q in sums.errors[:ENSEMBLE]]
        ensemble = level_figures(sums.errors[ENSEMBLE, g], levels, unit)
        for name, props in over_members(members).items():
            for prop, values in props.items():
                own = {f"ensemble_{key}": ensemble[name][prop][key] for key in ("mae", "rmse")}
                result[name].setdefault(prop, []).append({"num_atoms": int(size), **values, **own})
    return result


def spread(sums: np.ndarray, levels: Sequence[str], unit: str) -> dict:
    """{level: {property: calibration}} of the spread sums [L, 2, bins, 8]."""
    return {
        name: {
            prop: calibration(sums[i, column], ENERGY_UNITS[unit]) | {"unit": unit_of(prop, unit)}
            for column, prop in enumerate(PROPERTIES)
            if sums[i, column, :, 0].sum() > 0
        }
        for i, name in enumerate(levels)
    }


def calibration(bins: np.ndarray, scale: float) -> dict:
    """How the members' standard deviation σ relates to the error of their mean, of the spread sums [bins, 8] in eV.

    `pearson` correlates σ with |error|; `within_1_sd` is the part of labels nearer than σ (0.68 for a calibrated normal
    spread of many members); `quantiles` are groups of labels by σ.
    """
    total = dict(zip(SPREAD_COLUMNS, bins.sum(0), strict=True))
    n = total["count"]
    s, e = total["spread"] / n, total["error"] / n
    variance = (total["spread2"] / n - s * s) * (total["error2"] / n - e * e)
    return {
        "mean_sd": s / scale,
        "rms_sd": float(np.sqrt(total["spread2"] / n) / scale),
        "rmse_over_rms_sd": float(np.sqrt(total["error2"] / total["spread2"])) if total["spread2"] > 0 else None,
        "pearson": float((total["product"] / n - s * e) / np.sqrt(variance)) if variance > 0 else None,
        "within_1_sd": total["within1"] / n,
        "within_2_sd": total["within2"] / n,
        "count": int(n),
        "quantiles": _quantiles(bins, scale),
    }


def _quantiles(bins: np.ndarray, scale: float) -> list[dict]:
    """Rows {"rms_sd", "rmse", "mae", "count"} of neighboring bins joined into groups of about equal count."""
    ends = np.cumsum(bins[:, 0])
    groups = int(min(QUANTILES, max(2, ends[-1] // LABELS_PER_QUANTILE)))
    # the group of a bin is that of the middle of its labels
    group = np.minimum(((ends - bins[:, 0] / 2) * groups / ends[-1]).astype(int), groups - 1)
    rows = []
    for g in range(groups):
        part = dict(zip(SPREAD_COLUMNS, bins[group == g].sum(0), strict=True))
        if part["count"] > 0:
            rows.append(
                {
                    "rms_sd": float(np.sqrt(part["spread2"] / part["count"]) / scale),
                    "rmse": float(np.sqrt(part["error2"] / part["count"]) / scale),
                    "mae": float(part["error"] / part["count"] / scale),
                    "count": int(part["count"]),
                }
            )
    return rows


def metrics(sums: Sums, levels: Sequence[str], sizes: Sequence[int], unit: str) -> dict:
    """The sections of metrics.json that are figures."""
    overall = sums.errors.sum(axis=1)
    members = [level_figures(q, levels, unit) for q in overall[:ENSEMBLE]]
    return {
        "levels": over_members(members),
        "members": [{"levels": figures} for figures in members],
        "ensemble": level_figures(overall[ENSEMBLE], levels, unit),
        "baseline": level_figures(overall[BASELINE], levels, unit),
        "spread": spread(sums.spread, levels, unit),
        "by_size": by_size(sums, levels, sizes, unit),
    }
