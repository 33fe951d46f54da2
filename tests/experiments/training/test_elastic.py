"""Several processes under torchrun: one dies, one hangs, all are told to stop, others go on."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments import cli, train
from tests.helpers.commands import TWO_PROCESSES, ended, started
from tests.helpers.runs_helper import (
    BOTH,
    assert_rows_agree,
    final_bytes,
    rows_without_clock,
    wait_for_step,
    write_config,
)

SECTIONS = {
    **BOTH,
    "data": {"micro_batch": 32},  # 4 parts per batch, 11 steps per epoch
    "schedule": {"epochs": 4},
    "checkpoint": {"every_steps": 3},
}


class Job:
    """Two training processes under torchrun."""

    def __init__(self, config, output, *more, restarts=0):
        words = ["-m", "experiments.train", "--config", config, "--output", output, *more]
        environment = {
            **os.environ,
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10",
            "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        }
        self.output = output
        self.process = started(
            *TWO_PROCESSES, f"--max-restarts={restarts}", *words, env=environment
        )

    def wait_for_step(self, step):
        wait_for_step(self.output, self.process, step)

    def training_process(self, rank):
        pid = self.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
                return int(child)
        pytest.fail(f"torchrun has no process of rank {rank}")

    def finish(self):
        return ended(self.process)

    def outcome(self):
        code, out, err = self.finish()
        assert code == 0, out + err
        return final_bytes(self.output), rows_without_clock(self.output), out


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"), **SECTIONS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, config):
    return Job(config, tmp_path_factory.mktemp("undisturbed") / "run").outcome()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_is_started_again_with_all_others(tmp_path, config, undisturbed, rank):
    job = Job(config, tmp_path / "run", restarts=1)
    job.wait_for_step(6)
    os.kill(job.training_process(rank), signal.SIGKILL)
    *found, out = job.outcome()
    assert "resuming after step" in out
    assert tuple(found) == undisturbed[:2]


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others_with_a_message(tmp_path, config):
    job = Job(config, tmp_path / "run", "--timeout_minutes", "0.25")
    job.wait_for_step(3)
    os.kill(job.training_process(1), signal.SIGSTOP)  # torchrun's SIGKILL ends even such a one
    code, out, err = job.finish()
    assert code != 0, out + err
    message = "another process is gone, or has not answered for 0.25 minutes (timeout_minutes)"
    assert f"error: process 0 of 2: {message}" in err, out + err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_job_that_is_told_to_stop_saves_and_goes_on(tmp_path, config, undisturbed, number):
    job = Job(config, tmp_path / "run", restarts=3)
    job.wait_for_step(6)
    job.process.send_signal(number)
    _, out, err = job.finish()
    assert re.search(rf"{number.name}: saved after step \d+", err), out + err
    assert not (job.output / "final.safetensors").exists()
    assert Job(config, job.output).outcome()[:2] == undisturbed[:2]


@pytest.mark.slow
def test_a_time_limit_ends_the_job_without_a_restart(tmp_path, config):
    words = ("--max-minutes", "0.02", "--schedule.epochs", "500")
    job = Job(config, tmp_path / "run", *words, restarts=3)
    code, out, err = job.finish()
    assert code == 0, out + err
    assert err.count("--max-minutes 0.02: saved after step") == 1


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_training(tmp_path, capsys):
    """Two begin, one goes on: within an interval of the statistics, with 4 parts a batch."""
    config = write_config(tmp_path, **{**SECTIONS, "schedule": {"epochs": 1}})
    words = ["--config", str(config), "--output"]
    both, one = tmp_path / "both", tmp_path / "one"
    job = Job(config, both, "--max-minutes", "0.0001")
    code, _, err = job.finish()
    assert code == 0, err
    assert "saved after step 2" in err  # the second step has the answer to the first one's question
    for folder in (both, one):
        assert cli.run(train.main, [*words, str(folder)]) == 0
    told = capsys.readouterr().err
    assert "the run so far had 2 processes, now 1: order, augmentation, Mixup" in told
    expected = load_file(one / "final.safetensors")
    for name, value in load_file(both / "final.safetensors").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-3, msg=name)
    assert_rows_agree(one, both, rel=1e-2, abs=1e-3)
