"""A RunConfig from a YAML file and the command line, or one clear line that says why not.

jsonargparse turns what was written into typed values and prints the help. What it is given has
been checked for keys that do not exist, so that an error can name the file and the nearest key.
"""

import dataclasses
import difflib
import functools
import types
import typing
from argparse import ArgumentError
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from experiments.config import RunConfig
from experiments.errors import ConfigError, FieldError

COMMAND_LINE = "command line"
_FILE_OF_A_SECTION = "Path to a configuration file."


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
    return settings_in(read_yaml(path), str(path))


def settings_in(content: Any, origin: str) -> dict[str, Setting]:
    """The settings of a file's content, sections with keys, under their dotted keys.

    Raises:
        ConfigError: a key that is unknown, or no key where one should be.
    """
    settings: dict[str, Setting] = {}
    if content is None:
        return settings
    if not isinstance(content, dict):
        raise ConfigError(f"{origin}: got {_shown(content)}; allowed: keys with values")
    for name, value in content.items():
        if name not in sections():
            _check_key(name, origin)
            settings[name] = Setting(value, origin)
            continue
        if value is None:
            continue  # a section that is named and left empty keeps its defaults
        if not isinstance(value, dict):
            known = ", ".join(field.name for field in dataclasses.fields(sections()[name]))
            raise ConfigError(
                f"{origin}: {name}: got {_shown(value)}; allowed: a section with the keys {known}"
            )
        for field, inner in value.items():
            _check_key(f"{name}.{field}", origin)
            settings[f"{name}.{field}"] = Setting(inner, origin)
    return settings


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
    try:
        return parser.parse_object({key: setting.value for key, setting in settings.items()})
    except (ArgumentError, RecursionError) as error:
        message = " ".join(str(error).split())
    missing = message.partition("arguments are required: ")[2]
    if missing:
        raise ConfigError(f"{file}: {missing}: missing; it has no default")
    key = message.partition('Parser key "')[2].partition('"')[0]
    if key not in settings:
        raise ConfigError(f"{file}: {message}")
    raise ConfigError(
        f"{settings[key].origin}: {key}: got {_shown(settings[key].value)}; "
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
    own = "\n".join(f"  {option:<22}{text}" for option, text in options.items())
    body = make_parser(frozenset(optional_sections())).format_help().partition("\n\n")[2]
    # jsonargparse offers a file for each section, which the command line here does not
    body = "\n".join(line for line in body.splitlines() if not line.endswith(_FILE_OF_A_SECTION))
    return f"usage: {usage}\n\n{description}\n\noptions:\n{own}\n\nkeys of the config:\n{body}"


def describe(hint: Any) -> str:
    """A type in words: what a person may write."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if hint in words:
        return words[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
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
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without aliases, and with each key once."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.constructor.ConstructorError(
                None, None, "aliases are not allowed", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be plain text", key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} stands twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file, as plain types.

    Raises:
        ConfigError: it cannot be read, and why.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not text; a config is a YAML file in UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: cannot read the config: {reason}") from None
    try:
        # _StrictLoader is a SafeLoader: it builds plain types alone
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{path}{line}: {' '.join(problem.split())}") from None
    except (RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{path}: cannot read the config: {reason}") from None
