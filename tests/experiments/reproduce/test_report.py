"""Tables in Markdown, on a terminal and in the documents: always those of the records."""

import io
import json
import math
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from experiments import cli
from experiments.errors import DataError
from experiments.reproduce import __main__ as reproduce
from experiments.reproduce import records
from experiments.reproduce import table as report
from experiments.reproduce.svg_plots import make_axis
from experiments.reproduce.terminal import Terminal
from tests.helpers.report_cases import MANIFEST, OURS, evaluated, example, trained

ROOT = Path(__file__).parent.parent.parent.parent


def cells_of(text):
    """The cells of the lines of Markdown tables, without heads and rules."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines if not set(line[0]) <= {"-", " "}]


# Judging


@pytest.mark.parametrize(
    ("ours", "images", "status"),
    [
        (97.57, 10000, "reproduced"),
        (97.67, 10000, "reproduced"),
        (97.47, 10000, "reproduced"),
        (97.68, 10000, "differs"),
        (97.46, 10000, "differs"),
        (97.57, 9999, "part of the images"),
        (10.0, 100, "part of the images"),
    ],
)
def test_reproduced_is_within_a_tenth_of_a_point_on_all_images(ours, images, status):
    record = evaluated(example()[0], "cct_cifar10_htm", ours, images)
    row = record.rows["cct_cifar10_htm"]
    assert row.status == status
    assert row.difference == pytest.approx(ours - 97.57, abs=1e-6)


def test_without_a_published_figure_there_is_nothing_to_reproduce():
    row = example()[1].rows["ViT-B_16-224"]
    assert (row.status, row.difference) == ("evaluated", None)
    fewer = evaluated(example()[1], "ViT-B_16-224", 81.0, 12).rows["ViT-B_16-224"]
    assert (fewer.status, fewer.difference) == ("part of the images", None)


def test_mean_and_deviation_over_seeds():
    figures = {0: 97.3, 1: 97.52, 2: 97.61}
    training = trained(example()[0], "cct_cifar100_vtm", figures).training["cct_cifar100_vtm"]
    mean = sum(figures.values()) / 3
    assert training.mean == pytest.approx(mean)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in figures.values()) / 2)
    assert training.std == pytest.approx(deviation) == statistics.stdev(figures.values())
    assert report.training_cells(training)[3:] == ["97.48 ± 0.16", "0, 1, 2", "1510"]
    alone = trained(example()[0], "cct_cifar100_vtm", {7: 83.0}).training["cct_cifar100_vtm"]
    assert alone.std is None and report.training_cells(alone)[3] == "83.00"


# Records


def test_records_survive_the_disk(tmp_path):
    for record in example():
        records.update_record(tmp_path, MANIFEST, record.table, lambda _, r=record: r)
        assert records.read_record(tmp_path, MANIFEST, record.table) == record
    content = json.loads((tmp_path / "cifar.json").read_text())
    assert content["tolerance"] == 0.1
    needed = {"published", "ours", "difference", "images", "hardware", "versions", "commit"}
    assert all({*needed, "command", "time"} <= row.keys() for row in content["rows"])
    htm = next(entry for entry in content["training"] if entry["name"] == "cct_cifar10_htm")
    assert htm["mean"] == pytest.approx(97.4767, abs=1e-3) and len(htm["seeds"]) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar.json", "imagenet.json"]


@pytest.mark.parametrize("value", [float("nan"), "97", True, [1]])
def test_a_figure_that_is_none_is_not_read(tmp_path, value):
    record = example()[0]
    records.update_record(tmp_path, MANIFEST, "cifar", lambda _: record)
    content = json.loads((tmp_path / "cifar.json").read_text())
    content["rows"][1]["ours"] = value
    (tmp_path / "cifar.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="is damaged, or of another version"):
        records.read_record(tmp_path, MANIFEST, "cifar")


def test_rows_that_are_no_longer_in_the_zoo_are_left_out(tmp_path):
    record = example()[0]
    records.update_record(tmp_path, MANIFEST, "cifar", lambda _: record)
    fewer = replace(
        MANIFEST,
        checkpoints={
            name: entry for name, entry in MANIFEST.checkpoints.items() if name != "cct_cifar10_htm"
        },
    )
    left = records.read_record(tmp_path, fewer, "cifar")
    assert "cct_cifar10_htm" not in left.rows and "cct_cifar10_htm" not in left.training
    assert left.rows["cct_cifar10_vtm"] == record.rows["cct_cifar10_vtm"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the results: Not a directory"):
        records.update_record(tmp_path / "file" / "x", MANIFEST, "cifar", lambda record: record)


# Markdown


def test_the_markdown_table_holds_the_figures_of_the_record():
    for record in example():
        lines = cells_of(report.markdown_table(record))
        assert lines[0] == list(report.HEAD)
        for line, row in zip(lines[1:], record.rows.values(), strict=True):
            published, ours = (
                ("–" if v is None else f"{v:.2f}") for v in (row.published, row.ours)
            )
            assert line[:4] == [row.dataset, row.method, published, ours]
            assert line[6] == row.status
    by_name = {tuple(line[:2]): line for line in cells_of(report.markdown_table(example()[0]))}
    assert by_name["CIFAR-10", "VTM"][4] == "−0.10"
    assert by_name["CIFAR-100", "HTM"][4] == "+0.02"


def test_the_page_in_markdown_tells_why_and_from_where():
    text = report.markdown(example())
    assert "CIFAR-10, baseline: figure of the authors of CCT, 1500 epochs" in text
    assert "x<y> is not there" in text
    assert "2026-11-22, NVIDIA H200, python 3.11.7, torch 2.13.0, commit 0123456789ab" in text
    assert text.count("`python -m experiments.reproduce --table cifar`") == 2  # one a table
    assert "97.48 ± 0.16" in text


# Terminals


class Screen(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def shown(stream, monkeypatch, **environment):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    report.print_record(example()[0], Terminal(stream))
    return stream.getvalue()


def test_colours_only_where_the_terminal_can_show_them(monkeypatch):
    coloured = shown(Screen(), monkeypatch, TERM="xterm")
    assert "\x1b[32mreproduced\x1b[0m" in coloured and "\x1b[31mdiffers\x1b[0m" in coloured
    assert "\x1b" not in shown(Screen(), monkeypatch, TERM="xterm", NO_COLOR="1")
    assert "\x1b" not in shown(Screen(), monkeypatch, TERM="dumb")
    assert "\x1b" not in shown(io.StringIO(), monkeypatch, TERM="xterm")
    assert "\x1b" in shown(io.StringIO(), monkeypatch, FORCE_COLOR="1")
    assert "\x1b" not in shown(io.StringIO(), monkeypatch, FORCE_COLOR="1", NO_COLOR="1")
    assert "\x1b" in shown(Screen(), monkeypatch, TERM="xterm", NO_COLOR="")  # empty is unset


def test_plain_and_coloured_text_say_the_same(monkeypatch):
    import re

    coloured = re.sub(r"\x1b\[\d*m", "", shown(Screen(), monkeypatch, TERM="xterm"))
    assert coloured == shown(Screen(), monkeypatch, TERM="xterm", NO_COLOR="1")


def test_terminals_without_unicode_get_plain_letters(monkeypatch):
    class Old(Screen):
        encoding = "latin-1"

    text = shown(Old(), monkeypatch, NO_COLOR="1")
    text.encode("ascii")
    assert "CCT-7/3x1" in text and "-0.10" in text


def test_tables_fit_a_terminal_of_eighty_columns(monkeypatch):
    assert max(map(len, shown(Screen(), monkeypatch, NO_COLOR="1").splitlines())) <= 80


# Documents


def test_the_documents_show_the_tables_of_the_records():
    found = report.documents(ROOT)
    assert {path.name for path in found} >= {"reproduce.md", "zoo.md"}
    for path in found:
        text = path.read_text(encoding="utf-8")
        again = report.regenerated(text, MANIFEST, ROOT / "results")
        assert text == again, f"{path.name}: run python -m experiments.reproduce --render"


def test_blocks_are_made_anew_and_the_rest_is_left():
    text = (
        "before\n<!-- generated: table cifar -->\nold\n<!-- end of what is generated -->\nafter\n"
        "<!-- generated: zoo all -->\n<!-- end of what is generated -->\nend"
    )
    made = report.regenerated(text, MANIFEST, Path("nowhere"))
    assert made.startswith("before\n<!-- generated: table cifar -->\n\n| data set")
    assert made.endswith("<!-- end of what is generated -->\nend") and "old" not in made
    assert "after" in made and "`cct_cifar10_htm.pth.tar`" in made
    assert report.regenerated(made, MANIFEST, Path("nowhere")) == made
    lines = cells_of(made)
    assert ["CIFAR-10", "HTM", "97.57", "–", "–", "–", "not evaluated"] in lines


@pytest.mark.parametrize("block", ["table nothing", "figure cifar"])
def test_a_block_of_what_there_is_not(block):
    text = f"<!-- generated: {block} -->\n<!-- end of what is generated -->"
    with pytest.raises(DataError, match="allowed: zoo all, study NAME, and table or training of"):
        report.regenerated(text, MANIFEST, Path("nowhere"))


def test_render_makes_pages_and_documents(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    for record in example():
        records.update_record(results, MANIFEST, record.table, lambda _, r=record: r)
    monkeypatch.setattr(reproduce, "MANIFEST", tmp_path / "weights" / "zoo.yaml")
    (tmp_path / "README.md").write_text(
        "<!-- generated: training cifar -->\n<!-- end of what is generated -->\n"
    )
    words = ["--render", "--results", str(results), "--manifest", str(MANIFEST.path)]
    assert cli.run(reproduce.main, words) == 0
    assert f"changed: {tmp_path / 'README.md'}" in capsys.readouterr().out
    assert "97.48 ± 0.16" in (tmp_path / "README.md").read_text()
    assert (results / "all.html").exists() and (results / "imagenet.md").exists()
    assert cli.run(reproduce.main, words) == 0
    assert "changed" not in capsys.readouterr().out


# Small things


@pytest.mark.parametrize(
    ("values", "least"),
    [([97.5], 1.0), ([82.7, 83.6], 1.0), ([5.0, 97.0], 1.0), ([-0.1, 0.1], 0.4), ([0.0], 0.4)],
)
def test_axes_hold_their_values_and_have_round_ticks(values, least):
    axis = make_axis(values, least, ["HTM"])
    assert axis.low < min(values) and max(values) < axis.high
    assert axis.high - axis.low >= least
    assert 2 <= len(axis.ticks) <= 6
    for tick in axis.ticks:
        assert axis.low <= tick <= axis.high
        assert float(f"{tick:.{axis.decimals}f}") == pytest.approx(tick)


def test_the_example_has_every_status():
    found = {row.status for record in example() for row in record.rows.values()}
    assert found == {
        *(records.REPRODUCED, records.DIFFERS, records.SKIPPED, records.EVALUATED),
        *(records.PARTIAL, records.NOT_YET),
    }
    assert set(OURS) < {name for record in example() for name in asdict(record)["rows"]}
