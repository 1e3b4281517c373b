"""report.html: one file for the reader of the paper's table; images embedded, nothing fetched, all text escaped."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

from hpcmlip.evaluation import table
from hpcmlip.evaluation.plots import Image

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; } td.n, th.n { text-align: right; } td.n { white-space: nowrap; }
figure { margin: 1.4rem 0; } img { max-width: 100%; } figcaption, .small { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; }
.note { border-left: 4px solid #0072b2; padding: .2rem .8rem; margin: .6rem 0; background: #eef5fa; }
.missing { border-color: #d55e00; background: #fdf3ec; }
code { font-size: .85em; overflow-wrap: anywhere; }
"""


def render(content: dict, images: Sequence[Image]) -> str:
    """The page for the content of metrics.json."""
    title = f"Evaluation of {_names(content)} on {content['store']['name']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="small">{escape(table.caption(content))}</p>',
        *(f'<p class="note">{escape(note)}</p>' for note in content["notes"]),
        *(f'<p class="note missing">Left out: {escape(": ".join(i.values()))}</p>' for i in content["left_out"]),
        "<h2>Errors</h2>",
        _table(table.HEADER, table.rows(content), numeric_from=table.FIRST_NUMBER),
        f"<p>{_how_to_cite(content)}</p>",
        "<h2>What was trained</h2>",
        _training(content),
        *("<h2>Plots</h2>" for _ in images[:1]),
        *map(_figure, images),
        *_calibration(content),
        "<h2>Members</h2>",
        _members(content),
        "<h2>Data and versions</h2>",
        _identity(content),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _names(content: dict) -> str:
    return ", ".join(sorted({str(m["name"]) for m in content["members"]}))


def _table(header: Sequence[str], rows: Iterable[Sequence], *, numeric_from: int) -> str:
    def row(cells: Sequence, tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if i >= numeric_from else ''}>{escape(str(cell))}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "\n".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    table_text = f"<table><thead><tr>{row(header, 'th')}</tr></thead>\n<tbody>{body}</tbody></table>"
    return f'<div class="wide">{table_text}</div>'


def _how_to_cite(content: dict) -> str:
    n = len(content["members"])
    energies = "Energies are errors of the total energy of a structure, forces of a Cartesian component."
    if n < 2:
        return f"{energies} One member gives no interval; train several that differ in their seed."
    if content["members"][0]["settings"]:
        return escape(f"{energies} The members are trials of different settings: cite one of them, not their mean.")
    level, prop, values = [(name, p, v) for name, props in content["levels"].items() for p, v in props.items()][-1]
    example = f"{level} {prop}: RMSE {table.estimate(values['rmse'], values['ci95_rmse'])} {values['unit']}"
    text = (
        f"{energies} To cite: “{example} (mean and 95 % confidence interval over {n} independently seeded models, "
        "Student's t)”. The interval covers initialization and data order; it does not cover the choice of the split. "
        "The column “ensemble” is the RMSE of the members' mean prediction, which is what the ASE calculator returns."
    )
    return escape(text)


def _training(content: dict) -> str:
    labels = {"E": "energies", "EF": "energies and forces"}
    counts = content["training_labels"]
    levels = [
        (name, labels[how], *(f"{n:,}" if n else "" for n in counts[name].values())) if counts else (name, labels[how])
        for name, how in content["trained"].items()
    ]
    header = ("level", "trained on", *(("energies", "structures with forces") if counts else ()))
    settings = "".join(
        f'<p class="small">{name}: {escape(", ".join(f"{key} {value}" for key, value in content[name].items()))}</p>'
        for name in ("model", "training")
    )
    return _table(header, levels, numeric_from=2) + settings


def _figure(image: Image) -> str:
    data = base64.b64encode(image.path.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(image.title)}" src="data:image/png;base64,{data}">'
        f"<figcaption><b>{escape(image.title)}.</b> {escape(image.caption)}</figcaption></figure>"
    )


def _calibration(content: dict) -> list[str]:
    rows = [
        (
            level,
            f"{prop} ({values['unit']})",
            table.number(values["rms_sd"]),
            "" if values["rmse_over_rms_sd"] is None else f"{values['rmse_over_rms_sd']:.2f}",
            "" if values["pearson"] is None else f"{values['pearson']:.2f}",
            f"{100 * values['within_1_sd']:.0f} %",
            f"{100 * values['within_2_sd']:.0f} %",
        )
        for level, props in content["spread"].items()
        for prop, values in props.items()
    ]
    if not rows:
        return []
    header = (
        "level",
        "property",
        "RMS spread σ",
        "RMSE / spread",
        "correlation of σ with |error|",
        "|error| < σ",
        "< 2σ",
    )
    return ["<h2>Spread of the ensemble</h2>", _table(header, rows, numeric_from=2)]


def _members(content: dict) -> str:
    labels = [(level, prop) for level, props in content["levels"].items() for prop in props]
    rows = [
        (
            m["run"],
            ", ".join(f"{key} {value}" for key, value in m["settings"].items()),
            m["seed"],
            m["best"]["epoch"] + 1 if m["best"] else "",
            *(table.number(m["levels"][level][prop]["rmse"]) for level, prop in labels),
        )
        for m in content["members"]
    ]
    header = ("run", "settings", "seed", "best epoch", *(f"RMSE {level} {prop}" for level, prop in labels))
    return _table(header, rows, numeric_from=2)


def _identity(content: dict) -> str:
    store = content["store"]
    split = ", ".join(f"{key}: {value}" for key, value in content["split"].items())
    rows = [
        ("store", f"{store['path']} ({store['num_structures']:,} structures, {store['quarantined']} quarantined)"),
        ("store digest", store["digest"]),
        *(("raw file", f"{s['name']}, {s['size']:,} bytes, sha256 {s['sha256']}") for s in store["sources"]),
        ("split", split),
        *(("trained on", f"{item.get('path')}, digest {item.get('digest')}") for item in content["trained_on"]),
        *(("weights", f"{m['run']}: sha256 {m['weights_sha256']}") for m in content["members"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in content["versions"].items())),
    ]
    cells = "\n".join(f"<tr><td>{escape(a)}</td><td><code>{escape(b)}</code></td></tr>" for a, b in rows)
    return f"<table><tbody>{cells}</tbody></table>"
