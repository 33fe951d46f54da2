"""The released checkpoints: `python -m experiments.zoo list | download | verify | convert`."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments import cli
from experiments.config.reading import load_config
from experiments.errors import ConfigError, UserError
from experiments.zoo.manifest import MANIFEST, Checkpoint, Manifest, read_manifest

if TYPE_CHECKING:
    from experiments.zoo.download import Zoo

USAGE = """usage: python -m experiments.zoo COMMAND [OPTION ...]

  list                    every checkpoint: on disk or not, verified or not, published top-1
  download NAME... | --all
                          fetch missing files, check the others; continues interrupted downloads
  verify [NAME...]        check the files on disk, by content and by hash
  convert FILE            write any checkpoint as safetensors, with its config and provenance in
                          the metadata

NAME is a checkpoint's name, its file's or its config's; FILE is one of these or a path.

options:
  --weights DIR      folder of the weights (default: $WEIGHTS, else weights)
  --manifest FILE    list of the zoo (default: weights/zoo.yaml of this project)
  --cookies FILE     download: cookies in Netscape's format, for files of Google Drive that need
                     somebody signed in
  --config FILE      convert: the config whose model the file fits, if neither the file nor the
                     zoo tells it
  --averaged         convert: the averaged weights (EMA) that FILE holds besides the last ones
  --output FILE      convert: the file to write (default: FILE with the ending .safetensors, or
                     .averaged.safetensors)
"""
_OPTIONS = {
    name: cli.Option("", takes_value=name not in ("all", "averaged"))
    for name in ("weights", "manifest", "all", "cookies", "config", "averaged", "output")
}
_OPTIONS_OF = {
    "list": (),
    "download": ("all", "cookies"),
    "verify": (),
    "convert": ("config", "averaged", "output"),
}


def main(argv: Sequence[str]) -> None:
    """Read the command line and run its command."""
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(USAGE, end="")
        return
    options, words = cli.split_options(argv, _OPTIONS)
    verb, *names = words or [""]
    if verb not in _OPTIONS_OF:
        raise ConfigError(f"command line: {verb!r}: allowed: {', '.join(_OPTIONS_OF)}")
    for name in options:
        if name not in ("weights", "manifest", *_OPTIONS_OF[verb]):
            raise ConfigError(f"command line: --{name}: not an option of {verb}")
    manifest = read_manifest(Path(options.get("manifest", MANIFEST)))
    cookies = options.get("cookies")
    if cookies is not None and not Path(cookies).is_file():
        raise ConfigError(f"command line: --cookies: {cookies} is not a file")
    folder = Path(options.get("weights") or os.environ.get("WEIGHTS") or "weights")
    from experiments.zoo.download import Zoo  # loads torch, which --help does not need

    zoo = Zoo(folder, Path(cookies) if cookies else None)
    if verb == "list":
        if names:
            raise ConfigError(f"command line: {names[0]!r}: list takes no name")
        list_zoo(manifest, zoo)
    elif verb == "download":
        download(manifest, zoo, names, "all" in options)
    elif verb == "verify":
        verify(manifest, zoo, names)
    else:
        convert_file(manifest, zoo, names, options)


def terminal() -> Console:
    """Standard output; in a pipe, and in a terminal that is too narrow, lines keep their length."""
    width = max(shutil.get_terminal_size().columns, 130) if sys.stdout.isatty() else 10_000
    return Console(width=width, markup=False, emoji=False, highlight=False)


def list_zoo(manifest: Manifest, zoo: "Zoo") -> None:
    """Print the table of all checkpoints."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("name", "file", "data set", "method"):
        table.add_column(title, no_wrap=True)
    for title in ("published", "MB"):
        table.add_column(title, justify="right")
    table.add_column("on disk", overflow="fold")
    for entry in manifest.checkpoints.values():
        state, arrived = zoo.state(entry)
        published = "-" if entry.published_top1 is None else f"{entry.published_top1:.2f}"
        size = f"{arrived / 1e6:.1f}" if arrived else "-"
        words = Text(state, "green" if state == "verified" else "")
        table.add_row(entry.name, entry.file, entry.dataset, entry.method, published, size, words)
    terminal().print(table)
    terminal().print(f"folder: {zoo.folder}", soft_wrap=True)


def download(manifest: Manifest, zoo: "Zoo", names: list[str], everything: bool) -> None:
    """Fetch checkpoints; go on with the others after a failure."""
    if everything == bool(names):
        raise ConfigError("command line: download: give names, or --all")
    wanted = _named(manifest, names) or list(manifest.checkpoints.values())
    _each(wanted, zoo.obtain, "could not be had")


def verify(manifest: Manifest, zoo: "Zoo", names: list[str]) -> None:
    """Check the named files, or all that are on disk."""
    wanted = _named(manifest, names)
    if not names:
        wanted = [e for e in manifest.checkpoints.values() if zoo.path(e).exists()]
        if not wanted:
            raise UserError(
                f"{zoo.folder}: holds no checkpoint of the zoo; --help tells how to get one"
            )

    def check(entry: Checkpoint) -> None:
        said = f"{entry.name}: verified, SHA-256 {zoo.verify(entry)}"
        terminal().print(said, style="green", soft_wrap=True)

    _each(wanted, check, "did not pass")


def convert_file(manifest: Manifest, zoo: "Zoo", words: list[str], options: dict[str, str]) -> None:
    """Write one checkpoint as safetensors."""
    if len(words) != 1:
        raise ConfigError(f"command line: convert: give one FILE, got {len(words)}")
    path, entry = Path(words[0]), None
    if path.exists():
        entry = next((e for e in manifest.checkpoints.values() if e.file == path.name), None)
    else:
        entry = manifest.checkpoint(words[0])
        path = zoo.path(entry)
    from experiments.zoo.convert import config_of, convert

    if entry is not None and path.parent.resolve() == zoo.folder.resolve():
        zoo.verify(entry)
    if "config" in options:
        config = load_config(options["config"])
    elif entry is not None:
        config = load_config(manifest.config_path(entry.config))
    elif (own := config_of(path)) is not None:
        config = own
    else:
        raise ConfigError(
            f"{path}: carries no config, and the zoo does not know a file of this name; name one: "
            "--config configs/NAME.yaml"
        )
    averaged = "averaged" in options
    ending = "averaged.safetensors" if averaged else "safetensors"
    output = Path(options.get("output", path.with_name(f"{path.name.split('.')[0]}.{ending}")))
    loaded = convert(path, config, output, entry, averaged)
    print(f"{output}: the weights of {path}, with their config and provenance")
    for note in loaded.notes:
        print(f"  {note}")


def _named(manifest: Manifest, names: list[str]) -> list[Checkpoint]:
    return list(dict.fromkeys(manifest.checkpoint(name) for name in names))


def _each(entries: list[Checkpoint], act: Callable[[Checkpoint], object], failure: str) -> None:
    """Call `act` on each checkpoint; print each failure with its advice, and go on.

    Raises:
        SystemExit: with status 2, if any failed.
    """
    failed = []
    for entry in entries:
        try:
            act(entry)
        except UserError as error:
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
            for line in getattr(error, "advice", ()):
                print(f"  {line}", file=sys.stderr)
            failed.append(entry.name)
    if failed:
        print(f"{len(failed)} of {len(entries)} {failure}: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(UserError.exit_code)


if __name__ == "__main__":
    sys.exit(cli.run(main))
