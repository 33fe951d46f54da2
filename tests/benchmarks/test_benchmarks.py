"""The benchmarks' own machinery, and a smoke run of each row."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import cost_model, gpu, harness, learners, profiles, records, report, rows
from benchmarks.__main__ import main as run_all
from benchmarks.direct import DirectModel
from benchmarks.harness import Settings
from benchmarks.memory import peak_extra_bytes
from benchmarks.timing import Timing, added, interleaved, ratio
from experiments import cli
from experiments.errors import ConfigError, DataError
from experiments.provenance import ROOT
from experiments.training.distributed import ONE_PROCESS
from tests.helpers.memory_helper import MIB, make_temporaries
from tests.helpers.others_warnings import forks


def test_actions_take_turns():
    order = []
    actions = {name: lambda name=name: order.append(name) for name in "AB"}
    found = interleaved(actions, rounds=3, warm_up=1)
    assert "".join(order) == "AB" + "AB" + "BA" + "AB"
    assert {name: len(timing.seconds) for name, timing in found.items()} == {"A": 3, "B": 3}


def test_fast_actions_are_called_often():
    calls = []
    interleaved({"fast": lambda: calls.append(0)}, rounds=2, least_seconds=1e-3)
    assert len(calls) > 10


def test_ratios():
    slow, fast = Timing((2.0, 40.0, 3.0)), Timing((1.0, 10.0, 1.5))  # one round was disturbed
    found = ratio(slow, fast)
    assert found["ratio"] == 2
    assert 2 <= found["low"] <= found["ratio"] <= found["high"] <= 4
    assert ratio(slow, slow) == {"ratio": 1, "low": 1, "high": 1}
    assert added(slow, fast).seconds == (3, 50, 4.5)
    assert slow.record() == {
        "seconds": 3,
        "lower_quartile": 2.5,
        "upper_quartile": 21.5,
        "rounds": 3,
    }


def test_peak_memory_counts_temporaries_of_torch_and_numpy():
    found = peak_extra_bytes(make_temporaries, 16, 8)
    assert found is not None and 23.5 <= found / MIB <= 25.5


def curve(gain, assignment, exponent):
    def seconds(value):
        return {"seconds": value}

    points = []
    for batch in (64, 128, 256, 512, 1024):
        of_gain, of_assignment = gain * batch**2 * 256, assignment * batch**exponent
        timings = {"gain": of_gain, "assignment": of_assignment, "ours": of_gain + of_assignment}
        points.append(
            {
                "batch": batch,
                "patches": 256,
                "timings": {name: seconds(value) for name, value in timings.items()},
            }
        )
    return {"curve": points}


def test_cost_model_finds_the_constants():
    model = cost_model.fit(curve(2e-11, 3e-9, 2.5))
    assert model.gain == pytest.approx(2e-11)
    assert model.assignment == pytest.approx(3e-9)
    assert model.exponent == pytest.approx(2.5)
    assert model.worst_factor == pytest.approx(1)
    training = cost_model.TRAININGS[0]
    shows = model.shows_from(training, 0.05)
    assert model.share(shows, training) == pytest.approx(0.05, rel=1e-2)
    step = shows / training.images_per_second
    assert model.seconds(shows, training.patches) == pytest.approx(0.05 * step, rel=1e-2)


def event(name, start, length, device=DeviceType.CUDA):
    span = SimpleNamespace(start=start, end=start + length)
    return SimpleNamespace(name=name, time_range=span, device_type=device)


def test_timelines():
    work = [
        event("void cutlass::Kernel<gemm>", 10.04, 4),
        event("Memcpy DtoH (Device -> Pinned)", 20, 1),
        event("fmha_cutlassF_f32_aligned", 12, 6),
        event("triton_poi_fused_add_0", 30, 2.5),
    ]
    lines = profiles.timeline(work, start=10)
    assert lines == ["0 4 0", "2 6 1", "10 1 2", "20 2.5 3"]
    bars = profiles.read_timeline(lines)
    assert [profiles.CATEGORIES[kind] for _, _, kind in bars] == list(profiles.CATEGORIES)
    assert profiles.busy_share(bars) == pytest.approx((8 + 1 + 2.5) / 22.5)
    assert profiles.busy_share([]) == 0


def test_records_keep_the_newest_full_entry_of_each_row(tmp_path):
    def entry(time, value, hardware="A CPU (R), 2 threads", quick=False):
        return {"time": time, "hardware": hardware, "quick": quick, "values": value}

    path = records.write("pairing", entry("2026-01-01T00:00:00", 1), tmp_path)
    assert path.name == "a-cpu-r-2-threads-2026-01-01.json"
    records.write("steps", entry("2026-01-01T01:00:00", 2), tmp_path)
    records.write("steps", entry("2026-01-01T02:00:00", 3), tmp_path)
    records.write("pairing", entry("2026-01-02T00:00:00", 4, "B"), tmp_path)
    records.write("pairing", entry("2026-01-03T00:00:00", 5, quick=True), tmp_path)
    found = records.latest(tmp_path)
    assert {row: one["values"] for row, one in found.items()} == {"pairing": 4, "steps": 3}
    assert found["pairing"]["file"] == "b-2026-01-02.json"
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"broken\.json: cannot read the results of benchmarks"):
        records.latest(tmp_path)
    (tmp_path / "broken.json").write_text('{"pairing": {}}')
    with pytest.raises(DataError, match="expected rows of benchmarks"):
        records.latest(tmp_path)


def test_documents_are_those_of_the_records(tmp_path):
    """What is committed is what `python -m benchmarks.report` makes of the committed records."""
    (tmp_path / "figures").mkdir()
    for name in report.DOCUMENTS:
        shutil.copy(ROOT / "docs" / name, tmp_path / name)
    report.update(tmp_path, records.RESULTS)
    for name in report.DOCUMENTS:
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text()
    made = {path.name for path in (tmp_path / "figures").iterdir()}
    assert all((ROOT / "docs" / "figures" / name).is_file() for name in made)


def test_an_unknown_block_is_named():
    text = "<!-- benchmark: pairings -->\n<!-- end of benchmark -->"
    with pytest.raises(DataError, match=r"page\.md: benchmark: got pairings; allowed: cost-by"):
        report.regenerated(text, {}, "page.md")


def test_rows_without_records_stand_as_not_measured():
    text = report.summary({})
    for row in ("7. CCT-7/3×1, HTM + VTM", "8. ViT-B/16, VTM", "9. CCT-7/3×1", "10. peak memory"):
        lines = [line for line in text.splitlines() if line.startswith(f"| {row}")]
        assert lines and all("not measured" in line for line in lines)


# the two that start several Pythons take longest
SMOKE = [
    pytest.param(row, marks=pytest.mark.slow if row.name in ("startup", "scaling") else ())
    for row in rows.CPU_ROWS
]


@forks
@pytest.mark.parametrize("row", SMOKE, ids=lambda row: row.name)
def test_smoke_run_of(row, tmp_path):
    values = json.loads(json.dumps(row.measure(Settings(quick=True)), allow_nan=False))
    text = row.tables(values)
    assert text.count("|\n") >= 3 and row.targets(values)
    entry = {
        "time": "2026-01-01T00:00:00",
        "hardware": "x",
        "file": "x",
        "commit": None,
        "command": "x",
        "cores": 2,
        "load_before": 0.0,
        "load_after": 0.0,
        "quick": True,
        "values": values,
    }
    summary = report.summary({row.name: entry})
    assert all(target.measured in summary for target in row.targets(values))
    assert "2 cores" in report.provenance({row.name: entry})


@forks
@pytest.mark.parametrize(
    "models, variants",
    [
        (gpu.QUICK_WORKLOADS[:1], ("plain", "HVTM")),
        pytest.param(gpu.QUICK_WORKLOADS, gpu.VARIANTS, marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_smoke_run_of_the_gpu_rows_on_a_cpu(models, variants, monkeypatch):
    monkeypatch.setattr(gpu, "QUICK_WORKLOADS", models)
    monkeypatch.setattr(gpu, "VARIANTS", variants)
    values = gpu.measure(Settings(quick=True))
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["left_out"] == [] and len(values["models"]) == len(models)
    for model in values["models"]:
        assert set(model["variants"]) == set(variants)
        assert model["variants"]["HVTM"]["mixing"]["mixed_share"] > 0.1
        bars = profiles.read_timeline(model["variants"]["HVTM"]["profile"]["timeline"])
        assert len(bars) > 100 and {kind for _, _, kind in bars} >= {0, 1, 3}
        checkpointing = model["checkpointing"]
        norms = [checkpointing[name]["gradient_norm"] for name in ("with", "without")]
        assert norms[0] == pytest.approx(norms[1]) and norms[0] > 0
    assert values["models"][0]["data"]["steps"] == 4
    text = gpu.ROW.tables(values)
    assert "activation checkpointing" in text and "from the loader" in text
    numbers = {target.row.partition(".")[0] for target in gpu.ROW.targets(values)}
    assert numbers == {"7", "8", "9", "10"}
    assert len(report.figures.step_timelines(values).axes) == 2 * len(models)


@forks
def test_gpu_rows_for_which_time_runs_out_leave_what_was_measured(monkeypatch, tmp_path, capsys):
    """The second model finds no time; the record of the first was written before it."""
    kept = []

    def keep(values):
        kept.append(json.loads(json.dumps(values, allow_nan=False)))
        if len(kept) == 1:
            monkeypatch.setattr(gpu.time, "monotonic", lambda: 1e9)

    monkeypatch.setattr(gpu, "VARIANTS", ("plain", "HVTM"))
    values = gpu.measure(Settings(quick=True, keep=keep))
    assert [len(one["models"]) for one in kept] == [1, 2]
    assert set(kept[0]["models"][0]["variants"]) == {"plain", "HVTM"} and not kept[0]["left_out"]
    assert values["models"][1]["variants"] == {}
    left_out = ["ViT-B/16, plain", "ViT-B/16, HVTM", "ViT-B/16, checkpointing"]
    assert values["left_out"] == left_out
    assert f"Left out for want of time: {'; '.join(left_out)}." in gpu.ROW.tables(values)
    assert not any("ViT-B/16" in target.row for target in gpu.ROW.targets(values))
    assert len(report.figures.step_timelines(values).axes) == 2


def test_gpu_rows_without_any_time_are_told_as_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "LIMIT_SECONDS", 0)
    words = ["--quick", "--device", "cpu", "--results", str(tmp_path)]
    assert cli.run(gpu.main, words) == 0
    assert "Left out for want of time: CCT-7/3×1, plain" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    entry = json.loads(path.read_text())["gpu"]
    assert entry["command"] == "python -m benchmarks.gpu --quick --device cpu"
    assert len(report.figures.step_timelines(entry["values"]).axes) == 1


def test_a_row_that_is_cut_off_leaves_what_it_has_kept(tmp_path):
    def measure(settings):
        settings.keep({"first": 1})
        raise KeyboardInterrupt

    row = harness.Row("cut", measure, lambda values: "", lambda values: [])
    options = harness.parser("cut", None).parse_args(["--results", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        harness.run(row, options)
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["cut"]["values"] == {"first": 1}


def test_a_number_of_rounds_must_be_one(capsys):
    with pytest.raises(SystemExit):
        harness.parser("row", None).parse_args(["--rounds", "0"])
    assert "--rounds: got '0'; allowed: a whole number from 1" in capsys.readouterr().err


def test_what_a_training_keeps_is_counted_on_a_device_with_or_without_an_index():
    learner = learners.make_learner(gpu.QUICK_WORKLOADS[0], "plain", ONE_PROCESS)
    parameters = sum(p.numel() * p.element_size() for p in learner.model.parameters())
    for device in (torch.device("cpu"), torch.device("cpu", 0)):
        learner.device = device
        assert gpu._kept_bytes(learner) >= parameters


def test_another_gradient_with_checkpointing_is_no_success():
    def target(norm):
        model = {
            "model": "CCT-7/3×1",
            "batch": 4,
            "variants": {},
            "over_plain": {},
            "checkpointing": {
                "without": {"gradient_norm": 2.0, "peak_bytes": 20},
                "with": {"gradient_norm": norm, "peak_bytes": 10},
            },
        }
        (found,) = gpu.ROW.targets({"models": [model], "left_out": []})
        return found.reached

    assert target(2.001)
    assert not target(1.9) and not target(0.0)


def test_gpu_rows_need_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.run(gpu.main, []) == 2
    assert capsys.readouterr().err.startswith("error: benchmarks.gpu: torch finds no CUDA device")
    assert cli.run(gpu.main, ["--device", "cpu"]) == 2
    assert "allowed without --quick: cuda" in capsys.readouterr().err


def test_unknown_rows_are_named():
    with pytest.raises(ConfigError, match=r"'step' is no row; .*steps"):
        run_all(["step"])


def test_variants_start_from_the_same_weights_and_all_forms_from_the_same_step():
    workload = learners.Workload("CCT-7/3×1", 4, quick=True)
    plain, both = (
        learners.make_learner(workload, name, ONE_PROCESS).model.backbone
        for name in ("plain", "HVTM")
    )
    for name, parameter in plain.state_dict().items():
        assert torch.equal(parameter, both.state_dict()[name]), name
    steps = {
        "ours": learners.Steps(workload, learners.make_learner(workload, "HTM", ONE_PROCESS)),
        "direct": learners.Steps(
            workload, learners.make_learner(workload, "HTM", ONE_PROCESS, DirectModel)
        ),
    }
    for step in steps.values():  # dropout draws other numbers where maps are stored
        for module in step.learner.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if type(module).__name__ == "DropPath":
                module.drop_prob = 0.0
        for _ in range(3):
            step()
    losses = [step.measured()["loss"] for step in steps.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert steps["ours"].mixing()["mixed_share"] == steps["direct"].mixing()["mixed_share"] > 0


def test_a_step_that_mixes_nothing_is_refused():
    workload = learners.Workload("CCT-7/3×1", 4, quick=True)
    step = learners.Steps(workload, learners.make_learner(workload, "HTM", ONE_PROCESS))
    with torch.no_grad():
        for block in step.learner.model.backbone.blocks:
            block.attn.qkv.weight.zero_()  # maps become even
    with pytest.raises(RuntimeError, match="HTM mixed 0% of the samples"):
        learners.time_steps({"step": step}, rounds=1, warm_up=0)
