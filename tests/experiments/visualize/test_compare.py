"""The table over runs, and the entry point that prints it."""

import json

import pytest
from PIL import Image

from experiments import cli, compare
from experiments.errors import DataError
from experiments.training import run as runs
from experiments.training.distributed import ONE_PROCESS
from experiments.training.metrics import METRICS_FILE
from experiments.visualize.tables import markdown, read_rows
from tests.helpers.runs_helper import HTM, VTM, small_config


def write_run(folder, rows):
    folder.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / METRICS_FILE).write_text(text)
    return folder


def train_row(step, seconds, **values):
    row = {"split": "train", "epoch": 1, "step": step, "steps": 10, "step_seconds": seconds}
    return {**row, "loss": 1.0, **values}


def validation_row(step, top1):
    return {"split": "validation", "epoch": 1, "step": step, "top1": top1}


def test_rows_say_what_the_runs_recorded(tmp_path):
    plain = write_run(
        tmp_path / "plain",
        [train_row(10, 9.0), train_row(20, 1.0), validation_row(20, 97.5), train_row(30, 1.0)],
    )
    mixed = {"htm/layer1/mixed_share": 0.5, "htm/layer1/easy_share": 0.5}
    mixed |= {"vtm/layer1/remembered_tokens": 3.0}
    htm = write_run(
        tmp_path / "htm",
        [
            train_row(10, 9.0, **mixed, **{"htm/layer1/tokens_mixed": 4.0}),
            train_row(20, 1.2, **mixed, **{"htm/layer1/tokens_mixed": 8.0}),
            train_row(30, 1.6, **mixed, **{"htm/layer1/tokens_mixed": 6.0}),
            validation_row(10, 50.0),
            validation_row(30, 96.25),
        ],
    )
    first, second = read_rows([plain, htm])
    assert (first.top1, first.relative_step_time, first.mixed_share) == (97.5, 1.0, None)
    assert second.top1 == 96.25
    assert second.step_seconds == pytest.approx(1.4)
    assert second.relative_step_time == second.step_seconds
    assert second.mixed_share == 0.5
    assert second.tokens_mixed == pytest.approx(6.0)
    assert second.tokens_remembered == 3
    assert (second.epochs, second.steps) == (1, 30)
    table, _, legend = markdown([first, second]).partition("\n\n")
    assert "over the whole run" in legend and "in an easy sample" in legend
    assert "\n\n" not in markdown([first])
    table = table.splitlines()
    assert len({len(line) for line in table}) == 1, "the columns are aligned"
    assert [cell.strip() for cell in table[2].split("|")[1:-1]][:3] == ["plain", "97.50%", "1.00 x"]


@pytest.mark.parametrize("rows", [[], [train_row(1, 1.0)], [validation_row(1, 50.0)]])
def test_a_folder_without_a_whole_run_is_named(tmp_path, rows):
    with pytest.raises(DataError, match="holds no run that was trained and evaluated"):
        read_rows([write_run(tmp_path / "run", rows)])


def test_the_entry_point_prints_writes_and_draws(tmp_path, capsys):
    folders = []
    for name, sections in (("plain", {}), ("both", {"horizontal": HTM, "vertical": VTM})):
        config = small_config(tmp_path, name, schedule={"epochs": 1}, **sections)
        runs.Run(config, ONE_PROCESS).fit()
        folders.append(config.output)
    capsys.readouterr()
    output = tmp_path / "comparison"
    assert cli.run(compare.main, [*folders, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    table = json.loads((output / "comparison.json").read_text())
    assert [row["name"] for row in table] == ["plain", "both"]
    assert table[1]["mixed_share"] > 0
    assert table[1]["tokens_remembered"] == 3
    assert (output / "comparison.md").read_text() in out
    for folder in folders:
        assert f"{folder}/checkpoints" in out
    assert str(output / "tokenmixup.png") in out
    with Image.open(output / "tokenmixup.png") as image:
        image.verify()


def test_help(capsys):
    assert cli.run(compare.main, ["--help"]) == 0
    assert "usage: python -m experiments.compare RUN..." in capsys.readouterr().out
