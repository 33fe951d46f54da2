"""Checks of one field of a config section; each raises FieldError with what is allowed."""

import sys
from typing import Any

from experiments.errors import FieldError

_LARGEST = sys.float_info.max


def text(section: Any, name: str, empty: bool = False, optional: bool = False) -> None:
    value = getattr(section, name)
    if value is None and optional:
        return
    if not isinstance(value, str) or (not value and not empty) or "\0" in value:
        raise FieldError(name, value, "text" if empty else "text that is not empty")


def flag(section: Any, name: str) -> None:
    if not isinstance(getattr(section, name), bool):
        raise FieldError(name, getattr(section, name), "true or false")


def choice(section: Any, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(section, name) not in allowed:
        raise FieldError(name, getattr(section, name), "one of " + ", ".join(allowed))


def integer(
    section: Any,
    name: str,
    low: int,
    high: int = 2**31 - 1,
    optional: bool = False,
) -> None:
    value = getattr(section, name)
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise FieldError(name, value, f"a whole number from {low} to {high}")


def _range_text(low: Any, above: Any, high: Any, below: Any) -> str:
    parts = [
        f"{word} {bound}"
        for word, bound in (("from", low), ("above", above), ("up to", high), ("below", below))
        if bound is not None
    ]
    return " ".join(["a finite number", *parts])


def _in_range(value: Any, low: Any, above: Any, high: Any, below: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return (
        -_LARGEST <= value <= _LARGEST  # neither nan nor a whole number that no float holds
        and (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
        and (below is None or value < below)
    )


def number(
    section: Any,
    name: str,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    optional: bool = False,
) -> None:
    value = getattr(section, name)
    if value is None and optional:
        return
    if not _in_range(value, low, above, high, below):
        raise FieldError(name, value, _range_text(low, above, high, below))


def numbers(
    section: Any,
    name: str,
    count: int,
    low: float | None = None,
    above: float | None = None,
    below: float | None = None,
    optional: bool = False,
) -> None:
    values = getattr(section, name)
    if values is None and optional:
        return
    valid = isinstance(values, (tuple, list)) and len(values) == count
    if not valid or not all(_in_range(value, low, above, None, below) for value in values):
        raise FieldError(name, values, f"{count} times {_range_text(low, above, None, below)}")


def interval(section: Any, name: str, high: float | None = None) -> None:
    numbers(section, name, count=2, above=0)
    start, end = getattr(section, name)
    if start > end or (high is not None and end > high):
        limit = "" if high is None else f", the larger up to {high}"
        raise FieldError(name, (start, end), f"the smaller number before the larger{limit}")
