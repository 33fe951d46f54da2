"""The tables of supported hosts, made from the cases that the tests run over.

`python tests/helpers/hosts_table.py` fills the generated blocks of kind `hosts`: the table of
variants in docs/hosts.md, and the families in README.md.
"""

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = ROOT / "docs" / "hosts.md"
README = ROOT / "README.md"


def variants() -> str:
    """One row per tested host; the text around the table says what the tests check."""
    from tests.helpers.host_cases import CASES

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
    from tests.helpers.host_cases import CASES

    classes: dict[str, dict[str, None]] = {}  # by library, each once and in order
    for case in CASES:
        library, _, name = case.family.rpartition(" ")
        classes.setdefault(library, {})[f"`{name}`"] = None
    libraries = [f"{key} {', '.join(names)}".strip() for key, names in classes.items()]
    text = f"{len(CASES)} variants of hosts are tested: {'; '.join(libraries)}."
    return textwrap.fill(text, 120) + "\n"


def block(name: str) -> str:
    """The text of a block of kind `hosts`."""
    return {"variants": variants, "families": families}[name]()


MAKERS = {"hosts": block}

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from experiments.documents.markdown import update_documents

    update_documents(ROOT, MAKERS)
