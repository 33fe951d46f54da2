"""The page: self-contained, its numbers those of the record, and readable in a real browser."""

import base64
import html
import json
import re
from html.parser import HTMLParser

import pytest

from experiments.reproduce.page import page
from experiments.reproduce.table import PaperTable
from tests.helpers.browser import PROGRAM, framed, visit
from tests.helpers.http_server import Server, whole
from tests.helpers.report_cases import REASON, keep_example


class Tables(HTMLParser):
    """The cells of each row that has a name."""

    def __init__(self, text):
        super().__init__()
        self.rows: dict[str, list[str]] = {}
        self.trainings: dict[str, list[str]] = {}
        self._row: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "tr":
            self._row = None
            for name, found in (("data-row", self.rows), ("data-training", self.trainings)):
                if name in given:
                    self._row = found.setdefault(given[name], [])
        if tag == "td" and self._row is not None:
            self._row.append("")

    def handle_endtag(self, tag):
        if tag == "tr":
            self._row = None

    def handle_data(self, data):
        if self._row:
            self._row[-1] += data


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return keep_example(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def text(example):
    return page(example[0])


def test_the_numbers_are_those_of_the_records(text, example):
    found = Tables(text)
    assert found.rows == {line.row.name: line.cells() for line in example[0].lines}
    assert found.trainings == {x.row.name: x.training_cells() for x in example[0].trained}


def test_the_page_stands_alone(text):
    assert "<script" not in text and "@import" not in text and "url(" not in text
    addresses = re.findall(r'\b(?:src|href|action|srcset)="([^"]*)"', text)
    pictures = [a for a in addresses if a.startswith("data:image/svg+xml;base64,")]
    assert sorted(set(addresses) - set(pictures)) == ["data:,"]
    assert not re.search(r"\bon\w+=", text)
    assert len(pictures) == 2  # one per data set
    for picture in pictures:
        drawing = base64.b64decode(picture.partition(",")[2]).decode()
        assert "<svg" in drawing and "<script" not in drawing
        assert not re.search(r'(?:href|src)="(?!#)', drawing), "it asks for something"
    assert len(re.findall(r'<img alt="[^"]{10,}"', text)) == 2


def test_no_plot_is_cut_off(example, monkeypatch):
    boxes = []

    def measure(figure, text):
        figure.draw_without_rendering()
        boxes.append((figure.get_tightbbox(), figure.get_size_inches()))
        return ""

    monkeypatch.setattr("experiments.reproduce.page._svg", measure)
    for table in example:
        page(table)
    assert len(boxes) == 3
    for box, (width, height) in boxes:
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height


def test_the_same_records_give_the_same_page(text, example):
    assert page(example[0]) == text


def test_text_of_the_record_is_text_in_the_page(text):
    assert REASON not in text
    assert REASON in html.unescape(re.sub(r"</?code>", "", text))


def test_a_table_without_any_figure_has_a_page():
    empty = page(PaperTable("imagenet", "ViT on ImageNet", []))
    assert "0 of 0 evaluated rows reproduced" in empty and "<img" not in empty


@pytest.mark.skipif(PROGRAM is None, reason="no chromium found (Debian: apt install chromium)")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_it_fits_is_legible_and_asks_for_nothing(text, tmp_path, width, scheme):
    headers = {"Content_Type": "text/html; charset=utf-8"}
    flags = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    with Server() as server:
        server.offer("/page.html", whole(text.encode(), **headers))
        server.offer("/frame.html", whole(framed("page.html", width, 4000).encode(), **headers))
        document, console = visit(f"{server.address}/frame.html", tmp_path, *flags)
    assert set(server.requests) == {"/page.html", "/frame.html"}
    assert console == []
    found = re.search(r'<p id="facts">(.*?)</p>', document)
    assert found is not None
    facts = json.loads(html.unescape(found[1]))
    assert facts["width"] <= width and facts["out"] == []
    assert len(facts["letters"]) == 2 and min(facts["letters"]) > 10
    assert (facts["paper"] == "rgb(255, 255, 255)") == (scheme == "light")
