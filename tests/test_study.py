"""Studies: what one is, its trainings in real runs, its records, its page."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from runs_helper import HTM, write_config

from experiments import cli, report, study
from experiments.config_file import load_config
from experiments.distributed import ONE_PROCESS
from experiments.errors import ConfigError, DataError
from experiments.metrics import read_metrics
from experiments.runs import Run
from experiments.studies import page
from experiments.studies.comparison import compare
from experiments.studies.page import markdown, table, verdict, write_report
from experiments.studies.plan import read_study
from experiments.studies.queue import Queue
from experiments.studies.study_records import StudyRecord, keep_record, read_records, records_path

ROOT = Path(__file__).parent.parent
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
TINY = {
    "data": {"train_split": "tune_validation", "val_split": "tune_validation"},
    "schedule": {"epochs": 2},
}


def write_study(folder, name="tiny", **content):
    """A study of the small digits: plain, HTM, and HTM with the released mask."""
    given = {
        "title": "Tiny",
        "about": "a question",
        "config": str(write_config(folder, **TINY)),
        "plain": "plain",
        "seeds": [1, 2],
        "variants": {
            "plain": {},
            "HTM": {"set": {"horizontal": HTM}},
            "mask": {"like": "HTM", "with": ["released mask"]},
        },
        **content,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


def record_of(study, variant, seed, top1, **more):
    values = {
        "study": study.name,
        "variant": variant,
        "seed": seed,
        "differences": study.differences(study.variants[variant]),
        "substitutions": [],
        "top1": top1,
        "top5": 99.0,
        "loss": 0.5,
        "epochs": 2,
        "steps": 4,
        "train_images": 285,
        "val_images": 285,
        "top1_by_epoch": {"2": top1},
        "statistics": {"htm/layer1/mixed_share": 0.5, "htm/layer1/tokens_mixed": 3.0},
        "seconds": 2.0,
        "cpu_seconds": 1.0,
        "parts": 1,
        "images_per_second": 300.0,
        "identity": study.identity(study.variants[variant], seed),
        "command": "python -m experiments.study",
        "hardware": "a processor",
        "versions": {"torch": "2"},
        "commit": "abc",
        "time": "2026-11-25T00:00:00+00:00",
        **more,
    }
    return StudyRecord(**values)


# What a study is


def test_variants_build_on_each_other(tmp_path):
    found = read_study(write_study(tmp_path))
    assert [(v.name, seed) for v, seed in found.runs()] == [
        *(("plain", 1), ("HTM", 1), ("mask", 1)),
        *(("plain", 2), ("HTM", 2), ("mask", 2)),
    ]
    plain, htm, mask = found.variants.values()
    assert found.config(plain, 7).horizontal is None and found.config(plain, 7).seed == 7
    assert found.config(htm, 1).horizontal.tau == HTM["tau"]
    assert found.config(mask, 1) == found.config(htm, 1)
    assert (mask.substitutions, mask.against) == (("released mask",), "HTM")
    assert found.identity(mask, 1) != found.identity(htm, 1) != found.identity(htm, 2)
    assert found.differences(mask, "HTM") == {} and found.differences(plain) == {}
    assert found.differences(htm)["horizontal.tau"] == HTM["tau"]


def test_a_section_is_switched_off_and_null_is_a_value(tmp_path):
    variants = {
        "HTM": {"set": {"horizontal": HTM}},
        "off": {"like": "HTM", "set": {"horizontal": None}},
        "all": {"like": "HTM", "set": {"horizontal": {"scorenet": None}}},
    }
    found = read_study(write_study(tmp_path, variants=variants, plain="off"))
    assert found.config(found.variants["off"], 1).horizontal is None
    assert found.config(found.variants["all"], 1).horizontal.scorenet is None
    assert found.differences(found.variants["all"])["horizontal.scorenet"] is None


def test_what_a_training_is_does_not_depend_on_where_its_data_lie(tmp_path):
    found = read_study(write_study(tmp_path))
    htm = found.variants["HTM"]
    same = {"data.root": "elsewhere", "data.workers": "3", "logging.interval": "7"}
    assert found.identity(htm, 1, same) == found.identity(htm, 1)
    assert found.identity(htm, 1, {"horizontal.tau": "0.31"}) != found.identity(htm, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"titel": "x"}, ["'titel': unknown key", "title"]),
        ({"seeds": [1, 1]}, ["seeds: got [1, 1]", "each once"]),
        ({"seeds": []}, ["seeds"]),
        ({"plain": "plan"}, ["plain: got 'plan'", "the nearest is plain"]),
        ({"variants": {"plain": {"wiht": []}}}, ["variants.plain: 'wiht': unknown key"]),
        ({"variants": {"plain": {"with": ["magic"]}}}, ["got 'magic'", "released mask"]),
        ({"variants": {"plain": {"like": "HTM"}}}, ["like: got 'HTM'", "before it"]),
        (
            {"variants": {"plain": {"set": {"data": {"bach": 1}}}}},
            ["plain.set: 'data.bach': unknown key"],
        ),
        (
            {"variants": {"plain": {"set": {"schedule": {"epochs": 0}}}}},
            ["variants.plain", "schedule.epochs", "got 0"],
        ),
        ({"variants": {"plain": {}, "x": {"like": "plain"}}}, ["variants.x", "same training as"]),
        (
            {"variants": {"plain": {}, "plain!": {"set": {"data": {"vflip": 0.5}}}}},
            ["share the run folder"],
        ),
        ({"variants": {"plain": {"against": "y"}}}, ["against: got 'y'"]),
        ({"about": 3}, ["about: got 3"]),
        ({"config": "nowhere.yaml"}, ["nowhere.yaml: cannot read"]),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, change, words):
    with pytest.raises(ConfigError) as caught:
        read_study(write_study(tmp_path, **change))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--study: missing"),
        (["--jobs", "0"], "--jobs: got '0'"),
        (["--run", "HTM/9"], "allowed: a seed of 1, 2"),
        (["--run", "nobody/1"], "a name of plain, HTM, mask"),
        (["--run", "HTM/1", "--jobs", "2"], "no meaning with --run"),
        (["--report", "--jobs", "2"], "no meaning with --report"),
        (["--seed", "3"], "--seed: unknown option"),
        (["--report"], "holds no record yet"),
    ],
)
def test_a_wrong_command_line(tmp_path, capsys, words, message):
    if words:
        words = ["--study", str(write_study(tmp_path)), *words]
    assert cli.run(study.main, [*words, "--results", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


# The shipped studies


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_are_valid_and_say_how_to_run_them(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = read_study(path)
    head = path.read_text().split("\n\n")[0]
    assert f"python -m experiments.study --study configs/studies/{path.name}" in head
    assert len(found.seeds) >= 3 or path.stem.endswith("_tuning")


@pytest.mark.parametrize("name", ["fashion_mnist", "released"])
def test_values_are_chosen_on_other_images_and_seeds(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    search, found = (read_study(f"configs/studies/{n}.yaml") for n in (f"{name}_tuning", name))
    assert not set(search.seeds) & set(found.seeds)
    evaluated = {found.config(v, 1).data.val_split for v in found.variants.values()}
    for variant in search.variants.values():
        data = search.config(variant, 1).data
        assert data.val_split not in evaluated and data.train_split not in evaluated
        assert data.val_split.startswith(("tune_validation", "train["))


def test_the_digits_are_the_quickstarts(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = read_study("configs/studies/digits.yaml")
    names = {"plain": "baseline", "HTM": "HTM", "VTM": "VTM", "HTM + VTM": "HVTM"}
    for variant, name in names.items():
        ours = found.config(found.variants[variant], 42)
        theirs = load_config(f"configs/digits_{name}.yaml")
        kept = {"device": "cpu", "output": None, "logging": ours.logging}
        kept["checkpoint"] = ours.checkpoint
        assert dataclasses.replace(ours, output=None) == dataclasses.replace(theirs, **kept)


# Trainings


def words_of(folder, path, *more):
    places = ["--output", str(folder / "runs"), "--results", str(folder / "results")]
    return ["--study", str(path), *places, *more]


def test_a_training_is_the_trainers_own_and_leaves_its_record(tmp_path, capsys):
    path = write_study(tmp_path)
    study.main(words_of(tmp_path, path, "--run", "HTM/2"))
    (record,) = read_records(records_path(tmp_path / "results", "tiny"))
    folder = tmp_path / "runs" / "tiny" / "HTM" / "seed2"
    rows = [row for row in read_metrics(folder) if row["split"] == "validation"]
    assert (record.variant, record.seed, record.epochs) == ("HTM", 2, 2)
    assert record.top1 == pytest.approx(rows[-1]["top1"], abs=1e-4)
    assert record.top1_by_epoch.keys() == {"1", "2"}
    assert record.differences["horizontal.tau"] == HTM["tau"]
    assert record.cpu_seconds > 0 and record.seconds > 0 and record.parts == 1
    assert record.command.startswith(f"python -m experiments.study --study {path} --run HTM/2")
    assert record.commit and record.versions["torch"] and record.hardware
    # the ordinary trainer gives the same
    overrides = {"seed": "2", "output": str(tmp_path / "plain")}
    for key, value in HTM.items():
        overrides[f"horizontal.{key}"] = str(value)
    Run(load_config(tmp_path / "small.yaml", overrides), ONE_PROCESS).fit()
    same = [row for row in read_metrics(tmp_path / "plain") if row["split"] == "validation"]
    assert [row["loss"] for row in same] == [row["loss"] for row in rows]
    # and the released mask gives another
    study.main(words_of(tmp_path, path, "--run", "mask/2"))
    records = read_records(records_path(tmp_path / "results", "tiny"))
    assert [r.variant for r in records] == ["HTM", "mask"]
    assert records[1].substitutions == ["released mask"]
    assert records[1].loss != records[0].loss


def queue_of(folder, path, **overrides):
    return Queue(read_study(path), overrides, folder / "runs", folder / "results", 1, print)


def test_what_is_done_is_not_done_again(tmp_path):
    path = write_study(tmp_path)
    queue = queue_of(tmp_path, path)
    assert len(queue.missing()) == 6
    keep_record(queue.path, queue.study, record_of(queue.study, "HTM", 1, 50.0))
    assert [training.name for training in queue.missing()] == [
        *("plain/1", "mask/1"),
        *("plain/2", "HTM/2", "mask/2"),
    ]
    changed = queue_of(tmp_path, path, **{"schedule.lr": "0.9"})
    with pytest.raises(ConfigError, match="HTM/1 with other settings"):
        changed.missing()


def test_the_same_training_is_taken_from_another_study(tmp_path):
    first = queue_of(tmp_path, write_study(tmp_path))
    keep_record(first.path, first.study, record_of(first.study, "HTM", 1, 51.0))
    variants = {"none": {}, "same": {"set": {"horizontal": HTM}}}
    path = write_study(tmp_path, name="other", variants=variants, plain="none", seeds=[1])
    second = queue_of(tmp_path, path)
    assert [training.name for training in second.missing()] == ["none/1"]
    (record,) = read_records(second.path)
    assert (record.study, record.variant, record.top1) == ("other", "same", 51.0)
    assert record.taken_from == "tiny"


def test_a_damaged_record_is_named(tmp_path):
    queue = queue_of(tmp_path, write_study(tmp_path))
    keep_record(queue.path, queue.study, record_of(queue.study, "plain", 1, 50.0))
    good = queue.path.read_text()
    for bad in ("{", good.replace("50.0", '"50"', 1), good.replace('"top1"', '"top7"', 1)):
        queue.path.write_text(good + bad.rstrip() + "\n")
        with pytest.raises(DataError, match=r"records.jsonl, line 2: is damaged"):
            read_records(queue.path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_study_that_was_cut_off_goes_on(tmp_path, number):
    """Real processes, two at a time: the result is that of a study that nobody stopped."""
    base = {"data": {**TINY["data"], "batch_size": 32}, "schedule": {"epochs": 6}}
    path = write_study(tmp_path, seeds=[1], config=str(write_config(tmp_path, "base", **base)))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert finished(started(words_of(whole, path, "--jobs", "2"))) == (0, "")
    process = started(words_of(cut, path, "--jobs", "2"))
    while not list(cut.glob("runs/tiny/*/seed1/checkpoints/step-*.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, number) if number == signal.SIGKILL else process.send_signal(number)
    code, _ = finished(process)
    assert code == (75 if number == signal.SIGTERM else -number)
    records = records_path(cut / "results", "tiny")
    assert len(read_records(records)) < 3
    assert finished(started(words_of(cut, path, "--jobs", "2"))) == (0, "")
    ours, theirs = read_records(records), read_records(records_path(whole / "results", "tiny"))
    assert [(r.variant, r.top1, r.loss) for r in ours] == [
        (r.variant, r.top1, r.loss) for r in theirs
    ]
    assert len(ours) == 3
    if number == signal.SIGTERM:
        assert max(record.parts for record in ours) == 2


@pytest.mark.slow
def test_a_training_that_fails_is_named(tmp_path):
    path = write_study(tmp_path, seeds=[1], set={"schedule": {"lr": 1.0e30}})
    code, error = finished(started(words_of(tmp_path, path)))
    assert code == 3
    assert "plain/1 ended with status 3, see" in error
    log = tmp_path / "runs" / "tiny" / "plain" / "seed1" / "log.txt"
    assert "is not finite" in log.read_text()


def started(words):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.study", *words],
        cwd=ROOT,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finished(process):
    """Exit code and what was written to stderr."""
    _, error = process.communicate()
    return process.returncode, error


# The page


def example(folder, **figures):
    """A study with records of the given variants: a list of top-1 by seed."""
    found = read_study(write_study(folder, seeds=[1, 2, 3]))
    return compare(
        found,
        [
            record_of(found, variant, seed, top1)
            for variant, values in figures.items()
            for seed, top1 in enumerate(values, start=1)
            if top1 is not None
        ],
    )


def test_the_page_leaves_nothing_out_and_says_what_is_missing(tmp_path):
    comparison = example(tmp_path, plain=[90.0, 91.0, 92.0], HTM=[91.5, None, 93.5])
    text = markdown(comparison)
    assert "**5 of 9 trainings are done**" in text
    lines = [[c.strip() for c in row.split("|")[1:-1]] for row in table(comparison).splitlines()]
    assert lines[2][:4] == ["plain", "3", "91.00 ± 1.00", "–"]
    assert lines[3][:4] == ["HTM", "2", "92.50 ± 1.41", "+1.50 [+1.50, +1.50]"]
    assert lines[4][:4] == ["mask", "0", "–", "–"] and lines[4][4] == "HTM"
    for figure in ("90.00", "91.00", "92.00", "91.50", "93.50"):
        assert figure in page.every_training(comparison)
    assert "python -m experiments.study --study" in text and "a processor" in text
    assert "commits: abc" in text and "torch 2" in text and "2026-11-25" in text
    assert "beside plain: `horizontal.layers: [1]" in text


def test_a_complete_study_says_so_and_its_words_follow_the_intervals(tmp_path):
    noise = example(tmp_path, plain=[90.0, 91.0, 92.0], HTM=[91, 90, 92.5], mask=[80, 81, 82.1])
    assert "All 9 trainings are done." in markdown(noise)
    words = verdict(noise)
    assert "to plain: 1 of 2 intervals exclude 0: mask (−9.97)" in words
    assert "“against”: 1 of 1 intervals exclude 0: mask (−10.13)" in words
    none = verdict(example(tmp_path, plain=[90.0, 91.0, 92.0], HTM=[91, 90, 92.5]))
    assert "to plain: 0 of 1 intervals exclude 0." in none


def test_records_of_what_the_study_no_longer_has_do_not_count(tmp_path):
    found = read_study(write_study(tmp_path))
    stray = dataclasses.replace(record_of(found, "HTM", 1, 99.0), variant="gone")
    comparison = compare(found, [stray, record_of(found, "HTM", 1, 50.0)])
    assert len(comparison.records) == 1 and "99.00" not in markdown(comparison)


def test_report_writes_page_and_pictures_always_the_same(tmp_path):
    queue = queue_of(tmp_path, write_study(tmp_path))
    for seed, top1 in ((1, 50.0), (2, 52.0)):
        keep_record(queue.path, queue.study, record_of(queue.study, "plain", seed, top1))
        keep_record(queue.path, queue.study, record_of(queue.study, "HTM", seed, top1 + seed))
    paths = write_report(queue.study, tmp_path / "results")
    contents = [path.read_bytes() for path in paths]
    assert [path.name for path in paths] == ["README.md", "study.svg", "study.png"]
    assert contents[1].startswith(b"<?xml") and contents[2].startswith(b"\x89PNG")
    assert [p.read_bytes() for p in write_report(queue.study, tmp_path / "results")] == contents


def test_documents_show_a_study(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = read_study("configs/studies/digits.yaml")
    for seed, variant in ((1, "plain"), (1, "HTM")):
        record = record_of(found, variant, seed, 97.25)
        keep_record(records_path(tmp_path, "digits"), found, record)
    text = "a\n<!-- generated: study digits -->\nold\n<!-- end of what is generated -->\nz\n"
    manifest = report_manifest()
    made = report.regenerated(text, manifest, tmp_path)
    assert "**2 of 40 trainings are done**" in made and "97.25" in made and "old" not in made
    assert report.regenerated(made, manifest, tmp_path) == made
    with pytest.raises(DataError, match="got study nothing"):
        report.regenerated(text.replace("digits", "nothing"), manifest, tmp_path)


def report_manifest():
    from experiments.zoo_manifest import read_manifest

    return read_manifest(ROOT / "weights" / "zoo.yaml")


def test_the_pages_of_the_repository_are_those_of_its_records(monkeypatch):
    monkeypatch.chdir(ROOT)
    for file in sorted((ROOT / "results" / "studies").glob("*/records.jsonl")):
        name = file.parent.name
        found = read_study(f"configs/studies/{name}.yaml")
        made = markdown(compare(found, read_records(file)))
        assert (file.parent / "README.md").read_text() == made, f"{name}: --report makes it anew"
        for record in read_records(file):
            identity = found.identity(found.variants[record.variant], record.seed)
            assert record.identity == identity, f"{name}: {record.variant}/{record.seed}"
        assert all(json.loads(line) for line in file.read_text().splitlines())
