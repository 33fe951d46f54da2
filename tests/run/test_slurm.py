"""run/slurm.sh with real trainings; small scripts replace Slurm's `srun` and `scontrol`."""

import os
import subprocess

import pytest

from experiments.provenance import ROOT

SHORT = ("--schedule.epochs", "1", "--data.batch_size", "700", "--logging.tensorboard", "false")


@pytest.fixture
def submit(tmp_path):
    commands = tmp_path / "commands"
    commands.mkdir()
    calls = tmp_path / "scontrol.log"
    for name, body in {
        "srun": 'exec "$@"',
        "scontrol": f'[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> "{calls}"',
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)

    def run(*words, **environment):
        done = subprocess.run(
            ["sh", "run/slurm.sh", "digits_baseline", *SHORT, *words],
            cwd=ROOT,
            env={
                **os.environ,
                "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
                "OMP_NUM_THREADS": "1",
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "localhost",
                "RUN_FOLDER": str(tmp_path / "run"),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=240,
        )
        requeued = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return done, requeued

    return run


@pytest.mark.slow
def test_a_stopped_run_is_requeued_until_it_is_done_and_a_failed_run_is_not(submit, tmp_path):
    done, requeued = submit("--max-minutes", "0.0001")
    assert (done.returncode, requeued) == (0, ["requeue 7"]), done.stderr
    # The heartbeat of the stop is still there, but it is older than this job.
    done, requeued = submit("--seed", "9")
    assert (done.returncode, requeued) == (2, []), done.stderr
    assert "seed" in done.stderr
    done, requeued = submit()
    assert (done.returncode, requeued) == (0, []), done.stderr
    assert (tmp_path / "run" / "final.safetensors").exists()


@pytest.mark.slow
def test_torchruns_exit_code_does_not_hide_a_stop(submit, tmp_path):
    done, requeued = submit("--max-minutes", "0.0001", NPROC="2")
    assert (done.returncode, requeued) == (0, ["requeue 7"]), done.stderr
    done, requeued = submit(NPROC="2")
    assert (done.returncode, requeued) == (0, []), done.stderr
    assert (tmp_path / "run" / "final.safetensors").exists()


@pytest.mark.slow
def test_the_command_line_names_the_run_folder(submit, tmp_path):
    folder = tmp_path / "another"
    done, requeued = submit("--max-minutes", "0.0001", "--output", str(folder))
    assert (done.returncode, requeued) == (0, ["requeue 7"]), done.stderr
    done, requeued = submit(f"--output={folder}")
    assert (done.returncode, requeued) == (0, []), done.stderr
    assert (folder / "final.safetensors").exists() and not (tmp_path / "run").exists()


def test_a_task_gets_the_cores_that_the_job_has(submit, tmp_path):
    srun = tmp_path / "commands" / "srun"
    srun.write_text('#!/bin/sh\necho "cores: ${SRUN_CPUS_PER_TASK-as Slurm says}"\n')
    for cores, told in (("12", "12"), ("", "as Slurm says")):
        done, _ = submit(SLURM_CPUS_PER_TASK=cores)
        assert (done.returncode, done.stdout) == (0, f"cores: {told}\n"), done.stderr


def test_it_needs_sbatch(submit):
    done, requeued = submit(SLURM_JOB_ID="")
    assert done.returncode != 0
    assert "sbatch" in done.stderr
    assert not requeued
