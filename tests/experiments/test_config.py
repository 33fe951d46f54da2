"""The config: what a file and a command line give, and what the help tells of it."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import yaml

from experiments import cli
from experiments.config.keys import known_keys
from experiments.config.reading import build_config, load_config, settings_of
from experiments.config.schema import RunConfig, ScheduleConfig, as_plain
from experiments.errors import ConfigError
from experiments.provenance import ROOT
from experiments.strict_yaml import yaml_text
from tests.helpers.commands import finished
from tests.helpers.runs_helper import HTM, VTM, write_config
from tokenmixup import HorizontalConfig

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("written", ["off", "on", "graphs", "auto", "true", "false"])
def test_compile_as_it_is_written(tmp_path, written):
    """YAML 1.1 would read `on` as true; true and false are what earlier versions wrote."""
    path = tmp_path / "a.yaml"
    path.write_text(f"compile: {written}\n")
    config = load_config(path)
    assert config.compile == {"true": "on", "false": "off"}.get(written, written)
    again = tmp_path / "again.yaml"
    again.write_text(yaml_text(as_plain(config)))
    assert load_config(again) == config
    assert load_config(path, {"compile": "graphs"}).compile == "graphs"


def test_values_arrive_in_their_types(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "seed: 7\nschedule: {lr: 1e-3, epochs: 3}\ndata: {scale: [0.5, 1]}\n"
        "model: {kwargs: {depth: 3}}\nhorizontal: {layers: [2, 1], tau: 0.1, rho: 0}\n"
    )
    config = load_config(path)
    assert config.seed == 7
    assert config.schedule.lr == 0.001
    assert config.data.scale == (0.5, 1.0)
    assert config.model.kwargs == {"depth": 3}
    assert config.horizontal == HorizontalConfig(layers=(1, 2), tau=0.1, rho=0.0)
    assert config.vertical is None
    assert config.output == "output/a"


def test_command_line_goes_before_the_file(tmp_path):
    path = write_config(tmp_path, horizontal=HTM, vertical=VTM)
    words = ["--config", str(path), "--schedule.epochs", "5", "--horizontal.tau=0.4"]
    words += ["--data.scale", "[0.1, 0.2]", "--output", "2024", "--vertical", "null"]
    words += ["--data.auto_augment", "null", "--channels_last", "true", "--schedule.lr", "1e-4"]
    command = cli.parse(words, "module", "description")
    config = command.config
    assert config.schedule.epochs == 5
    assert config.schedule.lr == 1e-4
    assert config.horizontal.tau == 0.4
    assert config.horizontal.layers == (1,)
    assert config.data.scale == (0.1, 0.2)
    assert config.output == "2024"
    assert config.vertical is None
    assert config.channels_last is True
    assert command.config_file == str(path)


def test_a_written_config_reads_back_the_same(tmp_path):
    config = load_config(write_config(tmp_path, horizontal=HTM, vertical=VTM), {"output": "1e5"})
    path = tmp_path / "again.yaml"
    path.write_text(yaml_text(as_plain(config)))
    assert load_config(path) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_say_how_to_run_them(path):
    """Each says what differs from the defaults, beside its model and its data set."""
    config = load_config(path)
    assert config.output == f"output/{path.stem}"
    head = path.read_text().split("\n\n")[0]
    assert f"python -m experiments.train --config configs/{path.name}" in head
    defaults = as_plain(RunConfig())
    for name, value in yaml.safe_load(path.read_text()).items():
        if isinstance(value, dict) and isinstance(defaults[name], dict):
            same = [f"{name}.{key}" for key, inner in value.items() if defaults[name][key] == inner]
            assert set(same) <= {"model.name", "data.dataset"}, f"{same} repeat the defaults"
        else:
            assert defaults[name] != value, f"{name} repeats the default"


def test_the_four_digits_configs_differ_in_tokenmixup_alone():
    baseline, htm, vtm, both = (
        load_config(ROOT / "configs" / f"digits_{name}.yaml", {"output": "x"})
        for name in ("baseline", "HTM", "VTM", "HVTM")
    )
    assert None not in (both.horizontal, both.vertical)
    assert htm == dataclasses.replace(both, vertical=None)
    assert vtm == dataclasses.replace(both, horizontal=None)
    assert baseline == dataclasses.replace(htm, horizontal=None)


def test_help_shows_every_key(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100000")
    assert cli.parse(["--help"], "experiments.train", "Train.") is None
    text = " ".join(capsys.readouterr().out.split())
    for name, key in known_keys().items():
        assert key.meaning and key.allowed
        default = "no default" if key.default is None else f"default: {key.default}"
        meaning = " ".join(key.meaning.split())
        assert f"--{name} VALUE {meaning} ({key.allowed}; {default}) " in f"{text} ", name
    for allowed in (
        "(a whole number from 1 up to 2147483647; default: 128)",
        "(a list of 2 numbers above 0 up to 1, the smaller first; default: [0.08, 1.0])",
        "(null or one of attention, cls, average; default: attention)",
        "(a list, each item a whole number; no default)",
    ):
        assert allowed in text


def test_help_of_own_options(capsys):
    own = {"max_minutes": cli.Option("save and stop"), "no": cli.Option("flag", takes_value=False)}
    assert cli.parse(["--help"], "experiments.train", "Train.", own) is None
    text = capsys.readouterr().out
    assert "[--max-minutes MAX_MINUTES] [--no] [--check] [--SECTION.KEY VALUE ...]\n" in text
    assert re.search(r"^  --max-minutes MAX_MINUTES\n +save and stop\n  --no +flag$", text, re.M)


def test_options_and_words_may_be_mixed_and_hyphens_are_underscores_in_names():
    known = {name: cli.Option("", takes_value=name != "all") for name in ("a.b_c", "out", "all")}
    for spelt in (["--a.b-c", "d-e_f"], ["--a.b_c=d-e_f"], ["--a.b-c=d-e_f"]):
        found = cli.split_options(["a", *spelt, "b-c", "--out", "-3", "--all", "d"], known)
        assert found == ({"a.b_c": "d-e_f", "out": "-3", "all": ""}, ["a", "b-c", "d"])


def test_help_imports_neither_torch_nor_timm():
    """They take seconds to import."""
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "import experiments.train as module, experiments.evaluate, experiments.visualize.__main__\n"
        "from experiments import cli\n"
        "assert cli.run(module.main) == 0\n"
        "assert not {'torch', 'timm', 'torchvision', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
    )
    status, _, error = finished("-c", code)
    assert status == 0, error


@pytest.mark.parametrize(
    "values",
    [{"epochs": 0}, {"epochs": True}, {"epochs": "3"}, {"lr": math.nan}, {"name": "linear"}],
)
def test_a_section_refuses_what_is_wrong_without_any_file(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        ScheduleConfig(**values)
    with pytest.raises(ValueError, match=next(iter(values))):
        dataclasses.replace(ScheduleConfig(), **values)


def refusal(key, value):
    """The error for one key's value beside valid ones, or ""."""
    valid = {"horizontal": HTM, "vertical": VTM}.get(key.partition(".")[0], {})
    content = {f"{key.partition('.')[0]}.{name}": inner for name, inner in valid.items()}
    try:
        build_config(settings_of({**content, key: value}, "file"), "file")
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", known_keys())
def test_every_key_refuses_what_its_help_does_not_allow(name):
    allowed = known_keys()[name].allowed
    for wrong in ([[]], {"a": [math.nan]}, math.nan):
        assert refusal(name, wrong) == f"file: {name}: got {wrong!r}; allowed: {allowed}"
    if not allowed.startswith("null or "):
        assert refusal(name, None).endswith(f"got None; allowed: {allowed}")
    if "number" not in allowed:
        return
    length = re.search(r"a list of (\d)", allowed)
    for word, text in re.findall(r"(from|above|up to|below) (\d+)", allowed):
        bound, upwards = int(text), word in ("up to", "below")
        if "whole" in allowed:
            outside = bound + 1 if upwards else bound - 1
        else:
            outside = math.nextafter(bound, math.inf if upwards else -math.inf)
        refused = [outside] + ([bound] if word in ("above", "below") else [])
        for value, expected in ((bound, bound in refused), (outside, True)):
            value = [value] * int(length[1]) if length else value
            assert (f"allowed: {allowed}" in refusal(name, value)) == expected, value


def nested_lists(depth):
    value: list = []
    for _ in range(depth):
        value = [value]
    return {"model": {"kwargs": {"a": value}, "name": 3}}


STRANGE = {
    "a key that is no text": ({5: 1}, "'5': unknown key"),
    "a key of a section": ({"data": {None: 1}}, "'data.null': unknown key"),
    "an object": ({"seed": Path("a")}, "Object of type PosixPath is not JSON serializable"),
    "a pair as key": ({"model": {"kwargs": {(1, 2): 3}}}, "keys must be str"),
    "bytes that are no text": ({"output": "\udcff"}, "surrogates not allowed"),
    "no dict": ([1], r"got \[1\]; allowed: keys with values"),
    **{f"{depth} lists": (nested_lists(depth), "") for depth in (100, 300, 100_000)},
}


@pytest.mark.parametrize("case", STRANGE)
def test_values_of_a_checkpoint_that_no_config_holds(case):
    content, message = STRANGE[case]
    with pytest.raises(ConfigError, match=f"^file: .*{message}") as caught:
        build_config(settings_of(content, "file"), "file")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
