"""`--compare RUN...`: the table of runs, their curves with bands over seeds, and mistakes.

Dimensions: P points of a curve.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from experiments.config.reading import load_config
from experiments.config.schema import as_plain
from experiments.documents import figures as style
from experiments.training.folder import CONFIG_FILE, FINAL_WEIGHTS
from experiments.training.metrics import METRICS_FILE
from experiments.visualize import __main__ as visualize
from experiments.visualize import horizontal, vertical
from experiments.visualize.curves import (
    QUANTITIES,
    band,
    compare,
    group_by_seed,
    markdown,
    names_of,
    read_history,
)
from tests.helpers import picture_cases
from tests.helpers.commands import fails, outcome
from tests.helpers.runs_helper import HTM, VTM, small_config


def write_run(tmp_path, name, seed=1, steps=(10, 20), more=None, **sections):
    """A run folder with a row of training and one of validation after each step."""
    config = small_config(tmp_path, name, seed=seed, **sections)
    folder = Path(config.output)
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(as_plain(config)))
    rows = []
    for number, step in enumerate(steps, start=1):
        place = {"epoch": number, "step": step, "steps": 10}
        values = {"loss": float(step + seed), **((more or {}).get(step, {}))}
        rows += [{"split": "train", **place, **values}]
        rows += [{"split": "validation", **place, "top1": 90.0 + seed + number, "loss": None}]
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def histories(*folders):
    return [read_history(folder) for folder in folders]


# The table


def test_rows_say_what_the_runs_recorded(tmp_path):
    plain = write_run(tmp_path, "plain", steps=(10, 20, 30))
    mixed = {"htm/layer1/mixed_share": 0.5, "htm/layer1/easy_share": 0.5}
    mixed |= {"vtm/layer1/remembered_tokens": 3.0}
    tokens = {10: 4.0, 20: 8.0, 30: 6.0}
    more = {step: {**mixed, "htm/layer1/tokens_mixed": value} for step, value in tokens.items()}
    htm = write_run(tmp_path, "htm", 2, tokens, more, horizontal=HTM)
    first, second = compare(histories(plain, htm))
    assert (first["top1"], first["mixed_share"]) == (94.0, None)
    assert (second["name"], second["folder"], second["top1"]) == ("htm", str(htm), 95.0)
    assert (second["mixed_share"], second["tokens_mixed"]) == (0.5, pytest.approx(6.0))
    assert (second["tokens_remembered"], second["epochs"], second["steps"]) == (3, 3, 30)
    table, _, legend = markdown([first, second]).partition("\n\n")
    assert "over the whole run" in legend and "in an easy sample" in legend
    assert "\n\n" not in markdown([first])
    table = table.splitlines()
    assert len({len(line) for line in table}) == 1, "the columns are aligned"
    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == [
        *("plain", "94.00%"),
        *("-", "-", "-"),
    ]


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    variants = [tmp_path / name / "seed1" for name in ("plain", "HTM-VTM")]
    assert names_of(variants) == ["plain", "HTM-VTM"]
    assert names_of([*variants, tmp_path / "plain" / "seed2"]) == [
        *("plain/seed1", "HTM-VTM/seed1", "plain/seed2"),
    ]
    assert names_of([tmp_path / "a" / "b"]) == ["b"]
    assert names_of([tmp_path / "a" / "b", tmp_path / "c"]) == ["b", "c"]
    assert names_of([tmp_path / "a", tmp_path / "a" / "a"]) == ["a", "a/a"]


# Curves


def test_runs_that_differ_by_their_seed_alone_form_a_band(tmp_path):
    shares = {"htm/layer0/mixed_share": 0.2, "htm/layer1/mixed_share": 0.4}
    more = dict.fromkeys((10, 20, 30), shares)
    folders = [
        write_run(tmp_path, "mixed_seed1", 1, more=more, horizontal=HTM),
        write_run(tmp_path, "plain", 1),
        write_run(tmp_path, "mixed_seed4", 4, steps=(10, 20, 30), more=more, horizontal=HTM),
        write_run(tmp_path, "other_rho", 4, horizontal={**HTM, "rho": 0.1}),
    ]
    mixed, plain, other = group_by_seed(histories(*folders))
    assert [g.label for g in (mixed, plain, other)] == ["mixed (2 seeds)", "plain", "other_rho"]
    loss, validation, top1, share, tokens = (band(mixed, quantity) for quantity in QUANTITIES)
    np.testing.assert_allclose(loss.epochs, [1, 2])  # only where both runs are
    np.testing.assert_allclose(loss.mean, [12.5, 22.5])
    np.testing.assert_allclose(loss.deviation, [np.sqrt(4.5)] * 2)
    np.testing.assert_allclose(top1.mean, [93.5, 94.5])
    np.testing.assert_allclose(share.mean, [30, 30])  # per cent, over both layers
    assert validation is None and tokens is None
    assert band(plain, QUANTITIES[0]).deviation is None
    (tmp_path / "b").mkdir()
    again = write_run(tmp_path / "b", "plain", horizontal=HTM)
    labels = [group.label for group in group_by_seed(histories(folders[1], again))]
    assert labels == ["output/plain", "b/output/plain"], "names alone would not tell them apart"


# The command


@pytest.fixture
def drawn(monkeypatch):
    """Which run each panel of a picture is of; few pixels, as others test what is drawn."""
    monkeypatch.setattr(style, "DPI", 30)
    found = []
    for module, name in ((horizontal, "draw_rows"), (vertical, "draw_tokens")):
        inner = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, inner=inner: (found.append(args[1].run), inner(*args))
        )
    return found


def test_the_table_the_curves_and_the_pictures_of_finished_runs(tmp_path, capsys, drawn):
    folders = []
    for name, sections in (
        ("plain", {}),
        ("unfinished", {"horizontal": {**HTM, "rho": 0.1}}),
        ("htm", {"horizontal": HTM}),
        ("vtm", {"vertical": VTM}),
    ):
        folder = write_run(tmp_path, name, **sections)
        folders.append(folder)
        if name != "unfinished":
            config = load_config(folder / CONFIG_FILE)
            picture_cases.weights_of(config, 10, folder / FINAL_WEIGHTS)
    out = tmp_path / "out"
    code, said, err = outcome(capsys, visualize, "--compare", *folders, "--out", out)
    assert (code, err, drawn) == (0, "", ["htm", "vtm"])
    table = json.loads((out / "comparison.json").read_text())
    assert [row["name"] for row in table] == ["plain", "unfinished", "htm", "vtm"]
    assert said.startswith((out / "comparison.md").read_text())
    listed = [line.strip() for line in said.partition("comparison:\n")[2].splitlines()]
    assert listed == [
        str(out / name)
        for name in (
            *("comparison.json", "comparison.md"),
            *("training_curves.png", "training_curves.svg"),
            *("tokenmixup.png", "tokenmixup.svg"),
        )
    ]
    assert all((out / name).stat().st_size > 300 for name in listed)
    with Image.open(out / "tokenmixup.png") as image:
        image.verify()
    assert f"final weights    {folders[0] / FINAL_WEIGHTS}" in said


def test_without_the_data_of_the_runs_there_are_still_the_table_and_the_curves(tmp_path, capsys):
    data = {"dataset": "", "root": str(tmp_path / "missing")}
    folder = write_run(tmp_path, "htm", horizontal=HTM, data=data, model={"num_classes": 10})
    config = load_config(folder / CONFIG_FILE)
    picture_cases.weights_of(config, 10, folder / FINAL_WEIGHTS)
    code, said, err = outcome(capsys, visualize, "--compare", folder, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert said.splitlines()[-1].startswith("no picture of what was mixed: ")
    assert (tmp_path / "out" / "training_curves.svg").exists()
    assert not (tmp_path / "out" / "tokenmixup.png").exists()


def test_mistakes_are_one_line(tmp_path, capsys):
    one, two = (write_run(tmp_path, name) for name in ("one", "two"))
    early = write_run(tmp_path, "early", steps=())
    damaged = write_run(tmp_path, "damaged", seed=3)
    (damaged / METRICS_FILE).write_text("no JSON\n{}\n")
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    for words, expected in (
        ([], "--compare: run folders must follow"),
        (["a", "--checkpoint", "x"], "--checkpoint: unknown option"),
        ([tmp_path], "holds no run (looked for config.yaml)"),
        ([early], "no epoch was finished and evaluated yet"),
        ([damaged], "line 1: is not JSON"),
        ([one, two], "same experiment with the same seed 1"),
        ([one, one], "same experiment with the same seed 1"),
        ([one, "--out", blocked], f"--out: cannot write to {blocked}"),
        ([one, "--out", blocked / "inner"], f"--out: cannot write to {blocked / 'inner'}"),
    ):
        quiet = "--out" not in words  # the table comes first
        assert expected in fails(capsys, visualize, "--compare", *words, quiet=quiet), words
