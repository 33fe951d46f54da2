"""The config: what a file and a command line give, and that nothing wrong passes silently."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import cli
from experiments.config import (
    MixupConfig,
    RunConfig,
    ScheduleConfig,
    as_plain,
    describe,
    known_keys,
    load_config,
    optional_sections,
)
from experiments.errors import ConfigError, FieldError
from tests.helpers.runs_helper import HTM, VTM, write_config
from tokenmixup import HorizontalConfig

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_empty_file_gives_the_defaults(tmp_path):
    path = tmp_path / "nothing.yaml"
    path.write_text("")
    assert load_config(path) == RunConfig(output="output/nothing")


def test_values_arrive_in_their_types(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "seed: 7\nschedule: {lr: 1e-3, epochs: 3}\ndata: {scale: [0.5, 1]}\n"
        "model: {kwargs: {depth: 3}}\nhorizontal: {layers: [2, 1], tau: 0.1, rho: 0}\n"
    )
    config = load_config(path)
    assert config.seed == 7
    assert config.schedule.lr == 0.001  # YAML itself takes 1e-3 for text
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
    config = load_config(write_config(tmp_path, horizontal=HTM, vertical=VTM))
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(as_plain(config)))
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
    configs = {
        name: load_config(ROOT / "configs" / f"digits_{name}.yaml", {"output": "x"})
        for name in ("baseline", "HTM", "VTM", "HVTM")
    }
    both = configs["HVTM"]
    assert configs["baseline"].horizontal is None
    assert configs["baseline"].vertical is None
    assert both.horizontal is not None
    assert both.vertical is not None
    for config in configs.values():
        plain = dataclasses.replace(config, horizontal=None, vertical=None)
        assert plain == configs["baseline"]
    assert configs["HTM"] == dataclasses.replace(both, vertical=None)
    assert configs["VTM"] == dataclasses.replace(both, horizontal=None)


def test_the_cifar100_config_is_the_papers():
    config = load_config(ROOT / "configs" / "cct_7-3x1_cifar100_HTM.yaml")
    assert config.model.name == "cct_7_3x1_32"
    assert (config.model.attn_drop_rate, config.model.drop_path_rate) == (0.1, 0.1)
    assert config.model.drop_rate in (None, 0.0)
    assert config.horizontal == HorizontalConfig(
        layers=(2,), tau=0.2, rho=0.005, scorenet="attention", scorenet_lambda=0.001
    )
    assert config.vertical is None
    schedule = config.schedule
    assert (schedule.epochs, schedule.cooldown_epochs, schedule.warmup_epochs) == (1500, 10, 10)
    assert (schedule.lr, schedule.min_lr, schedule.warmup_lr) == (6e-4, 1e-5, 1e-6)
    assert (schedule.name, schedule.interval) == ("cosine", "epoch")
    assert (config.optimizer.name, config.optimizer.weight_decay) == ("adamw", 0.06)
    assert config.mixup == MixupConfig(
        mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, label_smoothing=0.1
    )
    data = config.data
    assert (data.dataset, data.batch_size) == ("torch/cifar100", 128)
    assert data.auto_augment == "rand-m9-mstd0.5-inc1"
    assert (data.re_prob, data.re_mode, data.color_jitter, data.hflip) == (0.25, "pixel", 0.4, 0.5)
    assert (data.scale, data.train_interpolation) == ((0.8, 1.0), "random")
    assert (config.seed, config.precision) == (42, "bf16")


def test_help_shows_every_key(capsys):
    assert cli.parse(["--help"], "experiments.train", "Train.") is None
    text = capsys.readouterr().out
    for key in known_keys():
        assert f"--{key} " in text, key


def test_help_of_own_options(capsys):
    """Names that are too long for their column stand on a line of their own; hyphens are taken."""
    own = {
        "max_minutes": cli.Option("save and stop"),
        "no": cli.Option("value", takes_value=False),
    }
    assert cli.parse(["--help"], "experiments.train", "Train.", own) is None
    text = capsys.readouterr().out
    assert "[--max-minutes MAX_MINUTES] [--no] [--check] [--SECTION.KEY VALUE ...]\n" in text
    options = text.partition("are the same):\n")[2].partition("\n\n")[0].splitlines()
    gap = 24 * " "
    assert options == [
        "  --config CONFIG".ljust(24) + "the experiment, a YAML file",
        "  --max-minutes MAX_MINUTES",
        gap + "save and stop",
        "  --no".ljust(24) + "value",
        "  --check".ljust(24) + "check the command line and the config, and do no more",
        "  --SECTION.KEY VALUE".ljust(24) + "overrides a key of the config",
    ]
    for spelt in ("--max-minutes", "--max_minutes", "--on-nonfinite", "--on_nonfinite"):
        found, words = cli.split_options([spelt, "1"], {**own, "on_nonfinite": cli.Option("")})
        assert found == {spelt.removeprefix("--").replace("-", "_"): "1"} and not words


def test_a_config_can_be_checked_without_being_run(tmp_path):
    path = write_config(tmp_path)
    words = ["--config", str(path), "--check"]
    assert cli.parse(words, "experiments.train", "Train.") is None
    with pytest.raises(ConfigError, match=r"schedule\.epochs: got 0;"):
        cli.parse([*words, "--schedule.epochs", "0"], "experiments.train", "Train.")


def test_help_needs_neither_timm_nor_torchvision():
    """They take seconds to import, and whoever asks for help should not wait for them."""
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "import experiments.train as module, experiments.evaluate, experiments.visualize.__main__\n"
        "from experiments import cli\n"
        "assert cli.run(module.main) == 0\n"
        "assert not {'timm', 'torchvision', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_every_key_can_be_described():
    for key, hint in known_keys().items():
        assert describe(hint), key
    assert optional_sections() == {"horizontal", "vertical"}


def test_a_section_refuses_what_is_wrong_without_any_file():
    with pytest.raises(FieldError, match="epochs: got 0; allowed: a whole number from 1"):
        ScheduleConfig(epochs=0)
    with pytest.raises(FieldError, match="lr"):
        ScheduleConfig(lr=math.nan)
    with pytest.raises(FieldError, match="epochs"):
        ScheduleConfig(epochs=True)


KEYS = [*known_keys(), "horizontal", "data", "model.nam", "nothing", ""]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["1", "1e-3", "cct_2_3x2_32", "cpu", "[1, 2]", "null", ".nan", "attention"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@settings(max_examples=150)
@given(content=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4), as_options=st.booleans())
def test_whatever_is_written_gives_a_config_or_one_line(tmp_path_factory, content, as_options):
    nested: dict = {}
    for key, value in content.items():
        section, dot, field = key.rpartition(".")
        inner = nested.setdefault(section, {}) if dot else nested
        if isinstance(inner, dict):
            inner[field] = value
    path = tmp_path_factory.mktemp("fuzz") / "a.yaml"
    path.write_text("" if as_options else yaml.safe_dump(nested))
    overrides = {key: str(value) for key, value in content.items()} if as_options else {}
    message = f"{path}: nothing is wrong"
    try:
        assert isinstance(load_config(path, overrides), RunConfig)
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message
    assert message.startswith((f"{path}", "command line: "))
