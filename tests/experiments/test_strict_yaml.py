"""YAML: what is read as a number, and what stays text."""

import math

import pytest

from experiments.strict_yaml import parse_yaml, yaml_text

PLAIN_SCALARS = {
    "7": 7,
    "-7": -7,
    "0x1f": 31,
    "0o17": 15,
    "1e-3": 0.001,
    "6.0e-4": 6e-4,
    ".5": 0.5,
    "1.": 1.0,
    "-.inf": -math.inf,
    "true": True,
    "FALSE": False,
    "null": None,
    "~": None,
    "": None,
    # YAML 1.1 reads 8, 90, 90.5, 1000, booleans, a date, a merge key and a default key
    **{
        text: text
        for text in ("010", "010.5", "1:30", "1:30.5", "1_000", "0b1", "yes", "no", "on", "Off")
    },
    **{text: text for text in ("2001-01-01", "<<", "=", "1e", "e3", "0x", "+", ".", "nULL")},
}


@pytest.mark.parametrize(("written", "value"), PLAIN_SCALARS.items())
def test_yaml_reads_the_types_of_its_core_schema(written, value):
    found = parse_yaml(f"a: {written}", "text")["a"]
    assert (type(found), found) == (type(value), value)
    assert parse_yaml(f"a: '{written}'", "text") == {"a": written}
    for content in ({"a": value}, {"a": written}, {written: 1}):
        assert parse_yaml(yaml_text(content), "text") == content


def test_keys_are_text():
    assert parse_yaml("{1: a, yes: b, 0.10: c, null: d}", "text") == dict(
        zip(("1", "yes", "0.10", "null"), "abcd", strict=True)
    )
