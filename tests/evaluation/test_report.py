"""report.html and the plots as files."""

import base64
import csv
import json
import re
from html import unescape
from html.parser import HTMLParser

import matplotlib.image
import pytest

from hpcmlip.evaluation import report, table
from hpcmlip.evaluation.plots import Image


@pytest.fixture(scope="module")
def page(evaluated) -> str:
    return (evaluated / "report.html").read_text()


@pytest.fixture(scope="module")
def content(evaluated) -> dict:
    return json.loads((evaluated / "metrics.json").read_text())


class Tags(HTMLParser):
    """Open elements must be closed in order; collects attributes."""

    VOID = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_self_contained_and_well_formed(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.links and all(link.startswith("data:image/png;base64,") for link in tags.links)
    assert not re.search(r"https?:|url\(|<script|@import", page)


def test_report_shows_the_numbers_of_the_table(page, content):
    cells = [unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", page)]
    rows = table.rows(content)
    assert [row[:2] for row in rows] == [
        *(("dz", "energy"), ("dz", "forces"), ("cc", "energy")),
        *(("dz", "ΔE"), ("cc", "ΔE")),
    ]
    for row in rows:
        at = cells.index(row[3])
        assert tuple(cells[at - 3 : at + 5]) == row


def test_report_names_data_split_members_and_interval(page, content):
    text = unescape(page)
    for wanted in (
        content["store"]["digest"],
        content["store"]["sources"][0]["sha256"],
        *(member["weights_sha256"] for member in content["members"]),
        "95 % confidence interval over 3 independently seeded models",
        "Split by structure",
        "781",  # training structures
    ):
        assert wanted in text


def test_text_is_escaped(content, tmp_path):
    (tmp_path / "a.png").write_bytes(b"png")
    evil = json.loads(json.dumps(content).replace(content["store"]["name"], "<script>alert(1)</script>"))
    page = report.render(evil, [Image(tmp_path / "a.png", "<b>title", "a & b")])
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "&lt;b&gt;title" in page and "a &amp; b" in page


def test_images_are_those_of_the_plots_folder(page, evaluated):
    embedded = {base64.b64decode(data) for data in re.findall(r"base64,([A-Za-z0-9+/=]+)", page)}
    files = sorted((evaluated / "plots").glob("*.png"))
    assert [path.stem for path in files] == [
        *("error_by_size", "learning_curves"),
        *("parity_energy", "parity_forces", "spread"),
    ]
    assert embedded == {path.read_bytes() for path in files}
    for path in files:
        assert min(matplotlib.image.imread(path).shape[:2]) > 400
        assert path.with_suffix(".csv").is_file()


def test_parity_csv_holds_every_label(evaluated, content):
    with (evaluated / "plots" / "parity_forces.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == content["levels"]["dz"]["forces"]["count"]
    square = sum((float(r["predicted"]) - float(r["reference (kcal/mol/Å)"])) ** 2 for r in rows)
    assert (square / len(rows)) ** 0.5 == pytest.approx(content["ensemble"]["dz"]["forces"]["rmse"], rel=1e-5)
