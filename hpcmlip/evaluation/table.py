"""The table of an evaluation, as text on the terminal and as rows for the report: both show the same strings."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

HEADER = ("level", "property", "trained", "MAE", "RMSE", "ensemble RMSE", "baseline RMSE", "labels")


def rows(content: dict) -> list[tuple[str, ...]]:
    """Rows of strings under `HEADER`, one a level and property that has labels."""
    found = []
    for level, props in content["levels"].items():
        for prop, values in props.items():
            found.append(
                (
                    level,
                    f"{prop} ({values['unit']})",
                    _trained(content["trained"].get(level, ""), prop),
                    estimate(values["mae"], values["ci95_mae"]),
                    estimate(values["rmse"], values["ci95_rmse"]),
                    number(content["ensemble"][level][prop]["rmse"]),
                    number(content["baseline"][level][prop]["rmse"]),
                    f"{values['count']:,}",
                )
            )
    return found


def _trained(labels: str, prop: str) -> str:
    return "yes" if prop[0].upper() in labels else "no"


def number(value: float) -> str:
    """Three significant digits at least, two decimals at least below 100."""
    if value >= 100:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def estimate(value: float, half_width: float | None) -> str:
    """`mean ± half-width`, the mean to the digits of a half-width of two significant digits."""
    if half_width is None:
        return number(value)
    digits = 2
    while digits < 8 and round(half_width, digits) < 10 ** (1 - digits):
        digits += 1
    return f"{value:.{digits}f} ± {half_width:.{digits}f}"


def caption(content: dict) -> str:
    """What the figures are, in one or two sentences."""
    n, split = len(content["members"]), content["split"]
    what = (
        f"mean ± half-width of the 95 % t interval over {n} members"
        if n > 1
        else "one member: no interval, no ensemble"
    )
    return (
        f"{what}; split '{split['name']}' ({content['num_structures']:,} structures, split by {split.get('by', '?')}) "
        f"of {content['store']['name']}; baseline: composition alone, zero forces"
    )


def show(content: dict, out: Path) -> None:
    """Print the table and where the files lie."""
    console = Console()
    grid = Table(title=None, caption=caption(content), caption_justify="left")
    for i, name in enumerate(HEADER):
        grid.add_column(name, justify="left" if i < 3 else "right", overflow="fold")
    for row in rows(content):
        grid.add_row(*row)
    console.print(grid)
    for item in content["left_out"]:
        console.print(f"left out: {item['run']}: {item['reason']}", markup=False)
    for note in content["notes"]:
        console.print(f"note: {note}", markup=False)
    console.print(f"report: {out / 'report.html'}", markup=False, soft_wrap=True)
