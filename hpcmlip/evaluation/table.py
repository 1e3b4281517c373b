"""The table of an evaluation, as text on the terminal and as rows for the report: both show the same strings."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from hpcmlip.training.errors import unit_of

HEADER = ("level", "property", "trained", "MAE", "RMSE", "ensemble", "baseline", "labels")
FIRST_NUMBER = 3
"""Column from which on the cells are numbers."""
LOG_WIDTH = 100
"""Columns of a table in a log file, where there is no terminal to ask."""


def rows(content: dict) -> list[tuple[str, ...]]:
    """Rows of strings under `HEADER`, one a level and property that has labels, then the conformer energies."""
    found = [
        (
            level,
            prop,
            "yes" if prop[0].upper() in content["trained"].get(level, "") else "no",
            estimate(values["mae"], values["ci95_mae"]),
            estimate(values["rmse"], values["ci95_rmse"]),
            number(content["ensemble"][level][prop]["rmse"]),
            number(content["baseline"][level][prop]["rmse"]),
            f"{values['count']:,}",
        )
        for level, props in content["levels"].items()
        for prop, values in props.items()
    ]
    for level, values in content["conformers"].items():
        mean = [estimate(values[key], values[f"ci95_{key}"]) for key in ("mae", "rmse")]
        others = [number(values[f"{name}_rmse"]) for name in ("ensemble", "baseline")]
        found.append((level, "ΔE", "", *mean, *others, f"{values['count']:,}"))
    return found


def member_rows(content: dict) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of strings of members with different settings, as in a sweep; no rows for an ensemble."""
    settings = list(content["members"][0]["settings"])
    if not settings:
        return (), []
    labels = [(level, prop) for level, props in content["levels"].items() for prop in props]
    rows = [
        (
            Path(member["run"]).name,
            *(str(member["settings"][key]) for key in settings),
            *(number(member["levels"][level][prop]["rmse"]) for level, prop in labels),
        )
        for member in content["members"]
    ]
    return ("member", *settings, *(f"RMSE {level} {prop}" for level, prop in labels)), rows


def number(value: float) -> str:
    """Three significant digits, at least two decimals from 1 to 100."""
    if value >= 100:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def estimate(value: float, half_width: float | None) -> str:
    """`mean ± half-width` with the decimals that give a half-width below 1 two digits."""
    if half_width is None:
        return number(value)
    digits = 2
    while digits < 8 and half_width < 9.5 * 10.0**-digits:
        digits += 1
    return f"{value:.{digits}f} ± {half_width:.{digits}f}"


def caption(content: dict) -> str:
    """What the figures are."""
    n, split, unit = len(content["members"]), content["split"], content["unit"]
    what = f"mean ± half-width of the 95 % t interval over {n} members" if n > 1 else "one member, hence no interval"
    return (
        f"Split '{split['name']}' of {content['store']['name']}: {content['num_structures']:,} structures of "
        f"{content['num_molecules']:,} molecules, split by "
        f"{split.get('by', '?')}. Energies in {unit}, forces in {unit_of('forces', unit)}. MAE, RMSE: {what}; "
        "ensemble: RMSE of the members' mean prediction; baseline: RMSE of composition alone and zero forces."
        + (" ΔE: differences between conformers within 100 kcal/mol." if content["conformers"] else "")
    )


def show(content: dict, out: Path) -> None:
    """Print the table and where the files lie."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    narrow = console.width < LOG_WIDTH
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0) if narrow else (0, 1))
    for i, name in enumerate(HEADER):
        is_number = i >= FIRST_NUMBER
        grid.add_column(name, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number)
    for row in rows(content):
        grid.add_row(*row)
    console.print(grid)
    console.print(caption(content), markup=False, highlight=False)
    header, member_lines = member_rows(content)
    if member_lines:
        each = Table(*header, box=box.SIMPLE_HEAD, pad_edge=False)
        for row in member_lines:
            each.add_row(*row)
        console.print(each)
    for item in content["left_out"]:
        console.print(f"left out: {item['run']}: {item['reason']}", markup=False, highlight=False)
    for note in content["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False)
    console.print(f"report: {out / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
