"""A RunConfig from a YAML file and the command line, or one clear line that says why not.

jsonargparse turns what was written into typed values and prints the help. What it is given has
been checked for keys that do not exist, so that an error can name the file and the nearest key.
"""

import dataclasses
import difflib
import functools
import re
import types
import typing
from argparse import ArgumentError
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from experiments.config import RunConfig
from experiments.errors import ConfigError, FieldError
from experiments.strict_yaml import parse_yaml, read_yaml, refuse_strange

COMMAND_LINE = "command line"
_FILE_OF_A_SECTION = "Path to a configuration file."
_HELP_COLUMN = 24  # where jsonargparse begins the texts of its help, too
_DECIMAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


@dataclass(frozen=True)
class Setting:
    """A value as it was written, and the file or command line that it comes from."""

    value: Any
    origin: str


@functools.cache
def sections() -> dict[str, type]:
    """The sections of RunConfig: name -> dataclass, the optional ones included."""
    hints = typing.get_type_hints(RunConfig)
    found = {name: _dataclass_in(hint) for name, hint in hints.items()}
    return {name: section for name, section in found.items() if section is not None}


@functools.cache
def optional_sections() -> set[str]:
    """The sections that are absent unless one of their keys is set."""
    hints = typing.get_type_hints(RunConfig)
    return {name for name, section in sections().items() if hints[name] is not section}


@functools.cache
def known_keys() -> dict[str, Any]:
    """Every key that a config may have: `section.field` or `field` -> its type."""
    keys: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(RunConfig).items():
        section = _dataclass_in(hint)
        if section is None:
            keys[name] = hint
        else:
            hints = typing.get_type_hints(section)
            keys.update({f"{name}.{field}": fieldhint for field, fieldhint in hints.items()})
    return keys


def load_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """Read a config file; overrides are `section.key` -> text, as on the command line.

    An optional section is switched off by `horizontal` -> "null".

    Raises:
        ConfigError: file, key, what came and what is allowed, in one line.
    """
    config = build_config(override(read_settings(path), overrides or {}), str(path))
    if config.output is None:
        config = dataclasses.replace(config, output=str(Path("output") / Path(path).stem))
    return config


def read_settings(path: str | Path) -> dict[str, Setting]:
    """The settings of a YAML file under their dotted keys, checked against the known ones."""
    return settings_of(read_yaml(path), str(path))


def settings_of(content: Any, origin: str) -> dict[str, Setting]:
    """The settings in plain values that came from anywhere, such as a checkpoint.

    Raises:
        ConfigError: they are not sections with known keys and values that YAML could hold.
    """
    refuse_strange(content, origin)
    settings: dict[str, Setting] = {}
    if content is None:
        return settings
    if not isinstance(content, dict):
        raise ConfigError(f"{origin}: got {_shown(content)}; allowed: keys with values")
    for name, value in content.items():
        if name not in sections():
            _add(settings, name, value, origin)
            continue
        if value is None:
            continue  # a section that is named and left empty keeps its defaults
        if not isinstance(value, dict):
            known = ", ".join(field.name for field in dataclasses.fields(sections()[name]))
            raise ConfigError(
                f"{origin}: {name}: got {_shown(value)}; allowed: a section with the keys {known}"
            )
        for field, inner in value.items():
            _add(settings, f"{name}.{field}", inner, origin)
    return settings


def _add(settings: dict[str, Setting], key: Any, value: Any, origin: str) -> None:
    _check_key(key, origin)
    if key in settings:  # once as `section.key`, once within the section
        raise ConfigError(f"{origin}: the key {key!r} stands twice")
    settings[key] = Setting(value, origin)


def override(settings: Mapping[str, Setting], overrides: Mapping[str, str]) -> dict[str, Setting]:
    """Settings with what a command line says: `section.key` -> text.

    Raises:
        ConfigError: an unknown key.
    """
    found = dict(settings)
    for key, text in overrides.items():
        if key in optional_sections() and text == "null":
            found = {k: v for k, v in found.items() if not k.startswith(f"{key}.")}
            continue
        _check_key(key, COMMAND_LINE)
        refuse_strange(text, f"{COMMAND_LINE}: {key}")
        found[key] = Setting(text, COMMAND_LINE)
    return found


def build_config(settings: Mapping[str, Setting], file: str) -> RunConfig:
    """Turn settings into typed and checked sections; the file names what has no setting."""
    present = {key.partition(".")[0] for key in settings if "." in key}
    values = _typed(settings, file, present)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(RunConfig):
        section = sections().get(field.name)
        if section is None:
            arguments[field.name] = values[field.name]
        elif field.name in present:
            arguments[field.name] = _build(
                section, values[field.name].as_dict(), settings, f"{field.name}.", file
            )
    return _build(RunConfig, arguments, settings, "", file)


def _typed(settings: Mapping[str, Setting], file: str, present: set[str]) -> Namespace:
    """All values in their types, by jsonargparse; defaults where nothing was written."""
    parser = make_parser(frozenset(present & optional_sections()))
    understood = {key: _understood(key, setting) for key, setting in settings.items()}
    ready = {key: value for key, value in understood.items() if isinstance(value, str | dict)}
    try:
        # jsonargparse would read text and the values of a dict as YAML once more
        found = parser.parse_object({k: v for k, v in understood.items() if k not in ready})
        for key, value in ready.items():
            found[key] = value
        return found
    except (ArgumentError, RecursionError) as error:
        message = " ".join(str(error).split())
    missing = message.partition("arguments are required: ")[2]
    if missing:
        raise ConfigError(f"{file}: {missing}: missing; it has no default")
    key = message.partition('Parser key "')[2].partition('"')[0]
    if key not in settings:
        raise ConfigError(f"{file}: {message}")
    raise _wrong(key, settings[key])


def _understood(key: str, setting: Setting) -> Any:
    """A setting's value, with text in it read where something else than text is meant."""
    value, kinds = setting.value, _alternatives(known_keys()[key])
    choices = [
        c
        for kind in kinds
        if typing.get_origin(kind) is typing.Literal
        for c in typing.get_args(kind)
    ]
    if isinstance(value, str):
        if value == "null" and type(None) in kinds:
            return None
        if str in kinds or value in choices:
            return value
        value = _read_text(key, setting, value)
    if isinstance(value, list):
        value = [_read_text(key, setting, v) if isinstance(v, str) else v for v in value]
    takes_keys = any(dict in (kind, typing.get_origin(kind)) for kind in kinds)
    parts = value if isinstance(value, list) else [value]
    if not takes_keys and any(isinstance(part, list | dict) for part in parts):
        raise _wrong(key, setting)
    return value


def _read_text(key: str, setting: Setting, text: str) -> Any:
    """What text stands for: YAML, and decimals such as 1e-3, which YAML takes for text."""
    try:
        value = float(text) if _DECIMAL.fullmatch(text) else parse_yaml(text, setting.origin)
    except ConfigError:
        raise _wrong(key, setting) from None
    if isinstance(value, str):
        raise _wrong(key, setting)
    return value


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type that it is."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _wrong(key: str, setting: Setting) -> ConfigError:
    return ConfigError(
        f"{setting.origin}: {key}: got {_shown(setting.value)}; "
        f"allowed: {describe(known_keys()[key])}"
    )


def _build(
    section: type, values: dict[str, Any], settings: Mapping[str, Setting], prefix: str, file: str
) -> Any:
    """Make a section; what its own checks refuse becomes an error with file and key."""
    try:
        return section(**values)
    except FieldError as error:
        key = prefix + error.field
        origin = settings[key].origin if key in settings else file
        raise ConfigError(
            f"{origin}: {key}: got {_shown(error.came)}; allowed: {error.allowed}"
        ) from None
    except ValueError as error:
        message = " ".join(str(error).replace(f"{section.__name__}.", prefix).split())
        key = message.split(" ", 1)[0]
        origin = settings[key].origin if key in settings else file
        raise ConfigError(f"{origin}: {message}") from None


@functools.cache
def make_parser(wanted: frozenset[str]) -> ArgumentParser:
    """jsonargparse's parser of a RunConfig, with those optional sections that are wanted."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    optional = optional_sections()
    parser.add_class_arguments(RunConfig, None, skip=set(optional))
    for name in sorted(wanted):
        parser.add_class_arguments(sections()[name], name)
    return parser


def help_text(usage: str, description: str, options: Mapping[str, str]) -> str:
    """The help of an entry point: its own options, then every key with its default."""
    own = "\n".join(_help_line(f"  {option}", text) for option, text in options.items())
    body = make_parser(frozenset(optional_sections())).format_help().partition("\n\n")[2]
    # jsonargparse offers a file for each section, which the command line here does not
    body = "\n".join(line for line in body.splitlines() if not line.endswith(_FILE_OF_A_SECTION))
    return (
        f"usage: {usage}\n\n{description}\n\n"
        f"options (within a name, - and _ are the same):\n{own}\n\nkeys of the config:\n{body}"
    )


def _help_line(option: str, text: str) -> str:
    """An option and its text in two columns; the text begins a new line where the first is full."""
    if len(option) > _HELP_COLUMN - 2:
        return f"{option}\n{' ' * _HELP_COLUMN}{text}"
    return option.ljust(_HELP_COLUMN) + text


def describe(hint: Any) -> str:
    """A type in words: what a person may write."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if hint in words:
        return words[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if len(_alternatives(hint)) > 1:
        words_of = [describe(argument) for argument in arguments if argument is not type(None)]
        return " or ".join((["null"] if type(None) in arguments else []) + words_of)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list, each item {describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each item {describe(arguments[0])}"
    return "keys with values"


def _check_key(key: Any, origin: str) -> None:
    known = known_keys()
    if key in known:
        return
    if key in sections():
        raise ConfigError(f"{origin}: {key}: is a section; set one of its keys, as {key}.KEY")
    near = nearest(str(key), [*known, *sections()])
    raise ConfigError(f"{origin}: {_shown(key)}: unknown key; {near}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest of the known names."""
    known = list(known)
    field = name.rpartition(".")[2]
    found = [key for key in known if key.rpartition(".")[2] == field]  # in another section
    found = found or difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"the nearest is {found[0]}" if found else "--help lists the known ones"


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a type is, or that it is when it is not None."""
    for candidate in (hint, *typing.get_args(hint)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _shown(value: Any) -> str:
    """A value as Python writes it, cut off; plain values alone, whose depth is known."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
