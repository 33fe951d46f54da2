"""Tables in Markdown, and the generated blocks of documents.

A block stands between `<!-- generated: KIND NAME -->` and `<!-- end of what is generated -->`. The
command that keeps the records of a kind makes its blocks; each leaves the others' alone.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from experiments.files import write_atomically

_BLOCK = re.compile(
    r"(<!-- generated: (\S+) (\S+) -->\n).*?(<!-- end of what is generated -->)", re.S
)
Makers = Mapping[str, Callable[[str], str]]
"""From the kind of a block to the function that makes its text from its name."""


def aligned_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int]
) -> str:
    """A table in Markdown.

    Args:
        head: titles of the columns.
        rows: the cells of each line.
        right: numbers of the columns that are aligned to the right.
    """
    lines = [head, *rows]
    widths = [max(2, *(len(line[column]) for line in lines)) for column in range(len(head))]

    def line_of(line: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = [
        "-" * (width - 1) + ":" if column in right else "-" * width
        for column, width in enumerate(widths)
    ]
    return "\n".join([line_of(head), line_of(rule), *map(line_of, rows)]) + "\n"


def fill_blocks(text: str, makers: Makers) -> str:
    """The text with the blocks of the makers' kinds made anew."""

    def block(match: re.Match[str]) -> str:
        head, kind, name, end = match.groups()
        return f"{head}\n{makers[kind](name)}\n{end}" if kind in makers else match[0]

    return _BLOCK.sub(block, text)


def documents(root: Path) -> list[Path]:
    """The Markdown files of a checkout that have generated blocks."""
    found = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("weights/*.md")]
    return sorted(path for path in found if _BLOCK.search(path.read_text(encoding="utf-8")))


def update_documents(root: Path, makers: Makers) -> list[Path]:
    """Make the blocks of the makers' kinds anew in all documents; gives the files that changed."""
    changed = []
    for path in documents(root):
        before = path.read_text(encoding="utf-8")
        after = fill_blocks(before, makers)
        if after != before:
            write_atomically(path, after.encode())
            changed.append(path)
    return changed
