"""What the commands share: the command line, and one line for a person's mistake."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from experiments.config.keys import known_keys, optional_sections, sections
from experiments.config.reading import load_config
from experiments.config.schema import RunConfig
from experiments.errors import (
    ConfigError,
    DataError,
    ProcessLost,
    SavedAndStopped,
    TrainingStopped,
    UserError,
    nearest,
)


@dataclass(frozen=True)
class Option:
    """An option of a command that is no key of the config."""

    help: str
    takes_value: bool = True
    required: bool = False


@dataclass(frozen=True)
class Command:
    """A parsed command line; an option without a value is there with the value ""."""

    config: RunConfig
    config_file: str
    options: dict[str, str]

    @property
    def only_check(self) -> bool:
        """Whether the command is to check everything and do nothing."""
        return "check" in self.options


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Call a command's `main` and give its exit code, listed in `docs/reliability.md`."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except SavedAndStopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr)
        # torchrun takes any other code for a failure and would restart the processes
        return 0 if "TORCHELASTIC_RUN_ID" in os.environ else stop.exit_code
    except ProcessLost as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (UserError, TrainingStopped) as error:
        # all ranks find the same mistake in the config; one reports it
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, ConfigError):
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


@contextmanager
def mistakes_in(file: str) -> Iterator[None]:
    """Prefix mistakes that show only after the config was read with the config file's name."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(f"{file}: {error}") from None


def parse(
    argv: Sequence[str], module: str, description: str, options: Mapping[str, Option] | None = None
) -> Command | None:
    """Parse `--config FILE`, the command's own options and `--section.key VALUE` overrides.

    Returns:
        The command, or None if nothing is left to do, after `--help`.

    Raises:
        ConfigError: an unknown option, a missing value, or whatever `load_config` raises.
    """
    own = {
        "config": Option("the experiment, a YAML file", required=True),
        **(options or {}),
        "check": Option("try model, data and weights, and exit", takes_value=False),
    }
    if any(word in ("-h", "--help") for word in argv):
        print(_help_text(module, description, own), end="")
        return None
    keys = {name: Option("") for name in (*known_keys(), *optional_sections())}
    found, words = split_options(argv, {**keys, **own})
    if words:
        raise ConfigError(f"command line: {words[0]!r}: expected --config FILE or --KEY VALUE")
    given = {name: value for name, value in found.items() if name in own}
    overrides = {name: value for name, value in found.items() if name not in own}
    if not argv:
        print(_configs_text(), end="")
    for name, option in own.items():
        if option.required and name not in given:
            raise ConfigError(f"command line: --{name}: missing; it is {option.help}")
    return Command(load_config(given["config"], overrides), given["config"], given)


def _configs_text() -> str:
    """The configs of this project, each with its first line, a comment."""
    lines = []
    for path in sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")):
        about = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
        lines.append((os.path.relpath(path), about))
    width = max(len(path) for path, _ in lines)
    return "".join(f"{path:<{width}}  {about}\n" for path, about in lines)


def split_options(
    argv: Sequence[str], known: Mapping[str, Option]
) -> tuple[dict[str, str], list[str]]:
    """Split a command line into options (name -> value, "" for one without) and other words.

    Within an option's name, `-` and `_` are the same.

    Raises:
        ConfigError: an option that is unknown, given twice or lacks its value.
    """
    parser = argparse.ArgumentParser(
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
    )
    for name, option in known.items():
        _add(parser, f"--{name}", option)
    try:
        found, others = parser.parse_known_args([_with_known_name(word, known) for word in argv])
    except argparse.ArgumentError as error:
        option = known[(error.argument_name or "").removeprefix("--")]
        problem = (
            "a value must follow" if option.takes_value else f"takes no value; {error.message}"
        )
        raise ConfigError(f"command line: {error.argument_name}: {problem}") from None
    for word in others:
        if word.startswith("--") and word != "--":
            name = word[2:].partition("=")[0]
            raise ConfigError(f"command line: --{name}: unknown option; {nearest(name, known)}")
    for name, values in vars(found).items():
        if len(values) > 1:
            raise ConfigError(f"command line: --{name}: given twice")
    return {name: values[0] for name, values in vars(found).items()}, others


def whole_number(where: str, text: str, most: int = 1024) -> int:
    """A whole number from 1 to the most that is allowed.

    Raises:
        ConfigError: it names where the number was given.
    """
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise ConfigError(f"{where}: got {text!r}; allowed: a whole number from 1 to {most}")
    return int(text)


def _with_known_name(word: str, known: Mapping[str, Option]) -> str:
    name, equals, value = word.partition("=")
    plain = name.removeprefix("--").replace("-", "_")
    return f"--{plain}{equals}{value}" if word.startswith("--") and plain in known else word


def _add(group: argparse._ActionsContainer, spelt: str, option: Option, value: str = "") -> None:
    """Add an option whose values are gathered in a list; "" stands for none."""
    name, help_text = spelt.removeprefix("--"), option.help.replace("%", "%%")
    if option.takes_value:
        group.add_argument(spelt, dest=name, help=help_text, action="append", metavar=value)
    else:
        group.add_argument(spelt, dest=name, help=help_text, action="append_const", const="")


def _help_text(module: str, description: str, own: Mapping[str, Option]) -> str:
    """The help of a command: its own options, then every key of the config by section."""
    usage = [f"python -m {module}"]
    parser = argparse.ArgumentParser(
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=description,
    )
    group = parser.add_argument_group("options (within a name, - and _ are the same)")
    for name, option in own.items():
        spelt, value = f"--{name.replace('_', '-')}", name.upper()
        _add(group, spelt, option, value)
        text = f"{spelt} {value}" if option.takes_value else spelt
        usage.append(text if option.required else f"[{text}]")
    parser.usage = " ".join([*usage, "[--SECTION.KEY VALUE ...]"])
    _add(group, "--SECTION.KEY", Option("set a key of the config, in place of the file"), "VALUE")
    titles = {"": "keys of the config"}
    for name, section in sections().items():
        optional = f"; --{name} null switches it off" if name in optional_sections() else ""
        titles[name] = (section.__doc__ or "").partition("\n")[0].removesuffix(".") + optional
    groups = {name: parser.add_argument_group(title) for name, title in titles.items()}
    for name, key in known_keys().items():
        default = "no default" if key.default is None else f"default: {key.default}"
        text = f"{key.meaning} ({key.allowed}; {default})"
        _add(groups[name.rpartition(".")[0]], f"--{name}", Option(text), "VALUE")
    return parser.format_help()
