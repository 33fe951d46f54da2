"""What the entry points share: the command line, and a person's mistake told in one line."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from experiments.config import (
    RunConfig,
    help_text,
    known_keys,
    load_config,
    nearest,
    optional_sections,
)
from experiments.errors import (
    ConfigError,
    DataError,
    ProcessLost,
    SavedAndStopped,
    TrainingStopped,
    UserError,
)


@dataclass(frozen=True)
class Option:
    """An option of an entry point that is no key of the config."""

    help: str
    takes_value: bool = True
    required: bool = False


@dataclass(frozen=True)
class Command:
    """A parsed command line."""

    config: RunConfig
    config_file: str
    options: dict[str, str]


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Call an entry point and give its exit code, which `docs/reliability.md` lists."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except SavedAndStopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr)
        # torchrun takes any other code for a failure, and would start the processes again
        return 0 if "TORCHELASTIC_RUN_ID" in os.environ else stop.exit_code
    except ProcessLost as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (UserError, TrainingStopped) as error:
        # of several processes, all make the same mistake and one tells it
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, ConfigError):
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads our output, such as `head`, has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


@contextmanager
def mistakes_in(file: str) -> Iterator[None]:
    """Put the config file in front of what is found wrong with it after it was read."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(f"{file}: {error}") from None


def parse(
    argv: Sequence[str], module: str, description: str, options: Mapping[str, Option] | None = None
) -> Command | None:
    """Read `--config FILE`, the options of the entry point and `--section.key VALUE` overrides.

    Returns:
        The command, or None where no more is to be done: the help is printed, or all is checked.

    Raises:
        ConfigError: an unknown option, a missing value, or what the config itself raises.
    """
    own = {
        "config": Option("the experiment, a YAML file", required=True),
        **(options or {}),
        "check": Option("check the command line and the config, and do no more", takes_value=False),
    }
    if any(word in ("-h", "--help") for word in argv):
        _print_help(module, description, own)
        return None
    keys = {name: Option("") for name in (*known_keys(), *optional_sections()) if name not in own}
    found, words = split_options(argv, {**own, **keys})
    if words:
        raise ConfigError(f"command line: {words[0]!r}: expected --config FILE or --KEY VALUE")
    given = {name: value for name, value in found.items() if name in own}
    overrides = {name: value for name, value in found.items() if name not in own}
    for name, option in own.items():
        if option.required and name not in given:
            raise ConfigError(f"command line: --{name}: missing; it is {option.help}")
    command = Command(load_config(given["config"], overrides), given["config"], given)
    return None if "check" in given else command


def split_options(
    argv: Sequence[str], known: Mapping[str, Option]
) -> tuple[dict[str, str], list[str]]:
    """Split a command line into options (name -> value, "" where it takes none) and other words.

    Raises:
        ConfigError: an option that is unknown, stands twice or lacks its value.
    """
    options: dict[str, str] = {}
    others: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if name not in known and name.replace("-", "_") in known:
            name = name.replace("-", "_")  # no key has a hyphen
        if not word.startswith("--") or not name:
            others.append(word)
            continue
        if name not in known:
            raise ConfigError(f"command line: --{name}: unknown option; {nearest(name, known)}")
        if name in options:
            raise ConfigError(f"command line: --{name}: given twice")
        if not known[name].takes_value and equals:
            raise ConfigError(f"command line: --{name}: takes no value, got {value!r}")
        if known[name].takes_value and not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"command line: --{name}: a value must follow")
            value = words.pop(0)
        options[name] = value
    return options, others


def _print_help(module: str, description: str, options: Mapping[str, Option]) -> None:
    shown = {}
    usage = [f"python -m {module}"]
    for name, option in options.items():
        spelt = name.replace("_", "-")
        text = f"--{spelt} {name.upper()}" if option.takes_value else f"--{spelt}"
        shown[text] = option.help
        usage.append(text if option.required else f"[{text}]")
    shown["--SECTION.KEY VALUE"] = "overrides a key of the config"
    print(help_text(" ".join([*usage, "[--SECTION.KEY VALUE ...]"]), description, shown))
