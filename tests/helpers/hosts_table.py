"""The tables of supported hosts, made from the cases that the tests run over.

`python tests/helpers/hosts_table.py` writes them into docs/hosts.md, with the refused classes and their
reasons, and a short one into the README, each between two comments.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = ROOT / "docs" / "hosts.md"
README = ROOT / "README.md"
BEGIN = "<!-- table of hosts: begin -->\n"
END = "<!-- table of hosts: end -->"
REFUSED = "<!-- refused: begin -->\n"
REFUSED_END = "<!-- refused: end -->"
SUMMARY = "<!-- generated: hosts families -->\n\n"
SUMMARY_END = "\n<!-- end of what is generated -->"


def table() -> str:
    """One row a tested host; what is tested on each stands in the text around the table."""
    from tests.helpers.host_cases import CASES

    lines = ["| family | tested with | prefix tokens | notes |", "| --- | --- | --- | --- |"]
    family = ""
    for case in CASES:
        first = case.family if case.family != family else ""
        family = case.family
        lines.append(f"| {first} | {case.model} | {case.prefix} | {case.covers} |")
    return "\n".join(line.replace("|  |", "| |") for line in lines) + "\n"


def summary() -> str:
    """One row a family, with the number of variants that the tests run over."""
    from tests.helpers.host_cases import CASES

    lines = ["| supported hosts | variants tested |", "| --- | --- |"]
    for family in dict.fromkeys(case.family for case in CASES):
        lines.append(f"| {family} | {sum(case.family == family for case in CASES)} |")
    return "\n".join(lines) + "\n"


def refusals() -> str:
    """One line a reason, with the classes that it is given for."""
    from tokenmixup.hosts.unsupported import REASONS

    by_reason: dict[str, list[str]] = {}
    for name, reason in REASONS.items():
        library, kind = name.partition(".")[0], name.rpartition(".")[2]
        by_reason.setdefault(reason, []).append(f"{library} {kind}")
    return "".join(f"- {', '.join(names)}: {reason}.\n" for reason, names in by_reason.items())


def with_tables(text: str) -> str:
    """A document with those of the parts that it has made anew."""
    for begin, end, part in (
        (BEGIN, END, table()),
        (REFUSED, REFUSED_END, refusals()),
        (SUMMARY, SUMMARY_END, summary()),
    ):
        before, found, rest = text.partition(begin)
        if not found:
            continue
        _, _, after = rest.partition(end)
        text = before + begin + part + end + after
    return text


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    for path in (DOCUMENT, README):
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
