"""Evaluate weights: `python -m experiments.evaluate --config CONFIG --checkpoint FILE`."""

import json
import sys
import time
from collections.abc import Sequence

from experiments import cli

OPTIONS = {
    "checkpoint": cli.Option("a file of weights of any kind", required=True),
    "json": cli.Option("print one JSON object", takes_value=False),
}


def main(argv: Sequence[str]) -> None:
    """Parse the command line, evaluate on the whole validation split, and print the result."""
    description = "Evaluate weights on every image of the validation split."
    command = cli.parse(argv, "experiments.evaluate", description, OPTIONS)
    if command is None:
        return
    config, checkpoint = command.config, command.options["checkpoint"]

    if command.only_check:
        from experiments.training.check import check_evaluation

        with cli.mistakes_in(command.config_file):
            check_evaluation(config, checkpoint)
        return

    # imported only after the config was checked: torch and timm take seconds
    from experiments.training.distributed import joined_world
    from experiments.training.evaluation import Assessment

    with joined_world(config.device, config.timeout_minutes) as world:
        with cli.mistakes_in(command.config_file):
            assessment = Assessment(config, checkpoint, world)
        start = time.perf_counter()
        result = assessment.evaluate()
        seconds = time.perf_counter() - start
    if not world.is_main:
        return
    loaded = assessment.loaded
    if "json" in command.options:
        facts = {
            "config": command.config_file,
            "checkpoint": checkpoint,
            "kind": loaded.kind,
            "notes": loaded.notes,
            "device": world.device.type,
            "precision": config.eval_precision,
            "top1": result.top1,
            "top5": result.top5,
            "loss": result.loss,
            "images": result.images,
            "seconds": seconds,
        }
        print(json.dumps(facts))
        return
    print(f"{checkpoint} ({loaded.kind})")
    for note in loaded.notes:
        print(note)
    print(
        f"top-1 {result.top1:.2f}%  top-5 {result.top5:.2f}%  loss {result.loss:.4f}  "
        f"{result.images} images in {seconds:.1f} s, in {config.eval_precision} on "
        f"{world.device.type}"
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
