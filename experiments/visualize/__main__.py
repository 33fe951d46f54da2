"""Draw what TokenMixup does: `python -m experiments.visualize --config FILE --checkpoint FILE`."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from experiments import cli
from experiments.errors import ConfigError, DataError

DEFAULT_COUNT = 8

DESCRIPTION = """\
Draw what HTM and VTM do to images, step by step, as PNG and SVG. Without --images these are images
of the config's validation split.

  python -m experiments.visualize --compare RUN... [--out DIR]

compares run folders instead: it prints a table and writes it as JSON and Markdown, with the
training curves (runs that differ by their seed alone become one line with a band) and what HTM and
VTM of the finished runs do to a few validation images."""


def main(argv: Sequence[str]) -> None:
    """Read the command line, then draw images or compare runs."""
    names = {word.partition("=")[0] for word in argv}
    if "--compare" in names and not {"-h", "--help"} & names:
        _compare(argv)
        return
    command = cli.parse(
        argv,
        "experiments.visualize",
        DESCRIPTION,
        {
            "checkpoint": cli.Option("a file of weights of any kind", required=True),
            "images": cli.Option("a folder of your own images, nested or flat"),
            "out": cli.Option("folder of the figures (default: output/pictures/CONFIG)"),
            "count": cli.Option(f"images that form the batch (default: {DEFAULT_COUNT})"),
            "animate": cli.Option("also write a GIF of the steps", takes_value=False),
        },
    )
    if command is None:
        return
    config, checkpoint = command.config, command.options["checkpoint"]
    count = cli.whole_number(
        "command line: --count", command.options.get("count", str(DEFAULT_COUNT)), most=64
    )
    run = Path(command.config_file).stem
    out = Path(command.options.get("out", f"output/pictures/{run}"))
    if config.horizontal is None and config.vertical is None:
        raise ConfigError(
            f"{command.config_file}: there is nothing to draw, as it has neither horizontal nor "
            "vertical; take a config with one of them, or --compare RUN... for training curves"
        )
    if command.only_check:
        from experiments.training.check import check_evaluation

        with cli.mistakes_in(command.config_file):
            check_evaluation(config, checkpoint, needs_data="images" not in command.options)
        return
    # slow to import, so only after the config is checked
    from experiments.training.distributed import joined_world
    from experiments.visualize.animation import write_animation
    from experiments.visualize.pages import write_scene
    from experiments.visualize.scenes import scene_of_folder, scene_of_split

    with joined_world(config.device, config.timeout_minutes) as world:
        if "images" in command.options:
            folder = Path(command.options["images"])
            scene = scene_of_folder(config, checkpoint, world, folder, run, count)
        else:
            with cli.mistakes_in(command.config_file):
                scene = scene_of_split(config, checkpoint, world, run, count)
    if not world.is_main:
        return
    print(scene.about)
    for note in scene.weight_notes:
        print(note)
    with _written_to(out):
        written = write_scene(scene, out)
    print("figures:", *written, sep="\n  ")  # before the animation, which may fail
    if "animate" in command.options:
        with _written_to(out):
            animation = write_animation(scene, out)
        print(f"  {animation}")


def _compare(argv: Sequence[str]) -> None:
    known = {
        "compare": cli.Option("run folders", takes_value=False),
        "out": cli.Option("folder of the table and the figures"),
    }
    options, words = cli.split_options(argv, known)
    if not words:
        raise ConfigError("command line: --compare: run folders must follow")
    folders = [Path(word) for word in words]
    out = Path(options.get("out", "output/pictures"))
    from experiments.visualize import curves
    from experiments.visualize.pages import write_overview_of_runs

    histories = [curves.read_history(folder) for folder in folders]
    groups, table = curves.group_by_seed(histories), curves.compare(histories)
    print(curves.markdown(table))
    print(curves.paths_text(folders), end="")
    with _written_to(out):
        written = [*curves.write_table(table, out), *curves.write_curves(groups, out)]
    print("comparison:", *written, sep="\n  ")
    try:
        with _written_to(out):
            written = write_overview_of_runs(folders, out)
    except DataError as error:
        print(f"no picture of what was mixed: {error}")
    else:
        for path in written:
            print(f"  {path}")


@contextmanager
def _written_to(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"command line: --out: cannot write to {out}: {reason}") from None


if __name__ == "__main__":
    sys.exit(cli.run(main))
