"""Tables in Markdown, aligned, so that they read well on a terminal too."""

from collections.abc import Collection, Sequence


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
