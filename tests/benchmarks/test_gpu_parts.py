"""The parts of the GPU's benchmark, on a CPU."""

import functools
import json
import re
import time

import pytest
import torch

from benchmarks import report
from benchmarks import row as shared
from benchmarks.gpu import profile, steps
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.models import MODELS
from benchmarks.gpu.parts import SECONDS, Part, make_row, parts
from benchmarks.row import Settings
from experiments import cli
from experiments.provenance import ROOT
from tests.helpers.others_warnings import forks


@pytest.fixture
def measured(tmp_path, monkeypatch, unchanged_images):
    """Measures a part in its smallest form: its row, the figures, and what was kept on the way."""
    monkeypatch.setattr(steps, "VARIANTS", ("plain", "HVTM"))

    def measure(name, seconds=SECONDS):
        kept = []

        def keep(values):
            kept.append(json.loads(json.dumps(values, allow_nan=False)))

        part = make_row(name, parts(tmp_path)[name], seconds)
        values = part.measure(Settings(quick=True, keep=keep))
        return part, json.loads(json.dumps(values, allow_nan=False)), kept

    return measure


@pytest.mark.parametrize("mode", ["off", "on"])
def test_steps(measured, tmp_path, monkeypatch, mode):
    compiled = []
    traced = functools.partial(torch.compile, backend="eager")  # inductor takes minutes

    def seen(*words, **options):
        compiled.append(words)
        return traced(*words)

    monkeypatch.setattr(torch, "compile", seen)
    row, values, kept = measured(f"cct-{mode}")
    assert bool(compiled) == (mode == "on")
    assert [list(one["variants"]) for one in kept[1::2]] == [["plain"], ["plain", "HVTM"]]
    for number, one in enumerate(kept):  # first the speed of a variant, then its profile
        *_, last = one["variants"].values()
        assert "images_per_second" in last and ("profile" in last) == (number % 2 == 1)
    plain, both = values["variants"]["plain"], values["variants"]["HVTM"]
    assert both["mixing"]["mixed_share"] > 0.1 and plain["mixing"] == {}
    assert 0 < both["issue_seconds"] < both["first_step_seconds"] + 1
    ratio = both["seconds"] / plain["seconds"]
    assert 0.2 * ratio < both["over_plain"]["ratio"] < 5 * ratio
    names = ("cct_7-3x1_cifar100_baseline", "cct_7-3x1_cifar100_HVTM")
    for name in names:
        assert 0 < (tmp_path / f"{name}-{mode}.json.gz").stat().st_size < profile.LARGEST_TRACE
        assert "aten::" in (tmp_path / f"{name}-{mode}.txt").read_text()
    assert row.tables(values).count("|\n") == 4
    measured_targets = [target.name for target in row.targets(values) if target.measured]
    # a CPU does not tell its peak memory
    assert {name.partition(".")[0] for name in measured_targets} == (
        {"7", "8"} if mode == "on" else set()
    )


def test_a_variant_that_fails_leaves_the_others(measured, monkeypatch, capsys):
    make_steps = steps.Steps

    def make(workload, name, world):
        if name == "HVTM":
            raise RuntimeError("no\nkernel")
        return make_steps(workload, name, world)

    monkeypatch.setattr(steps, "Steps", make)
    monkeypatch.setattr(steps, "VARIANTS", ("plain", "HVTM", "VTM"))
    row, values, _ = measured("cct-off")
    assert values["variants"]["HVTM"] == {"error": "RuntimeError: no kernel"}
    assert "profile" in values["variants"]["VTM"]
    assert "- HVTM failed: RuntimeError: no kernel" in row.tables(values)
    assert "HVTM: RuntimeError: no kernel" in capsys.readouterr().err
    monkeypatch.setattr(steps, "VARIANTS", ("HVTM",))
    with pytest.raises(RuntimeError, match="kernel"):
        measured("cct-off")  # nothing to compare with
    monkeypatch.setattr(steps, "interleaved", make)
    monkeypatch.setattr(steps, "VARIANTS", ("plain",))
    _, values, (kept,) = measured("cct-off")
    assert "error" in values["variants"]["plain"] and kept == values, "what failed is recorded too"


@forks
@pytest.mark.parametrize("model", MODELS)
def test_loading(measured, model):
    row, values, kept = measured(f"{model}-loading")
    assert "images_per_second" not in kept[1] and kept[1]["alone_images_per_second"] > 0
    assert values["images_per_second"] > 0 and 0 < values["time_share"] < 1
    for one in (kept[0], values):  # interrupted, and whole
        text = row.tables(one)
        assert ("JPEG" in text) == (model == "vit")
        assert ("steps from it" in text) == (one is values)
        assert [target.measured is not None for target in row.targets(one)] == (
            [one is values] if model == "cct" else []
        )


def test_an_epoch_of_a_whole_training(measured, tmp_path):
    row, values, _ = measured("epoch")
    (epoch,) = values["epochs"]  # the first does not count
    assert 0 < epoch["waited_seconds"] < epoch["training_seconds"] < epoch["seconds"]
    assert (values["images"], values["evaluated"]) == (16, 8)
    assert row.tables(values).count("|\n") == 3 and not list(tmp_path.iterdir())


def test_ceilings(measured):
    row, values, _ = measured("ceilings")
    assert min(values.values()) > 0 and row.tables(values).count("|\n") == 5


@pytest.mark.parametrize("part", parts())
def test_parts_without_figures_are_shown_as_not_measured(part):
    row = make_row(part, parts()[part])
    assert all(target.measured is None and not target.reached for target in row.targets({}))
    lines = [line for line in report.summary({}).splitlines() if f"`{row.command}`" in line]
    assert len(lines) == len(row.targets({}))


def test_a_part_that_runs_out_of_time_keeps_what_it_has(measured, capsys):
    row, values, kept = measured("cct-on", seconds=0.01)
    assert values == {} and not kept, "an empty record would replace one with figures"
    assert row.tables(values) == "Nothing was measured in time.\n"

    def measure(settings, found):
        found["first"] = 1
        while True:
            try:  # as compilers do
                time.sleep(10)
            except Exception:
                continue

    part = make_row("slow", Part(measure, lambda values: ""), seconds=0.2)
    assert part.measure(Settings()) == {"first": 1}
    assert "stopped after 0.2 s; what was measured is kept" in capsys.readouterr().err


def test_a_command_records_its_part_beside_the_others(tmp_path):
    words = ["--device", "cpu", "--quick", "--results", str(tmp_path), "--files", str(tmp_path)]
    for part, seconds in (("ceilings", "100"), ("epoch", "100"), ("ceilings", "1e-6")):
        main([part, *words, "--seconds", seconds])
    found = shared.records(tmp_path).read()
    assert [one.row for one in found] == ["gpu-ceilings", "gpu-epoch"]
    assert found[0].values, "a command without time for anything leaves the record as it was"


def test_idle_time_of_the_device():
    spans = [(2, 6), (0, 4), (10, 11), (20, 22.5)]
    assert profile.busy_share(spans) == pytest.approx((6 + 1 + 2.5) / 22.5)
    assert profile.busy_share([]) == 0
    assert profile.gap_after([4, 6, 30], [0, 2, 10, 20]) == (6 + 4) / 2
    assert profile.gap_after([], [1]) == 0


def test_mistakes_on_the_command_line_are_named(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, expected in (
        (["cct-on"], "error: benchmarks.gpu: torch finds no CUDA device"),
        (["cct-on", "--device", "cpu"], "allowed without --quick: cuda"),
        (["epoch", "--device", "cpu", "--quick", "--seconds", "0"], "got 0.0; allowed: above 0"),
    ):
        assert cli.run(main, words) == 2
        assert expected in capsys.readouterr().err


def test_the_page_names_every_part():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert set(re.findall(r"python -m benchmarks\.gpu ([a-z-]+)", text)) >= {*parts()}
