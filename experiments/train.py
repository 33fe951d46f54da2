"""Train a model: `python -m experiments.train --config configs/NAME.yaml`."""

import math
import sys
from collections.abc import Sequence

from experiments import cli
from experiments.errors import ConfigError

OPTIONS = {
    "max_minutes": cli.Option("save and stop after this many minutes (exit code 75)"),
    "allow_changed": cli.Option(
        "comma-separated keys that may differ from those that the run was started with"
    ),
}


def main(argv: Sequence[str]) -> None:
    """Parse the command line and train; an existing run folder resumes."""
    description = "Train a model, or resume the training in the run folder."
    command = cli.parse(argv, "experiments.train", description, OPTIONS)
    if command is None:
        return
    minutes = _minutes(command.options.get("max_minutes"))
    changed = [key for key in command.options.get("allow_changed", "").split(",") if key]
    config = command.config

    if command.only_check:
        from experiments.training.check import check_training

        with cli.mistakes_in(command.config_file):
            check_training(config, changed)
        return

    # imported only after the config was checked: torch and timm take seconds
    from experiments.training.distributed import joined_world
    from experiments.training.run import Run
    from experiments.training.stopping import StopRequests

    with (
        StopRequests(minutes) as requests,
        joined_world(config.device, config.timeout_minutes) as world,
    ):
        with cli.mistakes_in(command.config_file):
            run = Run(config, world)
        run.fit(requests, changed)


def _minutes(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise ConfigError(f"command line: --max-minutes: got {text!r}; allowed: a number above 0")
    return minutes


if __name__ == "__main__":
    sys.exit(cli.run(main))
