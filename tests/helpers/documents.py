"""What the Markdown documents and the tutorial say: their links, headings and pieces of code."""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.anchors import anchors_plugin

from experiments.provenance import ROOT


@dataclass(frozen=True)
class Document:
    """A document, read as a code host reads it."""

    path: Path
    text: str

    @property
    def name(self) -> str:
        """Its path in the repository."""
        return self.path.relative_to(ROOT).as_posix()

    @functools.cached_property
    def tokens(self) -> list[Token]:
        """All tokens, those inside of paragraphs included."""
        parser = MarkdownIt("commonmark").enable("table").use(anchors_plugin, max_level=6)
        return [t for block in parser.parse(self.text) for t in (block, *(block.children or ()))]

    @property
    def anchors(self) -> set[str]:
        """What `#...` may lead to."""
        return {str(t.attrs["id"]) for t in self.tokens if "id" in t.attrs}

    def links(self) -> Iterator[str]:
        """Where links and pictures lead."""
        for token in self.tokens:
            for attribute in ("href", "src"):
                if attribute in token.attrs:
                    yield str(token.attrs[attribute])
        yield from re.findall(r"<(?:img|a|source)[^>]* (?:href|src|srcset)=\"([^\"]*)", self.text)

    def code(self) -> Iterator[str]:
        """Pieces of code: those within the text, and the lines of those on their own."""
        for token in self.tokens:
            if token.type == "code_inline":
                yield " ".join(token.content.split())
            elif token.type in ("fence", "code_block"):
                yield from token.content.replace("\\\n", " ").splitlines()


def read(path: Path) -> Document:
    """A document; of a notebook, what is written between its cells of code."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        return Document(path, text)
    return Document(path, path.read_text(encoding="utf-8"))


def documents() -> list[Document]:
    """All of them, in the order of their names."""
    paths = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]
    paths += [p for folder in ("weights", "benchmarks") for p in (ROOT / folder).rglob("*.md")]
    return [read(path) for path in sorted(paths) if ".ipynb_checkpoints" not in path.parts]
