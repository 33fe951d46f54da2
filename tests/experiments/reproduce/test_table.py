"""Tables in Markdown, on a terminal and in the documents: always those of the records."""

import json
import sys

import pytest

from experiments import cli
from experiments.documents.markdown import fill_blocks
from experiments.errors import DataError
from experiments.provenance import ROOT
from experiments.reproduce import __main__ as reproduce
from experiments.reproduce import table as tables
from experiments.reproduce.table import Line, makers, read_table
from tests.helpers.commands import fails
from tests.helpers.report_cases import MANIFEST, TRAINED, evaluated, keep_example, trained


@pytest.fixture
def example(tmp_path):
    return keep_example(tmp_path / "results")


def cells_of(text):
    """The cells of the lines of Markdown tables, without rules."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines if not set(line[0]) <= {"-", " "}]


# Judging


@pytest.mark.parametrize(
    ("row", "ours", "images", "status"),
    [
        ("cct_cifar10_htm", 97.57, 10000, "reproduced"),
        ("cct_cifar10_htm", 97.67, 10000, "reproduced"),
        ("cct_cifar10_htm", 97.47, 10000, "reproduced"),
        ("cct_cifar10_htm", 97.68, 10000, "differs"),
        ("cct_cifar10_htm", 97.46, 10000, "differs"),
        ("cct_cifar10_htm", 97.57, 9999, "part of the images"),
        ("ViT-B_16-224", 81.0, 50000, "evaluated"),
        ("ViT-B_16-224", 81.0, 12, "part of the images"),
    ],
)
def test_reproduced_is_within_a_tenth_of_a_point_on_all_images(row, ours, images, status):
    line = Line(MANIFEST.row(row), evaluated(row, ours, images), ())
    assert line.status == status
    published = line.row.published_top1
    assert line.difference == (None if published is None else pytest.approx(ours - published))


def test_mean_and_deviation_over_seeds():
    figures = {0: 97.3, 1: 97.52, 2: 97.61}
    row = MANIFEST.row("cct_cifar100_vtm")
    seeds = tuple(trained(row.name, seed, top1) for seed, top1 in figures.items())
    line = Line(row, None, seeds)
    assert line.training_cells()[3:] == ["97.48 ± 0.16", "0, 1, 2", "1510"]
    alone = Line(row, None, seeds[:1])
    assert alone.trained.std is None and alone.training_cells()[3] == "97.30"


def test_a_config_of_two_rows_shows_its_trainings_once(tmp_path):
    store = tables.study_records(tmp_path, tables.STUDY)
    store.keep(trained("ViT-B_16-224", 42, 80.0))
    assert MANIFEST.row("ViT-B_16-224").config == "vit_imagenet_baseline"
    (line,) = read_table(tmp_path, MANIFEST, "imagenet").trained
    assert line.row.name == "vit_imagenet_baseline"


# JSON


def test_the_json_holds_the_records(example):
    content = json.loads(tables.json_text(example[0]))
    assert (content["table"], content["tolerance"]) == ("cifar", 0.1)
    needed = {"published", "ours", "difference", "images", "hardware", "versions", "commit"}
    assert all({*needed, "command", "time", "reason"} <= row.keys() for row in content["rows"])
    htm = next(entry for entry in content["training"] if entry["name"] == "cct_cifar10_htm")
    assert htm["mean"] == pytest.approx(97.4767, abs=1e-3)
    assert [seed["seed"] for seed in htm["seeds"]] == sorted(TRAINED["cct_cifar10_htm"])
    assert htm["seeds"][0]["best_top1"] == pytest.approx(97.4)


# Markdown


def test_the_markdown_table_holds_the_figures_of_the_record(example):
    for table in example:
        lines = cells_of(tables.markdown_table(table))
        assert lines[0] == list(tables.HEAD)
        for cells, line in zip(lines[1:], table.lines, strict=True):
            published, ours = (
                "–" if v is None else f"{v:.2f}" for v in (line.row.published_top1, line.ours)
            )
            assert cells[:4] == [line.row.dataset.name, line.row.method, published, ours]
            assert cells[6] == line.status
    by_name = {tuple(line[:2]): line for line in cells_of(tables.markdown_table(example[0]))}
    assert by_name["CIFAR-10", "VTM"][4] == "−0.10"
    assert by_name["CIFAR-100", "HTM"][4] == "+0.02"


def test_the_page_in_markdown_tells_why_and_from_where(example):
    text = tables.markdown(example[0])
    assert "CIFAR-10, baseline: figure of the authors of CCT, 1500 epochs" in text
    assert "x<y> is not there" in text
    source = "python 3.11.7, torch 2.13.0, commit 0123456789ab"
    for precision, figures in (("evaluated in tf32, ", "HTM; "), ("", "seed 44: ")):
        (line,) = (x for x in text.splitlines() if f"NVIDIA H200, {precision}{source}" in x)
        assert figures in line and "`python -m experiments.reproduce --table cifar`" in line
    assert "97.48 ± 0.16" in text


# Terminals


@pytest.fixture
def shown(example, monkeypatch, capsys):
    """What a table looks like on a terminal of 80 columns, or in a pipe, with an environment."""

    def show(terminal, **environment):
        for name in ("NO_COLOR", "FORCE_COLOR", "TERM", "COLUMNS"):
            monkeypatch.delenv(name, raising=False)
        if terminal:
            environment["COLUMNS"] = "80"
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        reproduce._print(example[0])
        return capsys.readouterr().out

    return show


def test_colours_only_where_the_terminal_shows_them(shown):
    coloured = shown(True, TERM="xterm")
    assert "\x1b[32mreproduced" in coloured and "\x1b[31mdiffers" in coloured
    for quiet in ({"TERM": "dumb"}, {"TERM": "xterm", "NO_COLOR": "1"}):
        assert "\x1b[3" not in shown(True, **quiet)
    assert "\x1b" not in shown(False, TERM="xterm")
    assert "\x1b[32mreproduced" in shown(False, TERM="xterm", FORCE_COLOR="1")


def test_tables_fit_a_terminal_of_eighty_columns_and_stay_whole_in_a_pipe(shown):
    terminal, pipe = shown(True, TERM="dumb"), shown(False)
    assert max(map(len, terminal.splitlines())) <= 80 and "…" not in terminal
    for text in (terminal, pipe):
        words = " ".join(text.split()).replace("+", "")
        assert "CIFAR-10 HTM 97.57 97.57 0.00 10,000 reproduced" in words
        assert "97.48 ± 0.16" in words


# Documents


def test_the_documents_show_the_tables_of_the_records():
    for name in ("reproduce.md", "zoo.md"):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        again = fill_blocks(text, makers(MANIFEST, ROOT / "results"))
        assert text == again, f"{name}: run python -m experiments.reproduce --render"


def test_blocks_show_tables_trainings_and_the_zoo(tmp_path):
    keep_example(tmp_path)
    kinds = ("table cifar", "training cifar", "zoo all")
    text = "".join(
        f"<!-- generated: {kind} -->\nold\n<!-- end of what is generated -->\n" for kind in kinds
    )
    made = fill_blocks(text, makers(MANIFEST, tmp_path))
    assert "old" not in made and "97.48 ± 0.16" in made and "`cct_cifar10_htm.pth.tar`" in made
    lines = cells_of(made)
    assert ["CIFAR-10", "VTM", "97.78", "97.68", "−0.10", "10,000", "reproduced"] in lines
    # what one machine could not evaluate is no result
    assert ["CIFAR-100", "VTM", "83.54", "–", "–", "–", "not evaluated"] in lines


@pytest.mark.parametrize("kind", ["table", "training"])
def test_a_block_of_an_unknown_table(kind, tmp_path):
    text = f"<!-- generated: {kind} nothing -->\n<!-- end of what is generated -->"
    with pytest.raises(DataError, match=f"got {kind} nothing; allowed: {kind} of cifar, imagenet"):
        fill_blocks(text, makers(MANIFEST, tmp_path))


def test_render_makes_pages_and_documents(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    keep_example(results)
    monkeypatch.setattr(reproduce, "MANIFEST", tmp_path / "weights" / "zoo.yaml")
    (tmp_path / "README.md").write_text(
        "<!-- generated: training cifar -->\n<!-- end of what is generated -->\n"
    )
    words = ["--render", "--results", str(results), "--manifest", str(MANIFEST.path)]
    assert cli.run(reproduce.main, words) == 0
    assert f"changed: {tmp_path / 'README.md'}" in capsys.readouterr().out
    assert "97.48 ± 0.16" in (tmp_path / "README.md").read_text()
    assert (results / "cifar.html").exists() and (results / "imagenet.md").exists()
    assert cli.run(reproduce.main, words) == 0
    assert "changed" not in capsys.readouterr().out


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "x"
    assert "cannot" in fails(capsys, reproduce, "--render", "--results", place)
