"""The tables of hosts, trainers, settings and versions: the documents show the present ones."""

import re

from experiments.documents.markdown import documents, fill_blocks
from experiments.provenance import ROOT
from tests.helpers.tables import MAKERS


def test_the_documents_show_the_present_tables() -> None:
    places: dict[str, list[str]] = {}
    for path in documents(ROOT):
        text = path.read_text(encoding="utf-8")
        assert fill_blocks(text, MAKERS) == text, f"{path}: run `python -m tests.helpers.tables`"
        for kind in MAKERS.keys() & set(re.findall(r"<!-- generated: (\S+) ", text)):
            places.setdefault(kind, []).append(path.name)
    assert places == {
        "configs": ["recipe.md"],
        "hosts": ["README.md", "hosts.md"],
        "trainers": ["README.md", "trainers.md"],
        "versions": ["hosts.md"],
    }


def test_settings_are_those_of_the_configs() -> None:
    lines = MAKERS["configs"]("tokenmixup").splitlines()
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells[:3] == ["`vit_imagenet_HVTM`", "3", "0.1"]
