"""Running statistics, step times and the rows of metrics.jsonl."""

import json
import time

import pytest
import torch

from experiments.errors import DataError, TrainingStopped
from experiments.training.distributed import ONE_PROCESS
from experiments.training.metrics import (
    METRICS_FILE,
    MetricsWriter,
    Progress,
    RunningStatistics,
    StepTimer,
    mean_of_rows,
    read_metrics,
)

CPU = torch.device("cpu")
FINITE = torch.ones(3, dtype=torch.bool)


def tensors(**values):
    return {f"htm/layer1/{name}": torch.tensor(value) for name, value in values.items()}


def add(statistics, *parts, finite=FINITE):
    """Add a step of parts with these values by name."""
    stacked = [torch.stack(tuple(part.values())) for part in parts]
    statistics.add_step(tuple(parts[0]), stacked, finite)


def added(*steps):
    """Statistics of steps of one part each."""
    statistics = RunningStatistics(CPU)
    for values in steps:
        add(statistics, values)
    return statistics


def test_means_minima_and_maxima():
    statistics = added(
        {"loss": torch.tensor(1.0), **tensors(difficulty_min=0.2, saliency_max=0.1)},
        {"loss": torch.tensor(4.0), **tensors(difficulty_min=0.1, saliency_max=0.3)},
    )
    assert statistics.read(ONE_PROCESS) == pytest.approx(
        {"loss": 2.5, "htm/layer1/difficulty_min": 0.1, "htm/layer1/saliency_max": 0.3, "steps": 2}
    )
    assert statistics.read(ONE_PROCESS) == {"steps": 0}
    add(statistics, {"loss": torch.tensor(7.0)}, {"loss": torch.tensor(9.0)})
    statistics.add_skipped_step()
    assert statistics.read(ONE_PROCESS) == {"loss": 8.0, "steps": 2}


def test_means_over_easy_samples_count_a_step_by_its_easy_samples():
    statistics = added(
        tensors(easy_share=0.25, tokens_mixed=8.0),
        tensors(easy_share=0.75, tokens_mixed=4.0),
        tensors(easy_share=0.0, tokens_mixed=0.0),
    )
    values = statistics.read(ONE_PROCESS)
    assert values["htm/layer1/tokens_mixed"] == pytest.approx(0.25 * 8 + 0.75 * 4)
    assert values["htm/layer1/easy_share"] == pytest.approx(1 / 3)
    none = added(tensors(easy_share=0.0, tokens_mixed=0.0))
    assert none.read(ONE_PROCESS)["htm/layer1/tokens_mixed"] == 0.0


def test_what_is_not_finite_is_named_with_its_first_step():
    statistics = added(*[{"loss": torch.tensor(1.0)}] * 2)
    for finite in ([True, True, False], [False, True, True], [True] * 3):
        add(statistics, {"loss": torch.tensor(1.0)}, finite=torch.tensor(finite))
    with pytest.raises(TrainingStopped, match=r"^step 13 \(epoch 4\): the norm of the gradient is"):
        statistics.refuse_not_finite(ONE_PROCESS, Progress(3, 15))


class TwoProcesses:
    """Two processes with the same values, of which one is here."""

    def sum(self, tensor):
        return 2 * tensor

    def minimum(self, tensor):
        return tensor


def test_what_was_measured_is_shared_by_another_number_of_processes():
    first = {"loss": torch.tensor(3.0), **tensors(difficulty_min=0.2, saliency_max=0.1)}
    second = {"loss": torch.tensor(4.0), **tensors(difficulty_min=0.4, saliency_max=0.0)}
    states = [added(values).state_dict() for values in (first, second)]
    for sharing, world in ((1, ONE_PROCESS), (2, TwoProcesses())):
        statistics = RunningStatistics(CPU)
        statistics.load_state_dicts(states, sharing)
        add(statistics, *[{**second, "loss": torch.tensor(5.0)}] * (2 // sharing))
        expected = {"loss": 4.25, "htm/layer1/difficulty_min": 0.2, "htm/layer1/saliency_max": 0.1}
        assert statistics.read(world) == pytest.approx({**expected, "steps": 2})


def test_adding_never_reads_a_tensor(monkeypatch):
    """A read makes a GPU wait; only `read` may."""

    def forbidden(*_):
        raise AssertionError("a tensor was read")

    statistics = RunningStatistics(CPU)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, forbidden)
        for _ in range(3):
            values = {"loss": torch.ones(()), **tensors(easy_share=0.5, tokens_mixed=2.0)}
            add(statistics, values)
    assert statistics.read(ONE_PROCESS)["loss"] == 1.0


def test_step_times(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    timer = StepTimer(CPU)

    def arriving():
        for wait in (0.1, 0.1, 0.2, 1):
            now[0] += wait
            yield "batch"

    batches = timer.batches(arriving())
    for work in (0.9, 1.9, 8.8):
        next(batches)
        now[0] += work
        timer.step_done()
    times = timer.read(images_per_step=6)
    assert times["step_seconds"] == pytest.approx(2.0)
    assert times["data_seconds"] == pytest.approx(0.1)
    assert times["images_per_second"] == pytest.approx(3 * 6 / 12)
    now[0] += 50  # an evaluation
    next(batches)
    timer.step_done()
    assert timer.read(6)["step_seconds"] == pytest.approx(1.0)


def test_rows_are_written_one_per_line(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    writer.write("train", Progress(0, 10), {"loss": 0.5, "odd": float("inf")})
    writer.write("validation", Progress(0, 10), {"top1": 50.0})
    writer.close()
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(abs(row.pop("time") - time.time()) < 60 for row in rows)
    assert rows == [
        {"split": "train", "epoch": 1, "step": 10, "loss": 0.5, "odd": None},
        {"split": "validation", "epoch": 1, "step": 10, "top1": 50.0},
    ]


def test_a_resumed_run_takes_out_what_it_will_do_again(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    for step in (10, 20, 30):
        writer.write("train", Progress(step // 10 - 1, step), {"loss": 1.0})
    writer.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"split": "train", "ste')  # cut off by a crash
    writer = MetricsWriter(tmp_path, 2, tensorboard=False)
    assert writer.rows == 2
    writer.write("train", Progress(2, 30), {"loss": 2.0})
    writer.close()
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
