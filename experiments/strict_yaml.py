"""The one reader and writer of YAML: plain values alone, nothing repeated, nothing guessed.

It reads configs, the plans of studies, and the zoo's list and hashes.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from experiments.errors import ConfigError

_LARGEST_FILE = 1 << 18  # bytes
_DEEPEST = 16
_TAG = "tag:yaml.org,2002:"
_RESOLVED = (  # type, pattern and first characters of the plain scalars that are not text
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"null|Null|NULL|~|", ("n", "N", "~", "")),
)
"""YAML 1.2's core schema, except that a number has no leading zero: 010, 1:30, yes and dates are
text, which a key that wants a number refuses."""


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML of plain values: no aliases, no tags, no repeated keys. Keys are text."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _problem("aliases are not allowed", event)
        if getattr(event, "tag", None) not in (None, "!"):
            raise _problem(f"the tag {event.tag!r:.80} is not allowed", event)
        if self._depth > _DEEPEST:
            raise _problem("nested too deeply", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _problem("a key must be plain text", key)
            if key.value in mapping:
                raise _problem(f"the key {key.value!r:.80} is given twice", key)
            mapping[key.value] = self.construct_object(value, deep=True)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or _StrictLoader would read as something else."""


_StrictLoader.yaml_implicit_resolvers = {}
for _name, _pattern, _first in _RESOLVED:
    for _class in (_StrictLoader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), list(_first))


def _problem(text: str, place: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, place.start_mark)


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file, as dicts with text as keys, lists and plain values.

    Raises:
        ConfigError: it cannot be read, is too large, or is no such YAML; with file and line.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)  # a device file may have no end
        if len(content) > _LARGEST_FILE:
            raise ConfigError(f"{path}: is larger than {_LARGEST_FILE} bytes, so it is no config")
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not text; a config is a YAML file in UTF-8") from None
    except (OSError, ValueError) as error:  # a path with a null character is a ValueError
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: cannot read the config: {reason}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, origin: str) -> Any:
    """The same for text that comes from `origin`."""
    try:
        # _StrictLoader is a SafeLoader: it builds only plain types
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{origin}{line}: {' '.join(problem.split())[:300]}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{origin}: cannot read the config: {str(error)[:300]}") from None
    return only_plain(content, origin)


def yaml_text(content: Any) -> str:
    """Plain values as YAML that `parse_yaml` reads back as the same values, keys in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


def only_plain(content: Any, origin: str) -> Any:
    """The content as JSON holds it, with text as keys; a ConfigError if JSON cannot hold it."""
    try:
        text = json.dumps(content, ensure_ascii=False)
        text.encode()
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: is not plain: {error}") from None
