"""YAML of plain values and nothing else, and no more of it than a config needs.

PyYAML's safe loader runs nothing, but takes much that a config never means: aliases, with which a
few lines stand for billions of values, tags, merge keys, a key twice, dates, numbers of any length.
"""

import math
from pathlib import Path
from typing import Any

import yaml

from experiments.errors import ConfigError

_LARGEST_FILE = 1 << 18  # bytes
_LONGEST_TEXT = 4096  # characters, as long as a path may be
_DEEPEST = 16
_LARGEST_NUMBER = 2**63


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without aliases and tags, and with each key once."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _problem("aliases are not allowed", event)
        if getattr(event, "tag", None) not in (None, "!"):
            raise _problem(f"the tag {event.tag!r:.80} is not allowed", event)
        if len(getattr(event, "value", "")) > _LONGEST_TEXT:
            raise _problem(f"a value of more than {_LONGEST_TEXT} characters", event)
        if self._depth > _DEEPEST:
            raise _problem("nested too deeply", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _problem("a key must be plain text", key_node)
            if key_node.value in seen:
                raise _problem(f"the key {key_node.value!r:.80} stands twice", key_node)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


# a date is plain text here, and so are `<<` and `=`
_StrictLoader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.rpartition(":")[2] in ("bool", "int", "float", "null")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _problem(text: str, place: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, place.start_mark)


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file, as dicts, lists and plain values.

    Raises:
        ConfigError: it cannot be read, is too large, or is no such YAML; with file and line.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)  # what is named may have no end
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
        # _StrictLoader is a SafeLoader: it builds plain types alone
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{origin}{line}: {' '.join(problem.split())[:300]}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{origin}: cannot read the config: {str(error)[:300]}") from None
    refuse_strange(content, origin)
    return content


def refuse_strange(value: Any, origin: str, depth: int = 0) -> None:
    """Raise a ConfigError unless a value is one that a config can hold.

    Those are null, true and false, numbers of 64 bits, text, and lists and keys with values of
    such: what YAML, JSON and a checkpoint keep as it is.
    """
    if depth > _DEEPEST:
        raise ConfigError(f"{origin}: nested too deeply")
    if value is None or isinstance(value, bool | float):
        return
    if isinstance(value, int):
        if not -_LARGEST_NUMBER <= value < _LARGEST_NUMBER:
            raise ConfigError(f"{origin}: a whole number of more than 64 bits")
    elif isinstance(value, str):
        _refuse_strange_text(value, origin)
    elif isinstance(value, list | tuple):
        for inner in value:
            refuse_strange(inner, origin, depth + 1)
    elif isinstance(value, dict):
        for key, inner in value.items():
            refuse_strange(key, origin, _DEEPEST)
            refuse_strange(inner, origin, depth + 1)
    else:
        raise ConfigError(f"{origin}: a value of the type {type(value).__name__}")


def _refuse_strange_text(text: str, origin: str) -> None:
    if len(text) > _LONGEST_TEXT:
        raise ConfigError(f"{origin}: a value of more than {_LONGEST_TEXT} characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{origin}: {text!r:.80}: is not Unicode text") from None


def is_plain_argument(value: Any) -> bool:
    """Whether a value is finite and all its keys are text, so that writing it keeps it."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list | tuple):
        return all(map(is_plain_argument, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and is_plain_argument(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | str)
