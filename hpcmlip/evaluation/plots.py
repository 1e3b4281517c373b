"""The plots of an evaluation: parity, error against size, spread against error, learning curves. PNG with their CSV."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from hpcmlip.evaluation import plot_data
from hpcmlip.evaluation.plot_data import Curve, Points
from hpcmlip.evaluation.table import number
from hpcmlip.training.errors import PROPERTIES, unit_of

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.2,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's palette: told apart by color-blind readers too."""
DENSE = 3000
"""Points beyond which a parity plot shows their density."""
PANEL = 2.8
"""Inches of one panel."""


@dataclass(frozen=True)
class Image:
    """A plot and what it shows."""

    path: Path
    title: str
    caption: str


def draw(predictions: Path, content: dict, runs: Sequence[Path], folder: Path) -> list[Image]:
    """All plots that the evaluation has data for; `content` is that of metrics.json."""
    folder.mkdir(parents=True)
    images: list[Image | None] = []
    with mpl.rc_context(STYLE):
        images += [_parity(predictions, prop, content, folder) for prop in PROPERTIES]
        images += [
            _by_size(content, folder),
            _spread(content, folder),
            _learning(runs, list(content["levels"]), folder),
        ]
    return [image for image in images if image is not None]


def _save(figure: Figure, path: Path, title: str, caption: str) -> Image:
    figure.savefig(path)
    return Image(path, title, caption)


# ------------------------------------------------------------------------------------------------------- parity


def _parity(predictions: Path, prop: str, content: dict, folder: Path) -> Image | None:
    unit = content["unit"]
    points = plot_data.parity(predictions, prop, unit)
    if not points:
        return None
    figure = Figure(figsize=(PANEL * max(len(points), 1.3) + 0.4, PANEL * 1.6 + 0.5))
    axes = figure.subplots(2, len(points), squeeze=False, sharex="col", height_ratios=(2, 1))
    for column, p in enumerate(points):
        errors = content["ensemble"][p.level][prop]
        _parity_panel(axes[0, column], p, f"MAE {number(errors['mae'])}\nRMSE {number(errors['rmse'])}")
        _error_panel(axes[1, column], p)
    symbol, unit = ("E − Σε" if prop == "energy" else "F"), unit_of(prop, unit)
    axes[0, 0].set_ylabel(f"predicted {symbol} ({unit})")
    axes[1, 0].set_ylabel(f"error ({unit})")
    figure.supxlabel(f"reference {symbol} ({unit})", fontsize=9)
    figure.align_ylabels(axes[:, 0])
    name = f"parity_{prop}"
    header = ("level", f"reference ({unit})", "predicted", "sd_over_members")
    plot_data.save(
        folder / f"{name}.csv",
        header,
        (row for p in points for row in zip([p.level] * len(p.sd), p.reference, p.predicted, p.sd, strict=True)),
    )
    drawn = "" if all(p.total == len(p.sd) for p in points) else f" At most {plot_data.MAX_POINTS:,} points are drawn."
    zero = "E − Σε: energy above that of the composition (atomic energies ε). " if prop == "energy" else ""
    caption = (
        f"Mean prediction of the ensemble against the reference, per level of theory, and its error. {zero}{drawn}"
    )
    return _save(figure, folder / f"{name}.png", f"Parity: {prop}", caption.strip())


def _parity_panel(ax: Axes, p: Points, text: str) -> None:
    limits = _limits(p)
    _cloud(ax, p.reference, p.predicted, (*limits, *limits))
    ax.axline(limits[:1] * 2, slope=1, color="0.4", lw=0.8)
    ax.set_title(p.level)
    ax.text(0.05, 0.95, text, transform=ax.transAxes, va="top", fontsize=8)
    ax.text(0.95, 0.05, f"n = {p.total:,}", transform=ax.transAxes, ha="right", fontsize=8)


def _error_panel(ax: Axes, p: Points) -> None:
    error = p.predicted - p.reference
    # a few outliers must not flatten the rest
    bound = np.quantile(np.abs(error), 0.998) * 1.4 or 1.0
    _cloud(ax, p.reference, error, (*_limits(p), -bound, bound))
    ax.axhline(0, color="0.4", lw=0.8)
    outside = int((np.abs(error) > bound).sum())
    if outside:
        ax.text(0.98, 0.97, f"{outside} outside", transform=ax.transAxes, ha="right", va="top", fontsize=7, color="0.3")
    ax.xaxis.set_major_locator(MaxNLocator(5))


def _limits(p: Points) -> tuple[float, float]:
    """Of both axes of a parity plot."""
    low, high = min(p.reference.min(), p.predicted.min()), max(p.reference.max(), p.predicted.max())
    margin = 0.04 * (high - low) or 1.0
    return low - margin, high + margin


def _cloud(ax: Axes, x: np.ndarray, y: np.ndarray, window: tuple[float, float, float, float]) -> None:
    """Points, or where there are many their density, in the window (x low, x high, y low, y high)."""
    if len(x) > DENSE:
        # the lower panel is half as high: half the cells make them equally large
        grid = (60, 35 if window[:2] == window[2:] else 17)
        inside = (y >= window[2]) & (y <= window[3])
        ax.hexbin(
            x[inside], y[inside], extent=window, gridsize=grid, bins="log", mincnt=1, cmap="viridis", linewidths=0.1
        )
    else:
        ax.plot(x, y, "o", ms=2.5, mew=0, alpha=0.6, color=COLORS[0])
    ax.set(xlim=window[:2], ylim=window[2:])


# ------------------------------------------------------------------------------- error against size and spread


def _panels(section: dict) -> list[str]:
    """Properties that at least one level of a section has."""
    return [prop for prop in PROPERTIES if any(props.get(prop) for props in section.values())]


def _by_size(content: dict, folder: Path) -> Image | None:
    section = content["by_size"]
    props = _panels(section)
    keys = ("num_atoms", "mae", "ci95_mae", "rmse", "ci95_rmse", "ensemble_mae", "ensemble_rmse", "count", "unit")
    plot_data.save(folder / "error_by_size.csv", ("level", "property", *keys), plot_data.flat_rows(section, keys))

    def panel(ax: Axes, prop: str) -> None:
        for i, (level, rows) in enumerate(section.items()):
            values = rows.get(prop, [])
            # side by side, so that the bars of one level do not hide another's
            x = [r["num_atoms"] + 0.12 * (i - (len(section) - 1) / 2) for r in values]
            y, bars = [r["rmse"] for r in values], [r["ci95_rmse"] or 0.0 for r in values]
            ax.errorbar(x, y, bars, fmt="o-", ms=3, capsize=2, elinewidth=0.8, color=_color(i), label=level)
        ax.set_xlabel("atoms in the structure")
        ax.set_ylabel(f"RMSE, {prop} ({unit_of(prop, content['unit'])})")
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))

    figure = _row(props, panel)
    caption = "RMSE against the number of atoms: mean over members, bars its 95 % interval."
    return _save(figure, folder / "error_by_size.png", "Error against size", caption) if props else None


def _spread(content: dict, folder: Path) -> Image | None:
    section = {level: {k: v["quantiles"] for k, v in props.items()} for level, props in content["spread"].items()}
    props = _panels(section)
    if not props:
        return None
    keys = ("rms_sd", "rmse", "mae", "count")
    plot_data.save(folder / "spread.csv", ("level", "property", *keys), plot_data.flat_rows(section, keys))

    def panel(ax: Axes, prop: str) -> None:
        for i, (level, rows) in enumerate(section.items()):
            x, y = ([r[key] for r in rows.get(prop, [])] for key in ("rms_sd", "rmse"))
            ax.loglog(x, y, "o-", ms=3, color=_color(i), label=level)
        ends = np.array(ax.get_xlim())
        ax.plot(ends, ends, "--", color="0.4", lw=0.8, label="error = spread")
        ax.set_xlim(*ends)
        _plain_numbers(ax.xaxis, ax.yaxis)
        ax.set_xlabel(f"spread of the members, {prop} ({unit_of(prop, content['unit'])})")
        ax.set_ylabel(f"RMSE of their mean ({unit_of(prop, content['unit'])})")

    caption = (
        "Does the ensemble know where it is wrong? Predictions in groups of equal number by the standard "
        "deviation over members; above the dashed line the ensemble is more confident than it should be."
    )
    return _save(_row(props, panel), folder / "spread.png", "Spread against error", caption)


def _color(level: int) -> str:
    return COLORS[level % len(COLORS)]


def _plain_numbers(*axes: Axis) -> None:
    """Ticks of a logarithmic axis as 0.5, 1, 2 instead of powers of ten; few of them."""
    for axis in axes:
        low, high = axis.get_view_interval()
        subs = (1, 2, 5) if high / low < 200 else (1,)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _row(props: Sequence[str], panel: Callable[[Axes, str], None]) -> Figure:
    """One panel a property, one legend."""
    figure = Figure(figsize=(3.4 * max(1, len(props)), 2.9))
    for ax, prop in zip(np.atleast_1d(figure.subplots(1, max(1, len(props)))), props, strict=False):
        panel(ax, prop)
    if props:
        figure.axes[0].legend()
    return figure


# ----------------------------------------------------------------------------------------------- learning curves


def _learning(runs: Sequence[Path], levels: Sequence[str], folder: Path) -> Image | None:
    curves = plot_data.learning_curves(runs)
    if not curves:
        return None
    plot_data.save(
        folder / "learning_curves.csv",
        ("member", "level", "quantity", "unit", "epoch", "value"),
        ((c.member, c.level, c.quantity, c.unit, *xy) for c in curves for xy in zip(c.epoch, c.value, strict=True)),
    )
    kinds = [kind for kind in ("objective", *PROPERTIES) if any(c.quantity == kind for c in curves)]
    # the evaluated levels first, so that a level has one color in all plots
    levels = [*levels, *sorted({c.level for c in curves if c.level} - set(levels))]
    figure = Figure(figsize=(3.0 * len(kinds) + 0.3, 2.9))
    for ax, kind in zip(np.atleast_1d(figure.subplots(1, len(kinds))), kinds, strict=True):
        _learning_panel(ax, kind, [c for c in curves if c.quantity == kind], levels)
    caption = f"Validation during training, one line a member ({len({c.member for c in curves})} members)."
    return _save(figure, folder / "learning_curves.png", "Learning curves", caption)


def _learning_panel(ax: Axes, kind: str, curves: Sequence[Curve], levels: Sequence[str]) -> None:
    named = set()
    for c in curves:
        color = _color(levels.index(c.level)) if c.level else "0.25"
        label = c.level if c.level and c.level not in named else None
        named.add(c.level)
        ax.semilogy(
            c.epoch, c.value, color=color, alpha=0.8, lw=1.0, label=label, marker="." if len(c.epoch) < 3 else None
        )
    unit = curves[0].unit
    _plain_numbers(ax.yaxis)
    ax.set_xlabel("epoch")
    # the objective adds up energies and forces: it has no unit
    ax.set_ylabel(kind if kind == "objective" or not unit else f"RMSE, {kind} ({unit})")
    if named - {""}:
        ax.legend()
