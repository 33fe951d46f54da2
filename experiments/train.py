"""Train a model: `python -m experiments.train --config configs/NAME.yaml`."""

import math
import sys
from collections.abc import Sequence

from experiments import cli
from experiments.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    """Read the command line and train; an existing run folder is continued."""
    command = cli.parse(
        argv,
        "experiments.train",
        "Train a model, or go on with the training that the run folder holds.",
        {
            "max_minutes": cli.Option("save and stop after so many minutes (exit code 75)"),
            "allow_changed": cli.Option(
                "keys, with commas between, that may differ from those of the run so far"
            ),
        },
    )
    if command is None:
        return
    # torch and timm only once the config is read
    from experiments.training.distributed import World, joined_world
    from experiments.training.run import Run
    from experiments.training.stopping import StopRequests

    changed = [key for key in command.options.get("allow_changed", "").split(",") if key]
    minutes = _minutes(command.options.get("max_minutes"))

    def train(world: World, requests: StopRequests) -> None:
        with cli.mistakes_in(command.config_file):
            run = Run(command.config, world)
        run.fit(requests, changed)

    device, timeout = command.config.device, command.config.timeout_minutes
    with StopRequests(minutes) as requests, joined_world(device, timeout) as world:
        train(world, requests)


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
