"""The keys that a config may have, read from its schema: meaning, default, what is allowed."""

import dataclasses
import functools
import inspect
import json
import re
import types
import typing
from typing import Annotated, Any, Literal

from experiments.config.schema import RunConfig, as_plain


@dataclasses.dataclass(frozen=True)
class Key:
    """A key that a config may have."""

    hint: Any
    default: str | None
    """As text, or None where the key must be given."""
    meaning: str

    @property
    def allowed(self) -> str:
        """What a person may write, in words."""
        return _allowed(self.hint)


@functools.cache
def sections() -> dict[str, type]:
    """The sections of RunConfig, including the optional ones: name -> dataclass."""
    kinds = {n: alternatives(h)[0] for n, h in typing.get_type_hints(RunConfig).items()}
    return {name: kind for name, kind in kinds.items() if hasattr(kind, "__dataclass_fields__")}


@functools.cache
def optional_sections() -> set[str]:
    """The sections that are absent unless one of their keys is set."""
    hints = typing.get_type_hints(RunConfig)
    return {name for name, section in sections().items() if hints[name] is not section}


@functools.cache
def known_keys() -> dict[str, Key]:
    """Every key that a config may have, as `field` or `section.field`."""
    keys = {name: key for name, key in _keys_of(RunConfig).items() if name not in sections()}
    for name, section in sections().items():
        keys |= {f"{name}.{field}": key for field, key in _keys_of(section).items()}
    return keys


def _keys_of(section: Any) -> dict[str, Key]:
    hints = typing.get_type_hints(section, include_extras=True)
    # tokenmixup's sections are plain dataclasses, with an "Attributes:" part in their docstring
    listed = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(section) or "", re.M)
    meanings = {name: " ".join(text.replace("``", "").split()) for name, text in listed}
    for name, info in getattr(section, "__pydantic_fields__", {}).items():
        meanings[name] = info.description
    return {
        f.name: Key(hints[f.name], _default(f), meanings.get(f.name, ""))
        for f in dataclasses.fields(section)
    }


def _default(field: dataclasses.Field[Any]) -> str | None:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return None
    return value if isinstance(value, str) else json.dumps(as_plain(value))


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


_WORDS = {int: "a whole number", float: "a finite number", bool: "true or false"}
_BOUNDS = (("ge", "from"), ("gt", "above"), ("le", "up to"), ("lt", "below"))


def _allowed(hint: Any) -> str:
    """A type in words: what a person may write."""
    if len(alternatives(hint)) > 1:
        kinds = [_allowed(kind) for kind in alternatives(hint) if kind is not type(None)]
        return " or ".join(["null", *kinds])
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        kind, *marks = arguments
        limits = [limit for mark in marks for limit in getattr(mark, "metadata", ())]
        bounds = [f"{w} {getattr(m, n)}" for n, w in _BOUNDS for m in limits if hasattr(m, n)]
        words = [mark for mark in marks if isinstance(mark, str)]
        return words[0] if words else " ".join([_allowed(kind), *bounds])
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f" of {len(arguments)}"
        return f"a list{count}, each item {_allowed(arguments[0])}"
    return _WORDS[hint]
