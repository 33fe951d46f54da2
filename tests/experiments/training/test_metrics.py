"""Running statistics, step times and the rows of metrics.jsonl."""

import json
import time

import pytest
import torch

from experiments.errors import DataError
from experiments.training.distributed import ONE_PROCESS
from experiments.training.metrics import (
    METRICS_FILE,
    Recorder,
    RunningStatistics,
    StepTimer,
    mean_of_rows,
    read_metrics,
)


def tensors(**values):
    return {f"htm/layer1/{name}": torch.tensor(value) for name, value in values.items()}


def test_means_minima_and_maxima():
    statistics = RunningStatistics()
    statistics.add({"loss": torch.tensor(1.0), **tensors(difficulty_min=0.2, saliency_max=0.1)})
    statistics.add({"loss": torch.tensor(4.0), **tensors(difficulty_min=0.1, saliency_max=0.3)})
    assert statistics.steps == 2
    values = statistics.read(ONE_PROCESS)
    assert values == pytest.approx(
        {"loss": 2.5, "htm/layer1/difficulty_min": 0.1, "htm/layer1/saliency_max": 0.3}
    )
    assert statistics.read(ONE_PROCESS) == {}
    statistics.add({"loss": torch.tensor(7.0)})
    assert statistics.read(ONE_PROCESS) == {"loss": 7.0}


def test_means_over_easy_samples_count_a_step_by_its_easy_samples():
    statistics = RunningStatistics()
    statistics.add(tensors(easy_share=0.25, tokens_mixed=8.0))
    statistics.add(tensors(easy_share=0.75, tokens_mixed=4.0))
    statistics.add(tensors(easy_share=0.0, tokens_mixed=0.0))
    values = statistics.read(ONE_PROCESS)
    assert values["htm/layer1/tokens_mixed"] == pytest.approx(0.25 * 8 + 0.75 * 4)
    assert values["htm/layer1/easy_share"] == pytest.approx(1 / 3)
    statistics.add(tensors(easy_share=0.0, tokens_mixed=0.0))
    assert statistics.read(ONE_PROCESS)["htm/layer1/tokens_mixed"] == 0.0


class Counting:
    """Two processes of which one is here: counts how often they exchange values."""

    exchanges = 0

    def sum(self, tensor):
        self.exchanges += 1
        return tensor + 1

    def minimum(self, tensor):
        self.exchanges += 1
        return tensor


def test_processes_that_took_nothing_on_exchange_as_often_as_the_one_that_did():
    """Another number of processes goes on, and the steps up to the report are all left out."""
    before = RunningStatistics()
    before.add({"loss": torch.tensor(3.0), **tensors(difficulty_min=0.2, saliency_max=0.1)})
    states = [before.state_dict()] * 2
    exchanges, saved = [], []
    for mine in (True, False):
        statistics, world = RunningStatistics(), Counting()
        statistics.load_state_dicts(states, torch.device("cpu"), mine)
        saved.append(statistics.state_dict())
        statistics.read(world)
        exchanges.append(world.exchanges)
    assert exchanges == [2, 2]
    # what the others hold changes nothing, once more saved and taken on
    together = RunningStatistics()
    together.load_state_dicts(saved, torch.device("cpu"))
    together.add({"loss": torch.tensor(6.0), **tensors(difficulty_min=0.4, saliency_max=0.0)})
    assert together.read(ONE_PROCESS) == pytest.approx(
        {"loss": 4.0, "htm/layer1/difficulty_min": 0.2, "htm/layer1/saliency_max": 0.1}
    )


def test_adding_never_reads_a_tensor(monkeypatch):
    """A read makes a GPU wait; only `read` may."""

    def forbidden(*_):
        raise AssertionError("a tensor was read")

    statistics = RunningStatistics()
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, forbidden)
        for _ in range(3):
            statistics.add({"loss": torch.ones(()), **tensors(easy_share=0.5, tokens_mixed=2.0)})
    assert statistics.read(ONE_PROCESS)["loss"] == 1.0


@pytest.mark.gpu
def test_adding_does_not_wait_for_the_gpu():
    statistics = RunningStatistics()
    values = {"loss": torch.ones((), device="cuda"), "a/easy_share": torch.ones((), device="cuda")}
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            statistics.add(values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert statistics.read(ONE_PROCESS)["loss"] == 1.0


def test_step_times(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    timer = StepTimer(torch.device("cpu"))
    for wait, work in ((0.1, 0.9), (0.1, 1.9), (0.2, 8.8)):
        now[0] += wait
        timer.got_data()
        now[0] += work
        timer.step_done()
    times = timer.read(images_per_step=6)
    assert times["step_seconds"] == pytest.approx(2.0)
    assert times["data_seconds"] == pytest.approx(0.1)
    assert times["images_per_second"] == pytest.approx(3 * 6 / 12)
    now[0] += 50  # an evaluation
    timer.restart()
    now[0] += 1
    timer.got_data()
    timer.step_done()
    assert timer.read(6)["step_seconds"] == pytest.approx(1.0)


def test_rows_are_written_one_a_line(tmp_path):
    recorder = Recorder(tmp_path, 0, tensorboard=False)
    recorder.write("train", 1, 10, {"loss": 0.5, "odd": float("inf")})
    recorder.write("validation", 1, 10, {"top1": 50.0})
    recorder.close()
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(abs(row.pop("time") - time.time()) < 60 for row in rows)
    assert rows == [
        {"split": "train", "epoch": 1, "step": 10, "loss": 0.5, "odd": None},
        {"split": "validation", "epoch": 1, "step": 10, "top1": 50.0},
    ]


def test_a_resumed_run_takes_out_what_it_will_do_again(tmp_path):
    recorder = Recorder(tmp_path, 0, tensorboard=False)
    for step in (10, 20, 30):
        recorder.write("train", step // 10, step, {"loss": 1.0})
    recorder.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"split": "train", "ste')  # cut off by a crash
    recorder = Recorder(tmp_path, 2, tensorboard=False)
    assert (recorder.rows, recorder.missing) == (2, 0)
    recorder.write("train", 3, 30, {"loss": 2.0})
    recorder.close()
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["loss"]) for row in rows] == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / METRICS_FILE).write_text('nonsense\n{"step": 1}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 1: is not JSON"):
        read_metrics(tmp_path)


def test_mean_of_rows_counts_steps():
    rows = [
        {"split": "train", "steps": 3, "loss": 1.0, "a/easy_share": 0.5, "a/tokens_mixed": 4.0},
        {"split": "train", "steps": 1, "loss": 5.0, "a/easy_share": 0.5, "a/tokens_mixed": 8.0},
    ]
    means = mean_of_rows(rows)
    assert means["loss"] == 2.0
    assert means["a/tokens_mixed"] == pytest.approx(5.0)
    assert "split" not in means
