"""The supported hosts, made from the cases that the tests run over.

The table of variants is in docs/hosts.md, the families are in README.md.
"""

import textwrap

from tests.helpers.host_cases import CASES


def variants() -> str:
    """One row per tested host; the text around the table says what the tests check."""
    lines = [
        "| family | tested with | prefix tokens | VTM | notes |",
        "| --- | --- | --- | --- | --- |",
    ]
    family = ""
    for case in CASES:
        first = case.family if case.family != family else ""
        family = case.family
        vtm = "yes" if case.vtm else "no"
        lines.append(f"| {first} | {case.model} | {case.prefix} | {vtm} | {case.covers} |")
    return "\n".join(line.replace("|  |", "| |") for line in lines) + "\n"


def families() -> str:
    """A sentence with the classes of each library, and how many variants are tested."""
    classes: dict[str, dict[str, None]] = {}  # by library, each once and in order
    for case in CASES:
        library, _, name = case.family.rpartition(" ")
        classes.setdefault(library, {})[f"`{name}`"] = None
    libraries = [f"{key} {', '.join(names)}".strip() for key, names in classes.items()]
    text = f"{len(CASES)} variants of hosts are tested: {'; '.join(libraries)}."
    return textwrap.fill(text, 120) + "\n"


def table(name: str) -> str:
    """What a document shows under this name."""
    return {"variants": variants, "families": families}[name]()
