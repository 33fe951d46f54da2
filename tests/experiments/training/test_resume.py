"""A run that is interrupted anywhere resumes to the same bytes, from the newest good checkpoint."""

import dataclasses
import itertools
import json
import pkgutil
import random
import shutil

import pytest
import timm
import torch

from experiments.checkpoint import load_checkpoint, save_checkpoint
from experiments.errors import CheckpointError, ConfigError, SavedAndStopped
from experiments.training import run as runs
from experiments.training.distributed import ONE_PROCESS
from experiments.training.folder import RunFolder
from experiments.training.metrics import read_metrics
from tests.helpers import runs_helper
from tests.helpers.runs_helper import (
    BOTH,
    AtLook,
    final_bytes,
    rows_without_clock,
    small_config,
)
from tokenmixup import VerticalConfig

SECTIONS = {
    **BOTH,
    "schedule": {"epochs": 2},
    # 11 steps an epoch, and 4 batches of validation
    "data": {"train_split": "tune_validation", "batch_size": 25, "eval_batch_size": 100},
}


def fit(folder, stop=None, allow_changed=(), **sections):
    return runs_helper.fit(folder, "run", stop, allow_changed, **{**SECTIONS, **sections})


MIXUP = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1}
# for Mixup: 10 steps an epoch, all in one row
EVEN = {"data": {**SECTIONS["data"], "batch_size": 26}, "logging": {"interval": 50}}


def outcome(folder):
    """All that must not depend on where a run was interrupted."""
    newest = load_checkpoint(RunFolder(folder).saved()[0])
    return final_bytes(folder), rows_without_clock(folder), newest["progress"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return outcome(fit(tmp_path_factory.mktemp("undisturbed")))


@pytest.mark.parametrize("look", [1, 11, 13, 17, 30])
def test_a_run_that_stops_when_asked_goes_on_to_the_same_bytes(tmp_path, undisturbed, look):
    with pytest.raises(SavedAndStopped, match="the test: saved after step"):
        fit(tmp_path, AtLook(look))
    assert not (tmp_path / "output" / "run" / "final.safetensors").exists()
    assert json.loads((tmp_path / "output" / "run" / "heartbeat.json").read_text())["state"] == (
        "stopped"
    )
    torch.rand(3), random.random()  # whatever another process has drawn
    assert outcome(fit(tmp_path)) == undisturbed


def test_a_run_may_be_stopped_again_and_again(tmp_path, undisturbed, capsys):
    for _ in range(10):
        try:
            folder = fit(tmp_path, AtLook(7))
            break
        except SavedAndStopped:
            continue
    assert outcome(folder) == undisturbed
    assert "warning" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def switching(tmp_path_factory):
    """A run whose second epoch is without TokenMixup and Mixup."""
    sections = {"tokenmixup_off_epoch": 1, "mixup": {**MIXUP, "off_epoch": 1}, **EVEN}
    return sections, outcome(fit(tmp_path_factory.mktemp("switching"), **sections))


@pytest.mark.parametrize("look", [10, 17])  # at the end of the first epoch, and in the second
def test_a_run_resumes_to_the_same_bytes_around_the_epoch_of_a_switch(
    tmp_path, switching, capsys, look
):
    sections, undisturbed = switching
    with pytest.raises(SavedAndStopped):
        fit(tmp_path, AtLook(look), **sections)
    assert outcome(fit(tmp_path, **sections)) == undisturbed
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert ["TokenMixup off  Mixup off" in line for line in lines] == [False, True]
    rows = [row for row in undisturbed[1] if row["split"] == "train"]
    assert [(row["tokenmixup_on"], row["mixup_on"]) for row in rows] == [(1, 1), (0, 0)]
    own = [{n for n in row if n.startswith(("htm/", "vtm/", "scorenet_loss"))} for row in rows]
    assert len(own[0]) > 5 and not own[1]
    assert rows[1]["steps"] == 10 and rows[1]["loss"] > 0


def test_a_switch_is_what_a_person_does_who_goes_on_without(tmp_path):
    """VTM and Mixup off after an epoch, against the same stopped there and resumed without them."""
    on = {"horizontal": None, "mixup": MIXUP, **EVEN}
    off = on | {"vertical": None, "mixup": {"label_smoothing": 0.1}}
    by_hand = tmp_path / "by_hand"
    by_hand.mkdir()
    with pytest.raises(SavedAndStopped):
        fit(by_hand, AtLook(14), **on)  # in the last batch of the evaluation
    changed = [f"vertical.{field.name}" for field in dataclasses.fields(VerticalConfig)]
    changed += ["mixup.mixup_alpha", "mixup.cutmix_alpha"]
    expected = final_bytes(fit(by_hand, allow_changed=changed, **off))
    ends = {"tokenmixup_off_epoch": 1, "mixup": {**MIXUP, "off_epoch": 1}}
    assert final_bytes(fit(tmp_path, **on | ends)) == expected


class Crash(Exception):
    pass


@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("experiments.training.run:evaluate", 2),
        ("experiments.files:os.replace", 3),  # within the writing of a checkpoint
        ("experiments.files:os.fsync", 6),
        ("experiments.training.folder:save_checkpoint", 2),
        ("experiments.training.run:save_final_weights", 1),
        ("experiments.training.metrics:MetricsWriter.write", 7),
    ],
)
def test_a_crash_costs_no_more_than_the_steps_since_the_checkpoint(
    tmp_path, monkeypatch, undisturbed, where, call
):
    original, calls = pkgutil.resolve_name(where), itertools.count(1)

    def crashing(*arguments, **keywords):
        if next(calls) == call:
            raise Crash
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(where.replace(":", "."), crashing)
        with pytest.raises(Crash):
            fit(tmp_path, checkpoint={"every_steps": 4})
    assert outcome(fit(tmp_path, checkpoint={"every_steps": 4})) == undisturbed


@pytest.fixture
def cut(tmp_path):
    """A run that was stopped in its second epoch; it has two checkpoints."""
    with pytest.raises(SavedAndStopped):
        fit(tmp_path, AtLook(19))
    return tmp_path


def test_the_newest_whole_checkpoint_is_taken_and_damaged_ones_are_set_aside(
    cut, undisturbed, capsys
):
    newest, before = RunFolder(cut / "output" / "run").saved()
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    folder = fit(cut)
    told = capsys.readouterr().err
    assert f"{newest}: is damaged or cut off: its content does not match its checksum" in told
    assert f"resuming from the one before: {before}" in told
    assert newest.with_name(newest.name + ".damaged").read_bytes() == content
    assert outcome(folder) == undisturbed


def test_nothing_is_begun_anew_where_all_checkpoints_are_damaged(cut):
    saved = RunFolder(cut / "output" / "run").saved()
    for path in saved:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"all checkpoints of .* are damaged: to begin anew"):
        fit(cut)
    assert RunFolder(cut / "output" / "run").saved() == saved


def lost_checkpoints(folder):
    """Delete the checkpoints, as a person who needs the room; gives all files that stay."""
    shutil.rmtree(folder / "checkpoints")
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_without_checkpoints_is_never_begun_anew(tmp_path):
    folder = fit(tmp_path, schedule={"epochs": 1})
    left = lost_checkpoints(folder)
    for change in ({}, {"seed": 7}):
        with pytest.raises(
            ConfigError,
            match=r"holds final\.safetensors, but no checkpoint .*remove the run folder or choose",
        ):
            fit(tmp_path, schedule={"epochs": 1}, **change)
    kept = {path for path in left if path.name != ".lock"}
    assert kept and all(path.read_bytes() == left[path] for path in kept)


@pytest.mark.parametrize("every", [1, 2])
def test_an_unfinished_run_without_checkpoints_begins_anew_only_if_it_can_have_had_none(
    tmp_path, every
):
    sections = {"schedule": {"epochs": 3}, "checkpoint": {"every": every}}
    with pytest.raises(SavedAndStopped):
        fit(tmp_path, AtLook(34), **sections)  # in the third epoch, behind its first row
    folder = tmp_path / "output" / "run"
    assert read_metrics(folder)[-1]["epoch"] == 3
    left = lost_checkpoints(folder)
    if every == 1:  # there were two
        with pytest.raises(ConfigError, match=r"holds metrics\.jsonl up to epoch 3, but no check"):
            fit(tmp_path, **sections)
        assert (folder / "metrics.jsonl").read_bytes() == left[folder / "metrics.jsonl"]
    else:
        fit(tmp_path, **sections)
        steps = [row["step"] for row in read_metrics(folder) if row["split"] == "validation"]
        assert steps == [11, 22, 33]


def test_an_end_that_the_run_has_passed_is_refused(cut):
    folder = cut / "output" / "run"
    config = (folder / "config.yaml").read_bytes()
    fewer = {"allow_changed": ["schedule.epochs"], "schedule": {"epochs": 1}}
    with pytest.raises(
        ConfigError, match=r"^schedule\.epochs: the config's 1 epochs .* to epoch 2; allowed: 2 or"
    ):
        fit(cut, **fewer)
    assert (folder / "config.yaml").read_bytes() == config
    assert not (folder / "final.safetensors").exists()


def test_a_changed_config_is_refused_unless_its_keys_are_named(cut, capsys):
    changed = {"optimizer": {"weight_decay": 0.1}}
    with pytest.raises(ConfigError, match=r"optimizer\.weight_decay: 0\.05 there, 0\.1 now"):
        fit(cut, **changed)
    folder = fit(cut, allow_changed=["optimizer.weight_decay"], **changed)
    assert "resuming with another config: optimizer.weight_decay" in capsys.readouterr().err
    newest = load_checkpoint(RunFolder(folder).saved()[0])
    decays = {group["weight_decay"] for group in newest["optimizer"]["param_groups"]}
    assert decays == {0.0, 0.1}
    assert newest["config"]["optimizer"]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("others", "told"),
    [
        # also a package that a checkpoint of an earlier version does not list
        ({"torch": "2.0.0", "timm": None}, f"torch 2.0.0 there, {torch.__version__} now"),
        (
            {"timm": "0.9.0", "cuda": "9.9"},
            f"timm 0.9.0 there, {timm.__version__} now, cuda 9.9 there, "
            f"{torch.version.cuda or 'not installed'} now",
        ),
    ],
    ids=["torch", "timm and cuda"],
)
def test_a_run_that_resumes_under_other_versions_says_so(cut, undisturbed, capsys, others, told):
    newest = RunFolder(cut / "output" / "run").saved()[0]
    content = load_checkpoint(newest)
    assert {"torch", "timm", "tokenmixup"} <= content["versions"].keys()
    content["versions"] = {k: v for k, v in (content["versions"] | others).items() if v is not None}
    content["config"]["compile"] = False  # an earlier version's word for off
    save_checkpoint(newest, content)
    assert outcome(fit(cut)) == undisturbed
    line = f"warning: resuming with other versions: {told}; results may differ from here on\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("allowed", [(), ("optimizer.name",), ("optimizer.name", "seed")])
def test_another_optimiser_is_refused_whatever_is_allowed(cut, allowed):
    changed = {"optimizer": {"name": "sgd"}, **({"seed": 3} if "seed" in allowed else {})}
    with pytest.raises(
        ConfigError,
        match=r"optimizer\.name: 'adamw' there, 'sgd' now: its state is of that optimiser; set .* "
        r"--model\.weights .*step-\d+\.pt",
    ):
        fit(cut, allow_changed=allowed, **changed)


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_the_optimiser_computes_as_this_device_wants_it(cut, implementation):
    """A checkpoint of a CPU says fused: null, which would be slow on a GPU, and the reverse."""
    run = runs.Run(small_config(cut, "run", **SECTIONS), ONE_PROCESS)
    groups = run.learner.optimizer.param_groups
    assert not groups[0][implementation]
    for group in groups:
        group[implementation] = True
    run.fit()
    assert all(group[implementation] is True for group in groups)
    for state in run.learner.optimizer.state.values():
        assert state["step"] == 22, "the state was taken over"


@pytest.mark.parametrize("precisions", [("fp32", "fp16"), ("fp16", "bf16")])
def test_another_precision_may_go_on(tmp_path, precisions):
    before, after = precisions
    with pytest.raises(SavedAndStopped):
        fit(tmp_path, AtLook(13), precision=before)
    folder = fit(tmp_path, allow_changed=["precision"], precision=after)
    scaler = load_checkpoint(RunFolder(folder).saved()[0])["scaler"]
    assert bool(scaler) == (after == "fp16")


def test_weights_of_fewer_epochs_do_not_tell_that_a_longer_run_is_done(tmp_path):
    longer = {"allow_changed": ["schedule.epochs"], "schedule": {"epochs": 3}}
    with pytest.raises(ConfigError, match=r"--allow-changed: .* holds no run to resume"):
        fit(tmp_path, **longer)
    folder = fit(tmp_path, schedule={"epochs": 1})
    before = final_bytes(folder)
    with pytest.raises(ConfigError, match="another experiment"):
        fit(tmp_path, schedule={"epochs": 3})
    assert final_bytes(folder) == before, "a refusal changes nothing"
    with pytest.raises(SavedAndStopped):
        fit(tmp_path, AtLook(2), **longer)
    assert not (folder / "final.safetensors").exists()


def test_an_epoch_of_another_length_cannot_be_continued(cut):
    with pytest.raises(
        ConfigError, match=r"had 285 images and 11 steps per epoch, and .* 285 images and 5"
    ):
        fit(cut, allow_changed=["data.batch_size"], data={**SECTIONS["data"], "batch_size": 50})


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    folder = fit(tmp_path, checkpoint={"every_steps": 2, "keep": 2})
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "best.pt",
        "step-00000020.pt",
        "step-00000022.pt",
    ]


def test_tensorboard_has_no_gap_and_nothing_twice(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sections = {"logging": {"interval": 3, "tensorboard": True}, "tokenmixup_off_epoch": 1}
    with pytest.raises(SavedAndStopped):
        fit(tmp_path, AtLook(8), **sections)
    with pytest.raises(SavedAndStopped):
        fit(tmp_path, AtLook(12), **sections)
    folder = fit(tmp_path, **sections)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if row["split"] == "train"] == [3, 6, 9, 11, 14, 17, 20, 22]
    wanted = {}
    for row in rows:
        for name in row.keys() - {"split", "epoch", "step", "time"}:
            wanted.setdefault(f"{row['split']}/{name}", []).append((row["step"], row[name]))
    assert set(events.Tags()["scalars"]) == wanted.keys()
    assert [step for step, on in wanted["train/tokenmixup_on"] if not on] == [14, 17, 20, 22]
    assert [step for step, _ in wanted["train/vtm/layer1/remembered_tokens"]] == [3, 6, 9, 11]
    for name, values in wanted.items():
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(step, pytest.approx(value)) for step, value in values], name
