"""The tables of supported hosts, made from the cases that the tests run over.

`python -m tests.helpers.hosts_table` fills the generated blocks of kind `hosts`: the table of
variants in docs/hosts.md, and the families in README.md.
"""

import textwrap

from experiments.documents.markdown import update_documents
from experiments.provenance import ROOT
from tests.helpers.host_cases import CASES

DOCUMENT = ROOT / "docs" / "hosts.md"
README = ROOT / "README.md"


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


MAKERS = {"hosts": lambda name: {"variants": variants, "families": families}[name]()}

if __name__ == "__main__":
    update_documents(ROOT, MAKERS)
