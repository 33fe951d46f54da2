"""Plain text for a terminal, coloured only where it can show colours."""

import os
from collections.abc import Sequence
from typing import TextIO

_CODES = {"green": "32", "red": "31", "yellow": "33", "dim": "2", "bold": "1"}
# what a terminal without Unicode cannot show
_PLAIN = str.maketrans({"×": "x", "±": "+-", "–": "-", "−": "-", "·": ","})


class Terminal:
    """Writes to a stream in the way that it can show.

    Colours need a terminal that is not called dumb, and NO_COLOR unset or empty
    (https://no-color.org); FORCE_COLOR asks for them anywhere else, a pipe for example.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        environment = os.environ
        able = stream.isatty() and environment.get("TERM", "") != "dumb"
        self.coloured = not environment.get("NO_COLOR") and (
            able or bool(environment.get("FORCE_COLOR"))
        )
        self._unicode = "utf" in (getattr(stream, "encoding", None) or "").lower()

    def paint(self, text: str, colour: str | None) -> str:
        """The text in a colour, or as it is."""
        if colour is None or not self.coloured:
            return text
        return f"\x1b[{_CODES[colour]}m{text}\x1b[0m"

    def line(self, text: str = "", colour: str | None = None) -> None:
        """Write one line."""
        shown = text if self._unicode else text.translate(_PLAIN)
        print(self.paint(shown, colour), file=self._stream, flush=True)

    def table(
        self,
        cells: Sequence[Sequence[str]],
        right: Sequence[int] = (),
        colours: Sequence[str | None] | None = None,
    ) -> None:
        """Write a table whose first line is its head.

        Args:
            cells: lines of equally many cells.
            right: columns that are aligned to the right.
            colours: of the last cell of each line but the head.
        """
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for number, cell_line in enumerate(cells):
            padded = [
                cell.rjust(width) if column in right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(cell_line, widths, strict=True))
            ]
            padded[-1] = padded[-1].rstrip()
            if number == 0:
                self.line("  ".join(padded), "bold")
                self.line("  ".join("-" * width for width in widths), "dim")
                continue
            if colours is not None:
                padded[-1] = self.paint(padded[-1], colours[number - 1])
            self.line("  ".join(padded))
