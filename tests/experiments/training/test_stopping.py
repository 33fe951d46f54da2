"""Signals and time limits, with real processes."""

import os
import signal
import time

import pytest

from experiments import cli, train
from experiments.training.folder import RunFolder
from tests.helpers.commands import ended, fails, started
from tests.helpers.runs_helper import HTM, VTM, final_bytes, wait_for_step, write_config

WAITS = """
import sys, time
from experiments.training.stopping import StopRequests
with StopRequests() as requests:
    print("ready", flush=True)
    while requests.reason is None:
        time.sleep(0.01)
    print(requests.reason, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_first_signal_asks_and_a_later_one_ends_the_process(number):
    with started("-c", WAITS) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"{number.name}\n"
        process.send_signal(number)  # at once: the same request, sent by two
        time.sleep(0.3)
        assert process.poll() is None
        time.sleep(1)
        process.send_signal(number)
        assert process.wait(timeout=5) == 128 + number


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf"])
def test_a_time_limit_is_a_positive_number(tmp_path, capsys, text):
    error = fails(capsys, train, "--config", write_config(tmp_path), f"--max-minutes={text}")
    assert f"--max-minutes: got '{text}'; allowed: a number above 0" in error


@pytest.mark.slow
def test_a_terminals_interrupt_reaches_all_processes_and_nothing_is_lost(tmp_path, capsys):
    """The whole group gets the signal, as after Ctrl-C: the training and its loader's processes."""
    sections = {"horizontal": HTM, "vertical": VTM, "schedule": {"epochs": 3}}
    config = write_config(tmp_path, data={"workers": 1}, checkpoint={"every_steps": 2}, **sections)
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    words = ["--config", str(config), "--output"]
    process = started("-m", "experiments.train", *words, cut, start_new_session=True)
    wait_for_step(cut, process, 4)
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = ended(process, timeout=60)
    assert code == 75, out + err
    assert "SIGINT: saved after step" in err and "Traceback" not in err
    assert not (cut / "final.safetensors").exists()
    for folder in (cut, whole):
        assert cli.run(train.main, [*words, str(folder), "--data.workers", "0"]) == 0
    assert "resuming after step" in capsys.readouterr().out
    assert final_bytes(cut) == final_bytes(whole)


def test_a_time_limit_saves_and_stops(tmp_path, capsys):
    config = write_config(tmp_path, schedule={"epochs": 500})
    words = ["--config", str(config), "--output", str(tmp_path / "run"), "--max-minutes", "0.01"]
    assert cli.run(train.main, words) == 75
    assert "--max-minutes 0.01: saved after step" in capsys.readouterr().err
    assert RunFolder(tmp_path / "run").saved()
