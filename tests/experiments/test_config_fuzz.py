"""Any content of a config gives a valid RunConfig or one line that names the file.

Any valid RunConfig gives a model or one line that names the key.
The generators cover every key, and YAML that no config should be written in.
"""

import json
import time

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from experiments.config.keys import known_keys, sections
from experiments.config.reading import COMMAND_LINE, build_config, load_config, settings_of
from experiments.config.schema import RunConfig, as_plain
from experiments.errors import ConfigError
from experiments.models.build import build_model
from experiments.strict_yaml import yaml_text

KEYS = sorted(known_keys())
SECONDS = 5.0  # a case takes about 20 ms; a machine may be busy
DEEP = 100

NUMBERS = st.one_of(
    st.integers(-3, 12),
    st.sampled_from([2**31, 2**63 - 1, 2**63, -(2**63), 10**400, -(10**400)]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 5e-324, 1.7976931348623157e308]),
)
WORDS = st.sampled_from(
    [
        *("", " ", "null", "~", "true", "yes", "off", "nan", ".nan", "-.inf", "1e-3", "1e999"),
        *("0x1f", "017", "0o17", "1:30:59", "1_000", "2001-01-01", "2001-99-99", "0b_", "="),
        *("<<", "[1, 2]", "[0.5, 1]", "{a: 1}", "{a: 1, a: 2}", "&a 1", "*a", "!!python/none x"),
        *("!!python/object/apply:os.system [touch it-ran]", "&a [*a]", "[" * DEEP, "@file"),
        *("${HOME}", "../..", "a\0b", "\ud800", "\ufeff", "a\nb", "é", "\u202e", "x" * 5000),
        *("cosine", "step", "skip", "cpu", "fp16", "attention", "digits", "9" * 5000, "-" * 99),
    ]
)
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS | st.text(max_size=6)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=4,
)
FIELDS = st.sampled_from(KEYS) | st.sampled_from(
    [*sections(), "model.nam", "data.", ".", "", "horizontal", "model.kwargs.a", "__path__", "cfg"]
)
# valid values, so that many generated configs are valid
PLAUSIBLE = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "timeout_minutes": st.floats(1e-9, 1e9),
        "output": st.text(min_size=1, max_size=5),
        "precision": st.sampled_from(["fp32", "bf16", "fp16"]),
        "model.kwargs": st.dictionaries(
            st.text(max_size=4), st.integers(-9, 9) | st.text(max_size=6) | st.none(), max_size=2
        ),
        "data.scale": st.tuples(st.floats(1e-3, 0.5), st.floats(0.5, 1)).map(list),
        "data.auto_augment": st.text(max_size=4) | st.none(),
        "data.batch_size": st.integers(1, 2**31 - 1),
        "mixup.mixup_alpha": st.floats(0, 2),
        "schedule.lr": st.floats(1e-300, 1e300) | st.just("1e-3"),
        "horizontal.layers": st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
        "horizontal.tau": st.floats(0, 1),
        "horizontal.rho": st.floats(0, 1),
        "vertical.layers": st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True),
        "vertical.kappa": st.integers(1, 2**40),
    },
)

# shrinking may take minutes, and the cases are short anyway
quick = settings(
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def outcome(path, overrides=None):
    """Read a config; None if it is refused in one line."""
    start = time.process_time()
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        message = str(error)
        assert message.startswith((str(path), f"{COMMAND_LINE}: ")), message
        assert "\n" not in message and len(message) < 1500 + len(str(path)), message
        config = None
    assert time.process_time() - start < SECONDS
    return config


def assert_whole(config, folder):
    """An accepted config can be written as YAML and JSON, and reads back equal."""
    assert isinstance(config, RunConfig)
    plain = as_plain(config)
    again = folder / "again.yaml"
    again.write_text(yaml_text(plain))
    assert load_config(again) == config
    through_json = settings_of(json.loads(json.dumps(plain, allow_nan=False)), "file")
    assert build_config(through_json, "file") == config


def check(folder, content, overrides=None):
    path = folder / "fuzz.yaml"
    path.write_bytes(content)
    config = outcome(path, overrides)
    if config is not None:
        assert_whole(config, folder)


@settings(quick, max_examples=200)
@given(flat=st.dictionaries(FIELDS, VALUES, max_size=4), near=PLAUSIBLE)
def test_values_of_every_kind_under_every_key(tmp_path, flat, near):
    content: dict = {}
    for key, value in {**near, **flat}.items():
        section, dot, field = key.partition(".")
        inner = content.setdefault(section, {}) if dot else content
        if isinstance(inner, dict):
            inner[field if dot else key] = value
    text = yaml.safe_dump(content, allow_unicode=False)
    check(tmp_path, text.encode("utf-8", "surrogatepass"))


@settings(quick, max_examples=150)
@given(flat=st.dictionaries(FIELDS, VALUES.map(str) | WORDS, min_size=1, max_size=3))
def test_overrides_of_every_kind(tmp_path, flat):
    check(tmp_path, b"", flat)


HOSTS = {
    "vit_tiny_patch16_224": {"embed_dim": 8, "depth": 2, "num_heads": 2, "patch_size": 8},
    "beit_base_patch16_224": {"embed_dim": 8, "depth": 2, "num_heads": 2, "patch_size": 8},
    "eva02_tiny_patch14_224": {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
    "cct_2_3x2_32": {"embed_dim": 8, "depth": 2, "num_heads": 2},
}
"""Hosts that are built in milliseconds with these arguments."""
ARGUMENTS = [
    *("embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio", "global_pool", "class_token"),
    *("norm_layer", "act_layer", "pos_embed", "reg_tokens", "init_values", "qkv_bias", "in_chans"),
    *("drop_path", "pos_drop_rate", "patch_drop_rate", "weight_init", "dynamic_img_size", "colour"),
    *("checkpoint_path", "pretrained", "features_only", "dtype", "self", "model_name", "kwargs"),
]
ODD = st.sampled_from(
    [0, 1, 2, 3, 8, -1, 2.5, 1e308, True, False, None, "", "x", "avg", "token", "none", "8"]
) | st.sampled_from([[], [8, 8], [0, 0], [8, 8, 8], {}, {"a": 1}])


@settings(quick, max_examples=150)
@given(
    name=st.sampled_from(sorted(HOSTS)),
    kwargs=st.dictionaries(st.sampled_from(ARGUMENTS), ODD, max_size=2),
    image_size=st.sampled_from([16, 16, 16, 1, 7, 15]),
    horizontal=st.none() | st.fixed_dictionaries({"layers": st.sampled_from([[0], [1], [0, 1]])}),
    kappa=st.none() | st.sampled_from([1, 4, 999]),
)
@example("vit_tiny_patch16_224", {"depth": 0}, 16, None, None)
@pytest.mark.filterwarnings("ignore")
def test_a_valid_config_gives_a_model_or_one_line(name, kwargs, image_size, horizontal, kappa):
    content: dict = {
        "model": {"name": name, "image_size": image_size, "kwargs": HOSTS[name] | kwargs}
    }
    if horizontal is not None:
        content["horizontal"] = {**horizontal, "tau": 0.1, "rho": 0.01}
    if kappa is not None:
        content["vertical"] = {"layers": [1], "kappa": kappa}
    config = build_config(settings_of(content, "file"), "file")
    try:
        model = build_model(config, 3)
    except ConfigError as error:
        message = str(error)
        assert message.startswith(("model", "horizontal", "vertical")), message
        assert "\n" not in message and len(message) < 1500, message
        return
    logits = model.eval()(torch.rand(2, 3, image_size, image_size))
    assert logits.shape == (2, 3)


FRAGMENTS = st.sampled_from(
    [
        *("seed: 1\n", "data: {workers: 0}\n", "data.workers: 1\n", "model:\n", "vertical: {}\n"),
        *("  kwargs: &a {x: 1}\n", "  kwargs: *a\n", "  name: !!str cct\n", "<<: {seed: 3}\n"),
        *("? [a]\n: b\n", "? {a: b}\n: c\n", "---\n", "...\n", "%YAML 9.9\n", "%TAG ! x:\n"),
        *("- 1\n", "!!set {a}\n", "!!omap [a: 1]\n", "!!binary aGk=\n", "!!int ''\n", "!!bool x\n"),
        *("seed: !!timestamp 2001-01-01\n", "seed: !!float x\n", "a: |\n  b\n", "a: >\n", "? \n"),
        *("!<", "!x!y ", "\\x", "\x85", "\u2028", "\ufeff", *"{}[]'\"#&*!@`%:\t\r\0"),
    ]
)


@settings(quick, max_examples=200)
@given(
    content=st.lists(FRAGMENTS | st.text(max_size=3), max_size=6).map(
        lambda parts: "".join(parts).encode("utf-8", "surrogatepass")
    )
    | st.binary(max_size=60)
)
@example(content="seed: 3".encode("utf-16"))
@example(content=b"\xff" * 9)
@example(content=b"\xef\xbb\xbfseed: 3")
def test_text_and_bytes_of_every_kind(tmp_path, content):
    check(tmp_path, content)


LAUGHS = (
    "{a: &a [x, x, x, x, x, x, x, x, x], "
    + ", ".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]"
        for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
    )
    + "}"
)
HARMFUL = {
    "aliases": f"model: {{kwargs: {LAUGHS}}}",
    "aliases in text": f"model: {{kwargs: '{LAUGHS}'}}",
    "aliases in text in text": f"data: {{mean: [\"'{LAUGHS}'\", 1, 2]}}",
    "anchor of itself": "data: &a [*a]",
    "long text": "output: " + "a" * 200_000,
    "long key": f"? {'a' * 200_000}\n: 1",
    "long number": "seed: " + "9" * 200_000,
    "long hexadecimal": "model: {kwargs: {a: 0x" + "f" * 200_000 + "}}",
    "long sexagesimal": "seed: " + ":".join(["59"] * 80_000),
    "large file": "# " + "x" * (2 << 20),
    "many keys": "\n".join(f"k{n}: 1" for n in range(10_000)),
    **{f"many {mark!r}": mark * 60_000 for mark in ("---\n", "[", "'", "? ", "- ")},
    "a key in two ways": "data.workers: 1\ndata: {workers: 2}",
    "a number no float holds": "schedule: {lr: 1" + "0" * 400 + "}",
    **{
        f"deep {opening}": "model: {kwargs: {a: " + opening * DEEP + "1" + closing * DEEP + "}}"
        for opening, closing in (("[", "]"), ("{a: ", "}"), ("[{a: ", "}]"))
    },
}


@pytest.mark.parametrize("case", HARMFUL)
def test_harmful_configs_are_refused_at_once(tmp_path, case):
    path = tmp_path / "fuzz.yaml"
    path.write_text(HARMFUL[case])
    assert outcome(path) is None


@pytest.mark.parametrize("key", KEYS)
def test_harmful_text_on_the_command_line(tmp_path, key):
    """Text stays text, even if it looks like YAML; anything else is refused."""
    path = tmp_path / "fuzz.yaml"
    path.write_text("")
    for text in (LAUGHS, "[" * DEEP + "]" * DEEP, f"'{LAUGHS}'"):
        config = outcome(path, {key: text})
        if config is not None:
            section, _, field = key.rpartition(".")
            assert getattr(getattr(config, section) if section else config, field) == text


@pytest.mark.parametrize("path", ["a\0b", "no/such", "/dev/zero", ".", "x" * 5000])
def test_paths_that_are_no_config(path):
    assert outcome(path) is None
