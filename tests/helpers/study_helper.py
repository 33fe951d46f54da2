"""A small study for the tests of studies, and records of trainings that nobody did."""

import yaml

from experiments.study.plan import read_study
from experiments.study.records import StudyRecord
from experiments.study.run import Runner
from tests.helpers.runs_helper import HTM, write_config

TINY = {
    "data": {"train_split": "tune_validation", "val_split": "tune_train[:285]"},
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


def study_record(**values):
    """A record of a training that nobody did."""
    default = {
        "differences": {},
        "substitutions": [],
        "top5": 99.0,
        "loss": 0.5,
        "epochs": 2,
        "steps": 4,
        "train_images": 285,
        "val_images": 285,
        "top1_by_epoch": {"2": values["top1"]},
        "statistics": {},
        "seconds": 2.0,
        "cpu_seconds": 1.0,
        "parts": 1,
        "images_per_second": 300.0,
        "identity": "i",
        "command": "python -m experiments.study",
        "hardware": "a processor",
        "versions": {"torch": "2"},
        "commit": "abc",
        "time": "2026-11-25T00:00:00+00:00",
    }
    return StudyRecord(**{**default, **values})


def record_of(study, variant, seed, top1):
    """The same for a training of a study."""
    return study_record(
        study=study.name,
        variant=variant,
        seed=seed,
        top1=top1,
        differences=study.differences(study.variants[variant]),
        statistics={"htm/layer1/mixed_share": 0.5, "htm/layer1/tokens_mixed": 3.0},
        identity=study.identity(study.variants[variant], seed),
    )


def runner_of(folder, path, **overrides):
    """The runner of a study file, as the command makes it, with its folders inside `folder`."""
    study = read_study(path)
    command = ["-m", "experiments.study", "--study", str(path)]
    return Runner(study, command, [], overrides, folder / "runs" / study.name, folder / "results")
