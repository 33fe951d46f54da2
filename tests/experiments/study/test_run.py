"""Studies: trainings in real runs and real processes, and their records."""

import os
import shlex
import signal

import pytest

from experiments.config.reading import load_config
from experiments.errors import ConfigError
from experiments.study import __main__ as study
from experiments.study.records import study_records
from experiments.training.distributed import ONE_PROCESS
from experiments.training.metrics import read_metrics
from experiments.training.run import Run
from tests.helpers.commands import ended, finished, started, wait_until
from tests.helpers.runs_helper import HTM, write_config
from tests.helpers.study_helper import TINY, record_of, runner_of, write_study


def words_of(folder, path, *more):
    places = ["--output", str(folder / "runs"), "--results", str(folder / "results")]
    return ["--study", str(path), *places, *more]


def test_a_training_is_the_trainers_own_and_leaves_its_record(tmp_path, capsys):
    path = write_study(tmp_path)
    study.main(words_of(tmp_path, path, "--run", "HTM/2"))
    store = study_records(tmp_path / "results", "tiny")
    (record,) = store.read()
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
    records = store.read()
    assert [r.variant for r in records] == ["HTM", "mask"]
    assert records[1].substitutions == ["released mask"]
    assert records[1].loss != records[0].loss
    # which the trainer alone would resume by the paper's rules
    about = (tmp_path / "runs" / "tiny" / "mask" / "seed2" / "README.md").read_text()
    command = shlex.split(about.split("`")[1])
    assert command[:3] == ["python", "-m", "experiments.study"] and command[5:7] == [
        *("--run", "mask/2")
    ]
    capsys.readouterr()
    study.main(command[3:])
    assert "all 2 epochs are done already" in capsys.readouterr().out


def test_finished_trainings_are_not_repeated(tmp_path):
    path = write_study(tmp_path)
    runner = runner_of(tmp_path, path)
    assert len(runner.missing()) == 6
    runner.records.keep(record_of(runner.study, "HTM", 1, 50.0))
    assert [training.name for training in runner.missing()] == [
        *("plain/1", "mask/1"),
        *("plain/2", "HTM/2", "mask/2"),
    ]
    for seeds in ([1, 2], [3]):  # one mean speaks of one setting
        write_study(tmp_path, seeds=seeds)
        changed = runner_of(tmp_path, path, **{"schedule.lr": "0.9"})
        with pytest.raises(ConfigError, match="HTM/1 with other settings"):
            changed.missing()


def test_a_part_of_a_study(tmp_path, capsys):
    """`--only` and `--seed` train what they name, and leave the page to the whole study."""
    path = write_study(tmp_path)
    store = study_records(tmp_path / "results", "tiny")
    study.main(words_of(tmp_path, path, "--only", "mask,plain", "--seed", "2", "--jobs", "2"))
    assert {(r.variant, r.seed) for r in store.read()} == {("plain", 2), ("mask", 2)}
    first, *lines = capsys.readouterr().out.splitlines()
    assert "0 of 2 trainings are done" in first and "seedN/log.txt" in first
    assert sorted(line.partition(":")[0] for line in lines) == ["mask/2", "plain/2"]
    assert not (store.path.parent / "README.md").exists()
    for words, expected in (
        (("--only", "plain, VTM"), "--only: got 'VTM'; allowed: plain, HTM, mask"),
        (("--seed", "3"), "--seed: got '3'; allowed: 1, 2"),
        (("--seed", "1", "--run", "HTM/1"), "--seed: has no meaning with --run"),
    ):
        with pytest.raises(ConfigError, match=expected):
            study.main(words_of(tmp_path, path, *words))


def test_the_same_training_is_taken_from_another_study(tmp_path):
    first = runner_of(tmp_path, write_study(tmp_path))
    first.records.keep(record_of(first.study, "HTM", 1, 51.0))
    variants = {"none": {}, "same": {"set": {"horizontal": HTM}}}
    path = write_study(tmp_path, name="other", variants=variants, plain="none", seeds=[1])
    second = runner_of(tmp_path, path)
    assert [training.name for training in second.missing()] == ["none/1"]
    (record,) = second.records.read()
    assert (record.study, record.variant, record.top1) == ("other", "same", 51.0)
    assert record.taken_from == "tiny"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_study_resumes(tmp_path, number):
    """Real processes, two at a time: the result is that of a study that nobody stopped."""
    base = {"data": {**TINY["data"], "batch_size": 32}, "schedule": {"epochs": 6}}
    path = write_study(tmp_path, seeds=[1], config=str(write_config(tmp_path, "base", **base)))
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def words(folder):
        return ("-m", "experiments.study", *words_of(folder, path, "--jobs", "2"))

    code, _, err = finished(*words(whole))
    assert (code, err) == (0, "")
    process = started(*words(cut), start_new_session=True)
    wait_until(lambda: [*cut.glob("runs/tiny/*/seed1/checkpoints/step-*.pt")], process)
    os.killpg(process.pid, number) if number == signal.SIGKILL else process.send_signal(number)
    code, *_ = ended(process)
    assert code == (75 if number == signal.SIGTERM else -number)
    store = study_records(cut / "results", "tiny")
    assert len(store.read()) < 3
    if number == signal.SIGTERM and store.path.exists():
        assert "of 3 trainings are done" in (store.path.parent / "README.md").read_text()
    code, _, err = finished(*words(cut))
    assert (code, err) == (0, "")
    ours, theirs = store.read(), study_records(whole / "results", "tiny").read()
    assert {(r.variant, r.top1, r.loss) for r in ours} == {
        (r.variant, r.top1, r.loss) for r in theirs
    }
    assert len(ours) == 3
    if number == signal.SIGTERM:
        assert max(record.parts for record in ours) == 2
