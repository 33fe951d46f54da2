"""Train a model: `python -m experiments.train --config configs/NAME.yaml`."""

import sys
from collections.abc import Sequence

from experiments import cli


def main(argv: Sequence[str]) -> None:
    """Read the command line and train; an existing run folder is continued."""
    command = cli.parse(
        argv,
        "experiments.train",
        "Train a model, or go on with the training that the run folder holds.",
    )
    if command is None:
        return
    # torch and timm only once the config is read
    from experiments.distributed import World, joined_world
    from experiments.runs import Run

    def train(world: World) -> None:
        with cli.mistakes_in(command.config_file):
            run = Run(command.config, world)
        run.fit()

    with joined_world(command.config.device) as world:
        train(world)


if __name__ == "__main__":
    sys.exit(cli.run(main))
