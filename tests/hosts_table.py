"""The table of supported hosts, made from the cases that the tests run over.

`python tests/hosts_table.py` writes it into docs/hosts.md, and the refused classes with their
reasons, each between two comments.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "hosts.md"
BEGIN = "<!-- table of hosts: begin -->\n"
END = "<!-- table of hosts: end -->"
REFUSED = "<!-- refused: begin -->\n"
REFUSED_END = "<!-- refused: end -->"


def table() -> str:
    """One row a tested host; what is tested on each stands in the text around the table."""
    from host_cases import CASES

    lines = ["| family | tested with | prefix tokens | notes |", "| --- | --- | --- | --- |"]
    family = ""
    for case in CASES:
        first = case.family if case.family != family else ""
        family = case.family
        lines.append(f"| {first} | {case.model} | {case.prefix} | {case.covers} |")
    return "\n".join(line.replace("|  |", "| |") for line in lines) + "\n"


def refusals() -> str:
    """One line a reason, with the classes that it is given for."""
    from tokenmixup.hosts.unsupported import REASONS

    by_reason: dict[str, list[str]] = {}
    for name, reason in REASONS.items():
        library, kind = name.partition(".")[0], name.rpartition(".")[2]
        by_reason.setdefault(reason, []).append(f"{library} {kind}")
    return "".join(f"- {', '.join(names)}: {reason}.\n" for reason, names in by_reason.items())


def with_tables(text: str) -> str:
    """The document with both parts made anew."""
    for begin, end, part in ((BEGIN, END, table()), (REFUSED, REFUSED_END, refusals())):
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = before + begin + part + end + after
    return text


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
