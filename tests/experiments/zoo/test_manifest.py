"""The zoo's manifest: what is in it, and what is told when it is wrong."""

import re

import pytest
import yaml

from experiments.errors import ConfigError
from experiments.zoo.manifest import read_manifest


def test_the_manifest_is_the_design():
    manifest = read_manifest()
    known = {name: entry.published_top1 for name, entry in manifest.checkpoints.items()}
    assert known == {
        **{"cct_cifar10_htm": 97.57, "cct_cifar10_vtm": 97.78, "cct_cifar10_hvtm": 97.75},
        **{"cct_cifar100_htm": 83.56, "cct_cifar100_vtm": 83.54, "cct_cifar100_hvtm": 83.57},
        **{"VIT_HTM": 82.37, "VIT_VTM": 82.30, "VIT_HVTM": 82.32, "ViT-B_16-224": None},
    }
    drive = [entry for entry in manifest.checkpoints.values() if entry.drive]
    assert len({entry.drive for entry in drive}) == 9
    assert all(re.fullmatch(r"[\w-]{33}", entry.drive or "") for entry in drive)
    assert [row.published_top1 for row in manifest.rows("cifar")][0::4] == [97.48, 82.72]
    assert [row.table for row in manifest.rows()] == ["cifar"] * 8 + ["imagenet"] * 5


def test_rows_and_checkpoints_are_found_by_any_of_their_names():
    manifest = read_manifest()
    for name in ("cct_cifar10_htm", "cct_cifar10_htm.pth.tar", "cct_7-3x1_cifar10_HTM"):
        assert manifest.checkpoint(name).name == "cct_cifar10_htm"
        assert manifest.row(name).name == "cct_cifar10_htm"
    assert manifest.row("vit_imagenet_baseline").checkpoint is None
    assert manifest.checkpoint("vit_imagenet_baseline").name == "ViT-B_16-224"
    with pytest.raises(ConfigError, match="the nearest is cct_cifar10_htm"):
        manifest.checkpoint("cct_cifar10_htn")
    with pytest.raises(ConfigError, match="no such row; known: "):
        manifest.row("?")


GOOD = {
    "tables": {"t": {"title": "T"}},
    "datasets": {"d": {"table": "t", "images": 4}},
    "baselines": {"b": {"dataset": "d", "method": "baseline"}},
    "checkpoints": {
        "c": {"file": "c.bin", "url": "http://x/c", "config": "c", "dataset": "d", "method": "m"}
    },
}


def changed(**changes):
    content = yaml.safe_load(yaml.safe_dump(GOOD))
    content["checkpoints"]["c"].update(changes)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1", "zoo.yaml, line 1: expected"),
        ("tables: {t: {title: T}}\ntables: {}", "line 2: the key 'tables' is given twice"),
        ("checkpoints:\n  c: {file: a, file: b}", "line 2: the key 'file' is given twice"),
        ([1], r"got \[1\]; allowed: keys with values"),
        ({**GOOD, "checkpoint": {}}, "'checkpoint': unknown key; the nearest is checkpoints"),
        ({**GOOD, "checkpoints": [1]}, r"checkpoints: got \[1\]; allowed: a valid dictionary"),
        (changed(shasum="x"), r"checkpoints.c: 'shasum': unknown key; the nearest is sha256"),
        (changed(sha256="x"), "sha256: got 'x'; allowed: String should match"),
        (changed(published_top1="97"), "published_top1: got '97'; allowed: a valid number"),
        (changed(published_top1=-1), "published_top1: got -1; allowed: greater than or equal to 0"),
        (changed(file="../c.bin"), "file: got '../c.bin'; allowed: String should match"),
        (changed(url="file:///etc/passwd"), "url: got 'file:///etc/passwd'; allowed: String"),
        (changed(drive="1"), "checkpoints.c: .* exactly one of drive and url"),
        (changed(dataset="e"), "c.dataset: got 'e'; allowed: d"),
        ({**GOOD, "datasets": {"d": {}}}, "datasets.d.table: missing; it has no default"),
        ({**GOOD, "datasets": {"d": {"table": "u"}}}, "table: got 'u'; allowed: t"),
        ({**GOOD, "baselines": {"c": {"dataset": "d", "method": "b"}}}, "both a baseline and a"),
        (
            {**GOOD, "checkpoints": {n: dict(GOOD["checkpoints"]["c"]) for n in "ab"}},
            "b.file: c.bin is a's",
        ),
    ],
)
def test_a_wrong_manifest_is_told_in_one_line(tmp_path, content, message):
    path = tmp_path / "zoo.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=message) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_manifest(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_manifest(tmp_path / "zoo.yaml")
