"""Several processes: the same training and exactly the same evaluation as one."""

import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from experiments import evaluate, train
from experiments.config.schema import DataConfig
from experiments.data.loading import EpochBatches, divide_batch
from experiments.errors import ConfigError, ProcessLost
from experiments.provenance import ROOT
from experiments.training.distributed import _lost_processes_told
from experiments.training.metrics import read_metrics
from tests.helpers.commands import TWO_PROCESSES, finished
from tests.helpers.runs_helper import BOTH, assert_rows_agree, write_config


def by_two(*words):
    """Run a command as two processes under torchrun; gives what it prints."""
    code, out, err = finished(*TWO_PROCESSES, "-m", *words)
    assert code == 0, err
    return out


@pytest.mark.parametrize("micro_batch", [None, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shares_of_all_processes_make_up_the_batch(size, micro_batch):
    config = DataConfig(batch_size=16, micro_batch=micro_batch)
    whole = list(EpochBatches(50, 16, 7, divide_batch(DataConfig(batch_size=16), 0, 1)))
    shares = [
        list(EpochBatches(50, 16, 7, divide_batch(config, rank, size))) for rank in range(size)
    ]
    assert len(whole) == 3
    for step, batch in enumerate(whole):
        assert [key for share in shares for key in share[step]] == batch


@pytest.mark.parametrize(
    "settings, size, even, message",
    [
        ({"batch_size": 16}, 3, False, "batch_size: got 16; .* 3 processes: a multiple of 3"),
        ({"batch_size": 100}, 4, True, r"100; .* 4 processes .*CutMix\): a multiple of 8"),
        ({"batch_size": 16, "micro_batch": 8}, 4, True, "8, which divides .* of 16 into 2 parts"),
    ],
)
def test_batches_that_cannot_be_shared_out(settings, size, even, message):
    with pytest.raises(ConfigError, match=message):
        divide_batch(DataConfig(**settings), 0, size, even)


GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:544] "


@pytest.mark.parametrize(
    "error, lost",
    [
        (RuntimeError(GLOO + "Connection closed by peer [127.0.0.1]:9843"), True),
        (RuntimeError(GLOO + "Timed out waiting 15000ms for recv operation to complete"), True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), True),
        (dist.DistBackendError("ncclRemoteError: a remote process exiting prematurely."), True),
        (dist.DistBackendError("ncclSystemError: socketProgress: closed by remote peer"), True),
        (dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL"), True),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), True),
        (dist.DistStoreError("wait timeout after 1000ms"), True),
        (dist.DistBackendError("NCCL error: ncclInvalidUsage: Duplicate GPU detected"), False),
        (dist.DistBackendError("ncclUnhandledCudaError: out of memory"), False),
        (RuntimeError("No backend type associated with device type cpu (nccl)"), False),
        (RuntimeError(GLOO + "op.preamble.length <= op.nbytes. 8 vs 4"), False),
        (RuntimeError("CUDA error: the launch timed out and was terminated"), False),
    ],
    ids=lambda value: str(value)[-30:] if isinstance(value, Exception) else "",
)
def test_a_lost_process_is_told_from_other_errors_of_the_backends(error, lost):
    """Those have their traceback, since nobody else is gone."""
    with pytest.raises(ProcessLost if lost else type(error)), _lost_processes_told(0, 2, 10):
        raise error


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run by one process and the same by two: 4 groups of 32 images a step, HTM and VTM.

    They are off in the second epoch.
    """
    folder = tmp_path_factory.mktemp("runs")
    sections = {"schedule": {"epochs": 2}, "tokenmixup_off_epoch": 1, **BOTH}
    config = write_config(folder, data={"micro_batch": 32}, **sections)
    one, two = folder / "by_1", folder / "by_2"
    train.main(["--config", str(config), "--output", str(one)])
    return config, one, two, by_two("experiments.train", "--config", config, "--output", two)


def test_training_does_not_depend_on_the_number_of_processes(runs):
    _, one, two, text = runs
    expected, found = (load_file(folder / "final.safetensors") for folder in (one, two))
    for name, value in expected.items():
        # a softmax does not see the bias of what it is taken of: that gradient is rounding alone,
        # which AdamW scales up to whole steps
        slack = 1e-2 if name.endswith("pool.bias") else 1e-5
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=slack, msg=name)
    assert "2 × cpu" in text and text.count("epoch   2/2") == 1
    assert_rows_agree(one, two, rel=1e-3, abs=1e-4)


def test_evaluation_by_two_counts_every_image_once(runs, capsys):
    config, one, _, _ = runs
    # 355 images: two processes get 178 and 177, in batches of 50
    arguments = ["--config", config, "--checkpoint", one / "final.safetensors", "--json"]
    arguments = [str(word) for word in (*arguments, "--data.eval_batch_size", 50)]
    evaluate.main(arguments)
    expected = json.loads(capsys.readouterr().out)
    found = json.loads(by_two("experiments.evaluate", *arguments))
    assert found["images"] == expected["images"] == 355
    assert (found["top1"], found["top5"]) == (expected["top1"], expected["top5"])
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_mistake_is_told_once(tmp_path):
    config = write_config(tmp_path, data={"batch_size": 127})
    words = ("experiments.train", "--config", config, "--output", tmp_path / "run")
    code, _, err = finished(*TWO_PROCESSES, "-m", *words)
    assert code != 0
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "data.batch_size: got 127" in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["baseline", "HVTM"])
def test_two_processes_reach_the_accuracy_of_one_on_digits(tmp_path, variant):
    config = ROOT / "configs" / f"digits_{variant}.yaml"
    by_two("experiments.train", "--config", config, "--output", tmp_path / "run")
    last = [row for row in read_metrics(tmp_path / "run") if row["split"] == "validation"][-1]
    assert last["top1"] >= 96
