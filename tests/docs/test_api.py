"""docs/api: its examples run, print what the page shows, and use every public name."""

import ast
import doctest
import re

import pytest
import torch

from experiments.provenance import ROOT
from tests.helpers import documents
from tests.helpers.documents import Document
from tokenmixup import hosts

PAGES = [documents.read(path) for path in sorted((ROOT / "docs" / "api").glob("*.md"))]


def blocks(page: Document) -> list[str]:
    return [t.content for t in page.tokens if t.type == "fence" and t.info == "python"]


def session(page: Document) -> doctest.DocTest:
    """All blocks of a page, one after another."""
    parser = doctest.DocTestParser()
    return parser.get_doctest("\n".join(blocks(page)), {}, page.name, page.name, 0)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path.stem)
def test_the_examples_print_what_the_page_shows(
    page: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "_adapters", hosts._adapters[:])  # a page registers its own
    assert blocks(page) and all(block.startswith(">>> ") for block in blocks(page))
    torch.manual_seed(0)
    report: list[str] = []
    flags = doctest.NORMALIZE_WHITESPACE
    result = doctest.DocTestRunner(optionflags=flags).run(session(page), out=report.append)
    assert not result.failed, "".join(report)


def used(code: str) -> set[str]:
    """The names that code reads; an import alone is no use."""
    nodes = list(ast.walk(ast.parse(code)))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return attributes | {node.id for node in nodes if isinstance(node, ast.Name)}


def test_every_public_name_is_in_an_example() -> None:
    # the site's build finds the public names that are on no page
    directive = r"^\.\. auto(?:function|class|exception|data):: (?:\w+\.)*(\w+)$"
    names = {name for page in PAGES for name in re.findall(directive, page.text, re.MULTILINE)}
    code = ["".join(example.source for example in session(page).examples) for page in PAGES]
    # tests/docs/test_trainers.py runs these, whose library takes seconds to import
    integrations = next(page for page in PAGES if page.path.stem == "integrations")
    assert "../trainers.md#the-trainer-of-transformers" in set(integrations.links())
    code += blocks(documents.read(ROOT / "docs" / "trainers.md"))
    assert {"attach", "mix_tokens"} <= names and not names.difference(*map(used, code))
