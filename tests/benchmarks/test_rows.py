"""What the rows share, and a smoke run of each row."""

import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import pretended, report, solver, steps
from benchmarks import row as shared
from benchmarks.__main__ import main as run_all
from benchmarks.direct import DirectModel
from benchmarks.faults import RESULTS as RELIABILITY
from benchmarks.gpu import parts as gpu
from benchmarks.pairing import peak_extra_bytes
from benchmarks.row import RESULTS, Row, Settings
from benchmarks.steps import Steps, Workload, time_steps
from benchmarks.timing import Timing, added, interleaved, ratio
from experiments import cli
from experiments.config.reading import load_config
from experiments.errors import DataError
from experiments.models.build import build_model
from experiments.provenance import ROOT
from tests.helpers.memory_helper import MIB, make_temporaries
from tests.helpers.others_warnings import forks

TINY = Workload("CCT-7/3×1", 4, quick=True)


def test_actions_take_turns():
    order = []
    actions = {name: lambda name=name: order.append(name) for name in "AB"}
    found = interleaved(actions, rounds=3, warm_up=1)
    assert "".join(order) == "AB" + "AB" + "BA" + "AB"
    assert {name: len(timing.seconds) for name, timing in found.items()} == {"A": 3, "B": 3}
    interleaved(actions, rounds=2, least_seconds=1e-3)
    assert len(order) > 20, "fast actions are called several times per value"


def test_ratios():
    slow, fast = Timing((2.0, 40.0, 3.0)), Timing((1.0, 10.0, 1.5))  # one round was disturbed
    found = ratio(slow, fast)
    assert found["ratio"] == 2
    assert 2 <= found["low"] <= found["ratio"] <= found["high"] <= 4
    assert ratio(slow, slow) == {"ratio": 1, "low": 1, "high": 1}
    assert added(slow, fast).seconds == (3, 50, 4.5)
    quartiles = {"lower_quartile": 2.5, "upper_quartile": 21.5}
    assert slow.record() == {"seconds": 3, **quartiles, "rounds": 3}


def test_peak_memory_counts_temporaries_of_torch_and_numpy():
    found = peak_extra_bytes(make_temporaries, 16, 8)
    assert found is not None and 23.5 <= found / MIB <= 25.5


def record(row, time, values, hardware="A CPU, 2 threads", quick=False):
    origin = {"command": "x", "hardware": hardware, "versions": {}, "commit": None, "time": time}
    load = {"cores": 2, "threads": 2, "load_before": 0.0, "load_after": 0.0}
    return shared.Measurement(row=row, quick=quick, values=values, **load, **origin)


def test_the_newest_full_record_of_each_row_counts(tmp_path):
    records = shared.records(tmp_path)
    for one in (
        record("pairing", "2026-01-02T00:00:00", {"n": 4}, "B"),
        record("pairing", "2026-01-01T00:00:00", {"n": 1}),
        record("steps", "2026-01-01T01:00:00", {"n": 2}),
        record("steps", "2026-01-01T02:00:00", {"n": 3}),
        record("pairing", "2026-01-03T00:00:00", {"n": 5}, quick=True),
    ):
        records.keep(one)
    assert len(records.read()) == 4, "a row measured again on the same day replaces its record"
    found = shared.latest(tmp_path)
    assert {name: one.values["n"] for name, one in found.items()} == {"pairing": 4, "steps": 3}
    with records.path.open("a") as file:
        file.write('{"row": "pairing"}\n')
    with pytest.raises(DataError, match=r"records\.jsonl, line 5: .*values: Field required"):
        shared.latest(tmp_path)


def test_documents_are_those_of_the_records(tmp_path):
    """The committed pages are what `python -m benchmarks.report` makes of the committed records."""
    names = ("README.md", "docs/performance.md", "docs/reliability.md")
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    for name in names:
        text = (ROOT / name).read_text(encoding="utf-8")
        changed = re.sub(
            r"(<!-- generated: benchmark \S+ -->\n).*?(<!-- end)", r"\1\2", text, flags=re.S
        )
        assert changed != text
        (tmp_path / name).write_text(changed)
    report.update(tmp_path, shared.latest(RESULTS), shared.latest(RELIABILITY))
    for name in names:
        expected = (ROOT / name).read_text(encoding="utf-8")
        assert (tmp_path / name).read_text(encoding="utf-8") == expected, (
            "python -m benchmarks.report"
        )
    for path in (tmp_path / "docs" / "figures").iterdir():
        assert path.read_bytes() == (ROOT / "docs" / "figures" / path.name).read_bytes()


def test_readme_s_figures_are_those_of_the_newest_records():
    """Read here from the lines themselves."""
    newest = {}
    for folder in (RESULTS, RELIABILITY):
        for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            if not one["quick"] and one["time"] >= newest.get(one["row"], one)["time"]:
                newest[one["row"]] = one
    text = report.in_short(shared.latest(RESULTS), shared.latest(RELIABILITY))
    for model in newest["steps"]["values"]["models"]:
        (line,) = [one for one in text.splitlines() if one.startswith(f"| {model['model']}")]
        for cell, name in zip(line.split("|")[2:5], ("HTM", "VTM", "HVTM"), strict=True):
            found = [float(number) for number in re.findall(r"[\d.]+", cell)]
            over = model["over_plain"].get(name)  # Swin has no VTM
            assert found == [round(over[key], 3) for key in ("ratio", "low", "high") if over]
    cases = sorted(c["speed_up"]["ratio"] for c in newest["solver"]["values"]["cases"])
    assert f"{cases[0]:.1f} to {cases[-1]:.1f} times as fast as lapx" in text
    for model in newest["saliency"]["values"]["models"]:
        first, second = model["speed_up"]["ratio"], model["step_ratio"]["ratio"]
        assert f"{first:.0f} times as fast as from gradients" in text
        assert f"step {second:.2f} times ({model['model']}, batch {model['batch']})" in text
    kills = [newest[f"kills-{processes}"]["values"] for processes in (1, 2)]
    survived, total = (sum(kill[key] for kill in kills) for key in ("survived", "total"))
    assert f"same bytes: {survived} of {total}." in text


def test_what_a_model_has_not_and_what_a_record_has_not():
    """Swin has no VTM and no direct form, and records from before it do not have it."""
    kept = []
    settings = Settings(quick=True, keep=lambda values: kept.append(len(values["models"])))
    values = steps.measure(settings)
    assert kept == [1, 2, 3], "each model is kept as soon as it is measured"
    text = report.in_short({"steps": record("steps", "2026-01-01T00:00:00", values)}, {})
    (line,) = [line for line in text.splitlines() if "Swin-T" in line]
    assert [cell.strip() for cell in line.split("|")[3:5]] == ["–", "–"]
    rows = [one for one in steps.tables(values).splitlines() if "Swin-T" in one]
    assert [one.split("|")[2].strip() for one in rows] == ["plain", "HTM"]
    old = {"models": [model for model in values["models"] if model["model"] != "Swin-T"]}
    targets = {target.name: target for target in steps.targets(old)}
    assert targets["2. step, Swin-T, B=16, HTM"].measured is None


def test_lapx_is_timed_itself_and_finds_the_same_total(monkeypatch):
    """On the same gains, and nothing of ours around it."""
    seen, solve = [], solver.lap.lapjvr
    monkeypatch.setattr(
        solver.lap, "lapjvr", lambda cost, **o: seen.append(cost) or solve(cost, **o)
    )
    values = solver.measure(Settings(quick=True))
    costs = [-solver.gains(kind, 16, quick=True).double().numpy() for kind in solver.KINDS]
    times = len(seen) // len(costs)
    assert times > 2 and len(values["cases"]) == len(costs)
    for number, cost in enumerate(seen):
        assert (cost == costs[number // times]).all()
    monkeypatch.setattr(solver.lap, "lapjvr", lambda cost, **options: solve(-cost, **options))
    with pytest.raises(AssertionError, match="both are exact"):
        solver.measure(Settings(quick=True))


MEASURED = re.compile(
    r"\d[\d,.]*(?: × | ?(?:times|points?|ms|µs|s|min|MiB|GFLOP|images/s)\b)"
    r"|\d[\d.]* ?%|\d+ of \d+|± ?\d|\b\d\.\d{3}\b"
)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("README.md", {"95%"}),
        ("docs/performance.md", {"95%", "1%", "3%", "5%"}),  # two of a test below, and a target
    ],
)
def test_no_measured_figure_is_typed_by_hand(name, known):
    """Outside of the generated blocks and of code, numbers are settings and targets alone."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"<!-- generated: .*?<!-- end of what is generated -->", "", text, flags=re.S)
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    found = {match[0] for match in MEASURED.finditer(" ".join(text.split()))}
    assert found <= known, "let a block of a record say it"


def test_the_page_s_shares_of_parameters_and_arithmetic():
    """ScoreNet's part of the parameters, and what 160 more keys and values cost (CIFAR-100)."""
    plain, htm = (
        build_model(load_config(ROOT / "configs" / f"cct_7-3x1_cifar100_{name}.yaml"), 100)
        for name in ("baseline", "HTM")
    )
    count = sum(parameter.numel() for parameter in htm.parameters())
    scorenet = sum(parameter.numel() for parameter in htm.scorenets.parameters())
    assert 0 < scorenet / count < 0.01
    with FlopCounterMode(display=False) as flops:
        plain.backbone.train()(torch.zeros(1, 3, 32, 32))  # with dropout, all products are seen
    more = 2 * (160 * 2 * 256**2 + 256 * 160 * 2 * 256)  # a multiplication and an addition each
    assert 0.03 < more / flops.get_total_flops() < 0.04


def test_rows_that_were_measured_on_a_busy_machine_are_named():
    calm, busy = (record(name, "2026-01-01T00:00:00", {}) for name in ("pairing", "solver"))
    assert "other programs" not in report.sources([calm])
    busy = busy.model_copy(update={"load_before": 9.0})
    assert "while other programs ran: solver.\n" in report.sources([calm, busy])


def test_an_unknown_block_is_named():
    expected = r"got pairings; allowed: gpu, host, in-short, launches, pairing, "
    with pytest.raises(DataError, match=expected):
        report.block("pairings", {}, {})


CPU_ROWS = [row for row in report.ROWS if row not in gpu.ROWS]
# the two that start several Pythons take longest
MARKS = dict.fromkeys(("startup", "scaling"), pytest.mark.slow)
MARKS["host"] = pytest.mark.skipif(pretended.missing() is not None, reason=str(pretended.missing()))
SMOKE = [
    pytest.param(row, marks=MARKS.get(row.name, ()))
    for row in CPU_ROWS
    if row.name != "launches"  # test_launches.py
]


@forks
@pytest.mark.parametrize("row", SMOKE, ids=lambda row: row.name)
def test_smoke_run_of(row, unchanged_images):
    values = json.loads(json.dumps(row.measure(Settings(quick=True)), allow_nan=False))
    text = row.tables(values)
    assert text.count("|\n") >= 3 and row.targets(values)
    found = {row.name: record(row.name, "2026-01-01T00:00:00", values)}
    summary = report.summary(found)
    assert all(target.measured in summary for target in row.targets(values))
    assert "2 cores" in report.sources(found.values())


def test_an_interrupted_row_keeps_what_it_measured(tmp_path):
    def measure(settings):
        settings.keep({"first": 1})
        raise KeyboardInterrupt

    row = Row("cut", measure, lambda values: "", lambda values: [])
    options = shared.parser("cut", None).parse_args(["--results", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        shared.run(row, options, ["cut"])
    (found,) = shared.records(tmp_path).read()
    assert found.values == {"first": 1}


def test_mistakes_on_the_command_line_are_named(capsys):
    assert cli.run(run_all, ["step"]) == 2
    assert "'step' is not a row; " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        shared.parser("row", None).parse_args(["--rounds", "0"])
    assert "--rounds: got '0'; allowed: a whole number from 1" in capsys.readouterr().err


def test_variants_start_from_the_same_weights_and_all_forms_take_the_same_step():
    plain, both = (Steps(TINY, name).learner.model.backbone for name in ("plain", "HVTM"))
    for name, parameter in plain.state_dict().items():
        assert torch.equal(parameter, both.state_dict()[name]), name
    steps = {"ours": Steps(TINY, "HTM"), "direct": Steps(TINY, "HTM", wrap=DirectModel)}
    found = {}
    for name, step in steps.items():  # dropout draws other numbers where maps are stored
        for module in step.learner.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if type(module).__name__ == "DropPath":
                module.drop_prob = 0.0
        for _ in range(3):
            step()
        found[name] = step.statistics.read(step.learner.world)
    assert found["ours"]["loss"] == pytest.approx(found["direct"]["loss"], rel=1e-4)
    share = "htm/layer1/mixed_share"
    assert found["ours"][share] == found["direct"][share] > 0


def test_a_step_that_mixes_nothing_is_refused():
    step = Steps(TINY, "HTM")
    with torch.no_grad():
        for block in step.learner.model.backbone.blocks:
            block.attn.qkv.weight.zero_()  # maps become even
    with pytest.raises(RuntimeError, match="HTM mixed 0% of the samples"):
        time_steps({"step": step}, rounds=1, warm_up=0)
