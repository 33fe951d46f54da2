"""Faults from outside, real ones: the message says what to do, and the run can be resumed."""

import errno
import multiprocessing
import re
import resource
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from PIL import Image

from experiments.config.schema import DataConfig, RunConfig
from experiments.errors import ConfigError, DataError, TrainingStopped
from experiments.training.distributed import ONE_PROCESS
from experiments.training.run import Run
from experiments.training.stopping import explain_fault
from tests.helpers.others_warnings import forks, uses_inductor
from tests.helpers.runs_helper import HTM, AtLook, final_bytes, fit, small_config

STEPS = {"train_split": "tune_validation", "batch_size": 25}  # 11 an epoch


# torch's handler of the child's end raises in whatever runs then, now and then its own clean-up
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function _MultiProcessingDataLoaderIter.__del__"
    ":pytest.PytestUnraisableExceptionWarning"
)
@forks
def test_a_loader_process_that_the_kernel_kills(tmp_path):
    sections = {"data": {**STEPS, "workers": 1}, "schedule": {"epochs": 2}}

    def kill():  # one of them, as the kernel does: the one that loads for the evaluation under way
        max(multiprocessing.active_children(), key=lambda process: process.pid).kill()

    message = r"data-loader process was killed.*data\.workers, now 1\); the last checkpoint is "
    with pytest.raises(TrainingStopped, match=message):
        fit(tmp_path, requests=AtLook(14, kill), **sections)
    resumed = fit(tmp_path, **sections)
    assert final_bytes(resumed) == final_bytes(fit(tmp_path, name="whole", **sections))


@pytest.fixture
def limit():
    """Sets a soft limit of this process for a while."""
    before = {}

    def set_limit(which, value):
        before.setdefault(which, resource.getrlimit(which))
        resource.setrlimit(which, (value, before[which][1]))

    yield set_limit
    for which, pair in before.items():
        resource.setrlimit(which, pair)


def test_a_disk_without_room(tmp_path, limit):
    sections = {"data": STEPS, "schedule": {"epochs": 2}}
    checkpoints = tmp_path / "output" / "run" / "checkpoints"

    def fill():
        while not (checkpoints / "step-00000011.pt").exists():  # written beside the evaluation
            time.sleep(0.01)
        limit(resource.RLIMIT_FSIZE, 10_000)

    with pytest.raises(TrainingStopped, match=r"File too large; the last checkpoint is .*11\.pt"):
        fit(tmp_path, requests=AtLook(14, fill), **sections)
    limit(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
    # in the first evaluation; nothing half written stays behind
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000011.pt"]
    resumed = fit(tmp_path, **sections)
    assert final_bytes(resumed) == final_bytes(fit(tmp_path, name="whole", **sections))


def test_memory_that_runs_out(tmp_path, limit):
    fit(tmp_path, name="before", horizontal=HTM)  # torch's threads have their stacks then
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    def less():
        limit(resource.RLIMIT_AS, size + 40_000_000)

    sections = {"horizontal": HTM, "model": {"image_size": 32}}
    sections["data"] = {"batch_size": 700, "eval_batch_size": 50}
    run = Run(small_config(tmp_path, **sections), ONE_PROCESS)
    less()
    message = r"out of memory \(.*\); a smaller data\.micro_batch \(now 700\) .*; there is no check"
    with pytest.raises(TrainingStopped, match=message):
        run.fit()


def unsupported(run, stack):
    host = run.learner.model.backbone
    host.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    return "Call to `torch._dynamo.graph_break"


def no_compiler(run, stack):
    settings = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    stack.enter_context(torch._inductor.config.patch(settings))
    return "InvalidCxxCompiler: No working C"


@uses_inductor
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning")
@pytest.mark.parametrize(
    "break_it", [unsupported, pytest.param(no_compiler, marks=pytest.mark.slow)]
)
def test_a_compilation_that_fails(tmp_path, break_it):
    run = Run(small_config(tmp_path, compile="on"), ONE_PROCESS)
    with ExitStack() as stack:
        said = break_it(run, stack)
        message = rf"torch\.compile failed \(.*{said}.*\); --compile off \(now on\) trains the same"
        with pytest.raises(TrainingStopped, match=message):
            run.fit()


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_an_evaluation_that_is_not_finite(tmp_path, capsys, policy):
    sections = {"data": STEPS, "schedule": {"epochs": 2}, "on_nonfinite": policy}
    run = Run(small_config(tmp_path, "run", **sections), ONE_PROCESS)

    def spoil(model, _, logits):
        first = not model.training and run.progress.epochs_done == 0
        return logits * torch.nan if first else logits

    run.learner.model.register_forward_hook(spoil)
    told = r"validation of epoch 1: the loss is not finite .*eval_precision, now fp32"
    if policy == "stop":
        with pytest.raises(TrainingStopped, match=rf"^{told}.*; the last checkpoint is .*11\.pt"):
            run.fit()
        assert not (run.folder.checkpoints / "best.pt").exists()
        fit(tmp_path, "run", **sections)  # evaluates again
    else:
        run.fit()
        assert re.search(f"warning: {told}", capsys.readouterr().err)
        assert run.progress.best_epoch == 2
    whole = fit(tmp_path, "whole", data=STEPS, schedule={"epochs": 2})
    assert final_bytes(run.folder.path) == final_bytes(whole)


def test_cuda_graphs_without_cuda_are_refused(tmp_path):
    message = r"^compile: got 'graphs', but the device is cpu, .*; allowed here: off, on, auto$"
    with pytest.raises(ConfigError, match=message):
        Run(small_config(tmp_path, compile="graphs"), ONE_PROCESS)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nMore."),
            r"^out of memory \(CUDA out of memory\); a smaller data\.micro_batch \(now 16\) .*"
            r"data\.eval_batch_size \(now 64\) evaluates in more$",
        ),
        (RuntimeError("DataLoader worker ended: EOF"), r"killed \(DataLoader worker ended: EOF\)"),
        (OSError(errno.ENOSPC, "No space", "a/b"), "^cannot write a/b: No space$"),
        (OSError(errno.ECONNRESET, "reset"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_faults_from_outside_are_explained_and_no_others(error, told):
    config = RunConfig(data=DataConfig(eval_batch_size=64))
    found = explain_fault(error, config, images_per_pass=16)
    assert found is None if told is None else re.search(told, found)


@pytest.fixture
def folder_of_images(tmp_path):
    """Twelve images of two classes, as files."""
    for split in ("train", "validation"):
        for number in range(12):
            path = tmp_path / "images" / split / f"class{number % 2}" / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(path)
    return tmp_path / "images"


def image_sections(folder, **data):
    return {
        "data": {"dataset": "", "root": str(folder), "batch_size": 4, "scale": [1.0, 1.0], **data},
        "schedule": {"epochs": 3},
    }


@forks
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_is_named(tmp_path, folder_of_images, workers):
    gone = folder_of_images / "train" / "class1" / "05.png"
    sections = image_sections(folder_of_images, workers=workers)
    with pytest.raises(DataError, match=r"^cannot read .*05\.png: .*; the last checkpoint is .*$"):
        fit(tmp_path, requests=AtLook(5, gone.unlink), **sections)


@pytest.mark.parametrize("bad", [2, 3])
def test_unreadable_images_are_counted_up_to_the_limit(tmp_path, folder_of_images, capsys, bad):
    train = folder_of_images / "train" / "class0"
    paths = [train / f"{number:02d}.png" for number in (2, 4, 6)][:bad]

    def damage():
        paths[0].unlink()
        for path in paths[1:]:
            path.write_bytes(path.read_bytes()[:40])

    sections = image_sections(folder_of_images, max_bad_images=2)
    if bad > 2:
        message = r"cannot read .*; unreadable images: 3 of 2 allowed .*; the last checkpoint is"
        with pytest.raises(DataError, match=message):
            fit(tmp_path, requests=AtLook(2, damage), **sections)
        with pytest.raises(ConfigError, match=r"had 12 images and .*, and now there are 11 images"):
            fit(tmp_path, **sections)  # a file that is gone is not even listed
    else:
        fit(tmp_path, requests=AtLook(2, damage), **sections)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "cannot read" in line]
    assert len(warnings) == 2 and warnings[0].startswith("warning: cannot read")
    assert warnings[1].endswith("unreadable images: 2 of 2 allowed (data.max_bad_images)")


def test_evaluation_reads_every_image(tmp_path, folder_of_images):
    shutil.copy(__file__, folder_of_images / "validation" / "class0" / "02.png")
    with pytest.raises(DataError, match=r"cannot read .*02\.png"):
        fit(tmp_path, **image_sections(folder_of_images, max_bad_images=5))
