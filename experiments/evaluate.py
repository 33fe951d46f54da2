"""Evaluate weights: `python -m experiments.evaluate --config CONFIG --checkpoint FILE`."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.config.schema import RunConfig
from experiments.errors import ConfigError

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
    notes = [*loaded.notes, *_other_images(config, Path(checkpoint))]
    if "json" in command.options:
        facts = {
            "config": command.config_file,
            "checkpoint": checkpoint,
            "kind": loaded.kind,
            "notes": notes,
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
    for note in notes:
        print(note)
    print(
        f"top-1 {result.top1:.2f}%  top-5 {result.top5:.2f}%  loss {result.loss:.4f}  "
        f"{result.images} images in {seconds:.1f} s, in {config.eval_precision} on "
        f"{world.device.type}"
    )


def _other_images(config: RunConfig, checkpoint: Path) -> list[str]:
    """A note on what makes the images others than under the config that a file carries, if any."""
    from experiments.data.augment import normalisation
    from experiments.zoo.convert import config_of

    def settings(of: RunConfig) -> dict[str, Any]:
        found = dict(zip(("data.mean", "data.std"), normalisation(of.data), strict=True))
        crop = {"data.crop_pct": of.data.crop_pct, "data.interpolation": of.data.interpolation}
        return {**found, **crop, "model.image_size": of.model.image_size}

    try:
        own = config_of(checkpoint)
    except ConfigError:
        return []  # an earlier version's, whose weights are used all the same
    if own is None:
        return []
    here = settings(config)
    changed = [f"{k}: {v} there, {here[k]} here" for k, v in settings(own).items() if v != here[k]]
    if not changed:
        return []
    return [f"the config in the file prepares images otherwise: {'; '.join(changed)}"]


if __name__ == "__main__":
    sys.exit(cli.run(main))
