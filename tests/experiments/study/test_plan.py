"""Studies: what one is, its command line, and those that come with the repository."""

import dataclasses

import pytest

from experiments.config.reading import load_config
from experiments.errors import ConfigError
from experiments.provenance import ROOT
from experiments.study import __main__ as study
from experiments.study.plan import read_study
from experiments.study.records import study_records
from experiments.study.statistics import best_of_arms, compare
from tests.helpers.commands import fails
from tests.helpers.runs_helper import HTM
from tests.helpers.study_helper import write_study

STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))


# What a study is


def test_variants_build_on_each_other(tmp_path):
    found = read_study(write_study(tmp_path))
    assert [(v.name, seed) for v, seed in found.runs()] == [
        *(("plain", 1), ("HTM", 1), ("mask", 1)),
        *(("plain", 2), ("HTM", 2), ("mask", 2)),
    ]
    plain, htm, mask = found.variants.values()
    assert found.config(plain, 7).horizontal is None and found.config(plain, 7).seed == 7
    assert found.config(htm, 1).horizontal.tau == HTM["tau"]
    assert found.config(mask, 1) == found.config(htm, 1)
    assert (mask.substitutions, mask.against) == (("released mask",), "HTM")
    assert found.identity(mask, 1) != found.identity(htm, 1) != found.identity(htm, 2)
    assert found.differences(mask, "HTM") == {} and found.differences(plain) == {}
    assert found.differences(htm)["horizontal.tau"] == HTM["tau"]


def test_a_section_is_switched_off_and_null_is_a_value(tmp_path):
    variants = {
        "HTM": {"set": {"horizontal": HTM}},
        "off": {"like": "HTM", "set": {"horizontal": None}},
        "all": {"like": "HTM", "set": {"horizontal": {"scorenet": None}}},
    }
    found = read_study(write_study(tmp_path, variants=variants, plain="off"))
    assert found.config(found.variants["off"], 1).horizontal is None
    assert found.config(found.variants["all"], 1).horizontal.scorenet is None
    assert found.differences(found.variants["all"])["horizontal.scorenet"] is None


def test_what_a_training_is_does_not_depend_on_where_its_data_lie(tmp_path):
    found = read_study(write_study(tmp_path))
    htm = found.variants["HTM"]
    same = {"data.root": "elsewhere", "data.workers": "3", "logging.interval": "7"}
    assert found.identity(htm, 1, same) == found.identity(htm, 1)
    others = [{"horizontal.tau": "0.31"}, {"data.per_class": "3"}, {"tokenmixup_off_epoch": "1"}]
    others += [{"mixup.mixup_alpha": "1", **end} for end in ({}, {"mixup.off_epoch": "1"})]
    tested = dataclasses.replace(found, test_split="validation")
    different = {found.identity(htm, 1), tested.identity(htm, 1)}
    assert len(different | {found.identity(htm, 1, other) for other in others}) == 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"titel": "x"}, ["'titel': unknown key", "title"]),
        ({"seeds": [1, 1]}, ["seeds: got [1, 1]", "each once"]),
        ({"seeds": []}, ["seeds"]),
        ({"plain": "plan"}, ["plain: got 'plan'", "the nearest is plain"]),
        ({"variants": {"plain": {"wiht": []}}}, ["variants.plain: 'wiht': unknown key"]),
        ({"variants": {"plain": {"with": ["magic"]}}}, ["got ['magic']", "released mask"]),
        (
            {"variants": {"plain": {"with": ["random partners", "greedy partners"]}}},
            ["plain.with: random partners and greedy partners both replace partners"],
        ),
        ({"variants": {"plain": {"like": "HTM"}}}, ["like: got 'HTM'", "before it"]),
        (
            {"variants": {"plain": {"set": {"data": {"bach": 1}}}}},
            ["plain.set: 'data.bach': unknown key"],
        ),
        (
            {"variants": {"plain": {"set": {"schedule": {"epochs": 0}}}}},
            ["variants.plain", "schedule.epochs", "got 0"],
        ),
        ({"variants": {"plain": {}, "x": {"like": "plain"}}}, ["variants.x", "same training as"]),
        ({"variants": {"plain": {"against": "y"}}}, ["against: got 'y'"]),
        ({"about": 3}, ["about: got 3"]),
        ({"test_split": 3}, ["test_split: got 3"]),
        ({"claims": {"margin": 1}}, ["claims.margin: got 1"]),
        (
            {"claims": {"margin": 0.3, "primary": [["HTM", "x"]]}},
            ["claims.primary: got ['HTM', 'x']", "names of plain, HTM, mask"],
        ),
        ({"claims": {"margin": 0.3}}, ["claims.control: got None"]),
        ({"arms": ["plain"]}, ["arms: got ['plain']", "['plain', 'HTM', 'mask']"]),
        ({"config": "nowhere.yaml"}, ["nowhere.yaml: cannot read"]),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, change, words):
    with pytest.raises(ConfigError) as caught:
        read_study(write_study(tmp_path, **change))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--study: missing"),
        (["--jobs", "0"], "--jobs: got '0'"),
        (["--run", "HTM/9"], "allowed: a seed of 1, 2"),
        (["--run", "nobody/1"], "a name of plain, HTM, mask"),
        (["--run", "HTM/1", "--jobs", "2"], "no meaning with --run"),
        (["--report", "--jobs", "2"], "no meaning with --report"),
        (["--seed", "3"], "--seed: got '3'; allowed: 1, 2"),
        (["--report"], "holds no record yet"),
    ],
)
def test_a_wrong_command_line(tmp_path, capsys, words, message):
    if words:
        words = ["--study", str(write_study(tmp_path)), *words]
    assert message in fails(capsys, study, *words, "--results", tmp_path)


# The shipped studies


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_are_valid_and_say_how_to_run_them(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = read_study(path)
    head = path.read_text().split("\n\n")[0]
    assert f"python -m experiments.study --study configs/studies/{path.name}" in head
    assert len(found.seeds) >= 3 or path.stem.endswith(("_tuning", "_search"))


@pytest.mark.parametrize("name", ["fashion_mnist", "released"])
def test_values_are_chosen_on_other_images_and_seeds(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    search, found = (read_study(f"configs/studies/{n}.yaml") for n in (f"{name}_tuning", name))
    assert not set(search.seeds) & set(found.seeds)
    evaluated = {found.config(v, 1).data.val_split for v in found.variants.values()}
    for variant in search.variants.values():
        data = search.config(variant, 1).data
        assert data.val_split not in evaluated and data.train_split not in evaluated
        assert data.val_split.startswith(("tune_validation", "train["))


def test_small_data_takes_what_its_search_found_best(monkeypatch):
    """Until an arm's trainings are done, its first setting stands in the study."""
    monkeypatch.chdir(ROOT)
    names = ("small_data_search", "small_data")
    search, found = (read_study(f"configs/studies/{name}.yaml") for name in names)
    assert set(search.arms) == {*found.variants} and not set(search.seeds) & set(found.seeds)
    assert {len(search.arm(arm)) for arm in search.arms} == {8}, "each has the same budget"
    records = study_records(ROOT / "results", search.name).read()
    assert len({record.commit for record in records}) <= 1, "all trainings are from one commit"
    best = best_of_arms(compare(search, records))
    for arm, standing in best.items():
        chosen = standing.variant if standing else search.variants[search.arm(arm)[0]]
        theirs, ours = search.config(chosen, 1), found.config(found.variants[arm], 1)
        for section in ("model", "mixup", "optimizer", "horizontal", "vertical"):
            assert getattr(ours, section) == getattr(theirs, section), arm
        assert ours.schedule.lr == theirs.schedule.lr and ours.schedule.epochs == 100
        assert dataclasses.replace(ours.data, val_split=theirs.data.val_split) == theirs.data
    assert found.test_split == "test" and search.test_split is None


def test_4000_images_take_the_settings_of_1000(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = ("small_data", "small_data_4000")
    found, more = (read_study(f"configs/studies/{name}.yaml") for name in names)
    for name, variant in more.variants.items():
        ours, theirs = more.config(variant, 1), found.config(found.variants[name], 1)
        for section in ("model", "mixup", "optimizer", "horizontal", "vertical"):
            assert getattr(ours, section) == getattr(theirs, section), name
        assert ours.schedule.lr == theirs.schedule.lr and ours.schedule.epochs == 60
        assert dataclasses.replace(ours.data, per_class=theirs.data.per_class) == theirs.data


def test_the_ablations_reuse_trainings_of_the_study(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = ("small_data", "small_data_ablations")
    found, more = (read_study(f"configs/studies/{name}.yaml") for name in names)
    known = {found.identity(variant, 1): name for name, variant in found.variants.items()}
    same = {name: known.get(more.identity(v, 1)) for name, v in more.variants.items()}
    reused = {"HTM": "HTM", "VTM": "VTM", "CutMix": "CutMix", "plain, no drop path": "plain"}
    assert {name: other for name, other in same.items() if other} == reused


def test_the_digits_are_the_quickstarts(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = read_study("configs/studies/digits.yaml")
    names = {"plain": "baseline", "HTM": "HTM", "VTM": "VTM", "HTM + VTM": "HVTM"}
    for variant, name in names.items():
        ours = found.config(found.variants[variant], 42)
        theirs = load_config(f"configs/digits_{name}.yaml")
        kept = {"device": "cpu", "output": None, "logging": ours.logging}
        kept["checkpoint"] = ours.checkpoint
        assert dataclasses.replace(ours, output=None) == dataclasses.replace(theirs, **kept)
