"""A config from YAML, a checkpoint and the command line: settings with their origins, then checked.

Every mistake is one line: where it stands, the key, what came, what is allowed.
"""

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter, ValidationError

from experiments.config.keys import alternatives, known_keys, optional_sections, sections
from experiments.config.schema import RunConfig
from experiments.errors import ConfigError, FieldError, nearest
from experiments.strict_yaml import only_plain, parse_yaml, read_yaml

COMMAND_LINE = "command line"


@dataclasses.dataclass(frozen=True)
class Setting:
    """A value as it was written, and the file or command line that it comes from."""

    value: Any
    origin: str


def load_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """Read a config file; overrides are `section.key` -> text, as on the command line.

    `horizontal` -> "null" switches that optional section off.

    Raises:
        ConfigError: file, key, what came and what is allowed, in one line.
    """
    config = build_config(override(read_settings(path), overrides or {}), str(path))
    if config.output is None:
        config = dataclasses.replace(config, output=str(Path("output") / Path(path).stem))
    return config


def read_settings(path: str | Path) -> dict[str, Setting]:
    """The settings of a YAML file under their dotted keys, all of them known."""
    return settings_of(read_yaml(path), str(path))


def settings_of(content: Any, origin: str) -> dict[str, Setting]:
    """The settings in plain values of any origin, such as a checkpoint.

    Raises:
        ConfigError: they are not sections with known keys and values that YAML can hold.
    """
    content = only_plain(content, origin)
    if not isinstance(content, dict | None):
        raise ConfigError(f"{origin}: got {_shown(content)}; allowed: keys with values")
    settings: dict[str, Setting] = {}
    for name, value in (content or {}).items():
        if name not in sections():
            inner = {name: value}
        elif isinstance(value, dict | None):  # an empty section keeps its defaults
            inner = {f"{name}.{key}": own for key, own in (value or {}).items()}
        else:
            known = ", ".join(f.name for f in dataclasses.fields(sections()[name]))
            raise ConfigError(
                f"{origin}: {name}: got {_shown(value)}; allowed: a section with the keys {known}"
            )
        for key, own in inner.items():
            _check_key(key, origin)
            if key in settings:  # as `section.key` and within the section
                raise ConfigError(f"{origin}: the key {key!r} is given twice")
            settings[key] = Setting(own, origin)
    return settings


def override(settings: Mapping[str, Setting], overrides: Mapping[str, str]) -> dict[str, Setting]:
    """Settings with those of a command line on top: `section.key` -> text.

    Text stays text for a key that takes text, and is read as YAML for any other.

    Raises:
        ConfigError: an unknown key, or text that is no YAML.
    """
    found = dict(settings)
    for key, text in overrides.items():
        if key in optional_sections() and text == "null":
            found = {k: v for k, v in found.items() if not k.startswith(f"{key}.")}
            continue
        _check_key(key, COMMAND_LINE)
        text = only_plain(text, f"{COMMAND_LINE}: {key}")  # bytes that are no Unicode text
        found[key] = Setting(_read_text(key, text), COMMAND_LINE)
    return found


def _read_text(key: str, text: str) -> Any:
    kinds = alternatives(known_keys()[key].hint)
    if text == "null" and type(None) in kinds:
        return None
    bases = {typing.get_args(k)[0] if typing.get_origin(k) is Annotated else k for k in kinds}
    if str in bases or any(typing.get_origin(base) is Literal for base in bases):
        return text
    try:
        return parse_yaml(text, COMMAND_LINE)
    except ConfigError:
        raise _wrong(key, text, COMMAND_LINE) from None


def build_config(settings: Mapping[str, Setting], file: str) -> RunConfig:
    """Turn settings into typed and checked sections; `file` is named where a setting is missing."""
    content: dict[str, Any] = {}
    for key, setting in settings.items():
        section, dot, name = key.rpartition(".")
        (content.setdefault(section, {}) if dot else content)[name] = setting.value
    try:
        # JSON knows lists and no tuples, so pydantic can be strict about everything else
        return _RUN.validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise _mistake(error, settings, file) from None


_RUN = TypeAdapter(RunConfig)


def _mistake(error: ValidationError, settings: Mapping[str, Setting], file: str) -> ConfigError:
    """The first mistake that pydantic found, with its origin and in our words."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"][:2]))
    if key not in known_keys():  # an element of a list, or checks of a whole section
        key = key.partition(".")[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        key = f"{key}.{cause.field}".lstrip(".")
        return _wrong(key, cause.came, _origin(key, settings, file), cause.allowed)
    if key in settings:
        return _wrong(key, settings[key].value, settings[key].origin)
    if key in known_keys():
        return ConfigError(f"{file}: {key}: missing; it has no default")
    if not key:  # such as values nested too deeply for pydantic
        return ConfigError(f"{file}: {first['msg']}")
    # tokenmixup's own check, whose message begins with the class and the field
    message = str(cause).replace(f"{sections()[key].__name__}.", f"{key}.")
    origin = _origin(message.partition(" ")[0], settings, file)
    return ConfigError(f"{origin}: {' '.join(message.split())}")


def _origin(key: str, settings: Mapping[str, Setting], file: str) -> str:
    return settings[key].origin if key in settings else file


def _wrong(key: str, came: Any, origin: str, allowed: str | None = None) -> ConfigError:
    return ConfigError(
        f"{origin}: {key}: got {_shown(came)}; allowed: {allowed or known_keys()[key].allowed}"
    )


def _check_key(key: str, origin: str) -> None:
    if key in known_keys():
        return
    if key in sections():
        raise ConfigError(f"{origin}: {key}: is a section; set one of its keys, as {key}.KEY")
    near = nearest(key, [*known_keys(), *sections()])
    raise ConfigError(f"{origin}: {_shown(key)}: unknown key; {near}")


def _shown(value: Any) -> str:
    """A value as Python writes it, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
