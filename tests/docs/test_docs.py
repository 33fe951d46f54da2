"""The documents: links and names in them are right, and the site's build is strict."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

import tokenmixup
from experiments import cli, train
from experiments.config.keys import known_keys, optional_sections, sections
from experiments.provenance import ROOT
from tests.helpers import documents
from tests.helpers.documents import Document

DOCUMENTS = documents.documents()
# These two name things of older versions.
HISTORY = ("CHANGELOG.md", "docs/log.md")


def broken_links(document: Document) -> list[str]:
    broken = []
    for link in document.links():
        address = urllib.parse.urlsplit(link)
        if address.scheme:
            if address.scheme not in ("https", "mailto"):
                broken.append(link)
            continue
        path = document.path
        if address.path:
            path = (document.path.parent / urllib.parse.unquote(address.path)).resolve()
        found = path.exists() and path.is_relative_to(ROOT)
        if found and address.fragment:
            found = address.fragment in documents.read(path).anchors
        if not found:
            broken.append(link)
    return broken


def test_no_link_is_broken() -> None:
    broken = {document.name: broken_links(document) for document in DOCUMENTS}
    assert not {name: links for name, links in broken.items() if links}


def test_each_page_begins_with_what_the_reader_can_do_after_it() -> None:
    opening = re.compile(r"# .+\n\n(?:After|With) this \w+ you (?:can|know|train) ")
    pages = [page for page in DOCUMENTS if page.path.is_relative_to(ROOT / "docs")]
    assert not [page.name for page in pages if not opening.match(page.text)]


def test_the_first_page_leads_to_every_page() -> None:
    first = documents.read(ROOT / "docs" / "index.md")
    pages = [page.path for page in DOCUMENTS if page.path.parent == first.path.parent]
    shown = set(first.links())
    assert not {path.name for path in pages if path != first.path} - shown
    menu = re.findall(r"<(\w+)>$", first.text, re.MULTILINE)
    assert sorted(menu) == sorted(path.stem for path in pages if path != first.path)


FILES = r"(?:benchmarks|configs|docs|examples|experiments|results|run|tests|tokenmixup|weights)"


def missing_files(code: str) -> set[str]:
    names = re.findall(rf"(?<![\w./…-])({FILES}/[\w./-]*\.(?:py|sh|yaml|md|jsonl|ipynb))\b", code)
    # capitals stand for any name: configs/NAME.yaml
    return {
        name
        for name in names
        if not (ROOT / name).is_file()
        and not any(Path(part).stem.isupper() for part in Path(name).parts)
    }


MODULES = {path.stem for path in (ROOT / "tokenmixup").glob("*.py")} | {"hosts"}


ENDINGS = {"py", "yaml", "gif", "json", "safetensors"}  # of names of files


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or a name in one."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            annotated = part in getattr(value, "__annotations__", {})
            if not hasattr(value, part) and not annotated:
                return False
            value = getattr(value, part, None)
        return True
    return False


def missing_names(code: str) -> set[str]:
    """Names of modules of this project and keys of its configs that do not exist."""
    whole = re.fullmatch(r"([A-Za-z_][\w.]*\.\w+)(?:\(.*\)|: .*)?", code)
    names = set(re.findall(r"\b(?:tokenmixup|experiments)(?:\.[A-Za-z_]\w*)+", code))
    names = {name for name in names if name.rpartition(".")[2] not in ENDINGS}
    missing = {name for name in names if not resolves(name)}
    if whole is not None:
        name = whole[1]
        first, _, rest = name.partition(".")
        if rest not in ENDINGS and (first in MODULES or first in sections()):
            # a key of the configs, a name in a module, or an attribute of the attached model
            found = name in known_keys() or (first in MODULES and resolves(f"tokenmixup.{name}"))
            if not found and not (first == "model" and is_of_the_model(rest.split(".")[0])):
                missing.add(name)
    return missing


def is_of_the_model(name: str) -> bool:
    described = re.findall(r"^ +(\w+): ", tokenmixup.TokenMixupModel.__doc__ or "", re.MULTILINE)
    return name in described or hasattr(tokenmixup.TokenMixupModel, name)


# Other programs' options are theirs.
FOREIGN = (
    r"\b(uv|pip|apt|conda|ruff|mypy|git|torchrun|sbatch|srun|chromium|docker|sphinx|timeout)\b"
    r"|--upgrade-package|#SBATCH|--section\.key VALUE|--signals-to-handle|--shutdown-timeout"
    r"|^(train|validate)\.py "
)


def known_options() -> set[str]:
    found = {"help", *known_keys(), *optional_sections()}
    folders = ("experiments", "benchmarks", "tests/helpers")
    for path in [path for folder in folders for path in (ROOT / folder).rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        found.update(re.findall(r'"([\w-]+)": (?:cli\.)?Option\(', text))
        found.update(re.findall(r'add_argument\(\s*"--([\w-]+)"', text))
        found.update(re.findall(r"^  --([\w-]+) ", text, re.MULTILINE))  # a usage text
    for path in (ROOT / "run").glob("*.sh"):
        found.update(re.findall(r"(?<=[ (])--([a-z-]+)(?=\)| \])", path.read_text()))
    return found


OPTIONS = known_options()


def missing_options(code: str) -> set[str]:
    if re.search(FOREIGN, code):
        return set()
    named = re.findall(r"(?<![\w-])--([A-Za-z][\w.-]*)", code)
    return {name for name in named if name not in OPTIONS and name.replace("-", "_") not in OPTIONS}


def test_every_named_file_key_and_option_exists() -> None:
    missing = [
        f"{document.name}: {name}, in {code!r}"
        for document in DOCUMENTS
        if document.name not in HISTORY
        for code in document.code()
        for name in missing_files(code) | missing_names(code) | missing_options(code)
    ]
    assert not missing, "\n".join(missing)


def test_documented_trainings_have_settings_that_are_allowed() -> None:
    codes = [code for document in DOCUMENTS for code in document.code()]
    commands = [code for code in codes if "experiments.train --config configs/" in code]
    assert commands
    for words in (shlex.split(code, comments=True) for code in commands if "NAME" not in code):
        words = words[words.index("experiments.train") + 1 :]
        assert cli.parse(words, "experiments.train", "", train.OPTIONS), words


@pytest.mark.parametrize(
    ("find", "code"),
    [
        (missing_files, "sh run/train_nothing.sh --seed 1"),
        (missing_names, "functional.nothing"),
        (missing_names, "tokenmixup.hosts.nothing"),
        (missing_names, "schedule.nothing: 3"),
        (missing_options, "python -m experiments.train --schedule.nothing 3"),
    ],
)
def test_a_missing_name_is_found(find, code: str) -> None:
    assert find(code)


def test_broken_links_are_found(tmp_path: Path) -> None:
    text = "# One, two\n\n[a](#one-two) [b](#nothing) [c](nothing.md) [d](http://x.org) ![e](e.png)"
    (tmp_path / "case.md").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "ROOT", tmp_path)
        found = broken_links(documents.read(tmp_path / "case.md"))
    assert found == ["#nothing", "nothing.md", "http://x.org", "e.png"]


def test_the_build_finds_every_fault(tmp_path: Path) -> None:
    """Build one site with every fault that the build must find."""
    site = tmp_path / "docs"
    shutil.copytree(ROOT / "docs" / "api", site / "api")
    shutil.copytree(ROOT / "docs" / "static", site / "static")
    shutil.copy(ROOT / "docs" / "paper_map.md", site)
    conf = (ROOT / "docs" / "conf.py").read_text(encoding="utf-8")
    conf = conf.replace("Path(__file__).resolve().parent.parent.parent", f"Path({str(ROOT)!r})")
    faults = (
        "\nfrom tokenmixup import functional, model\n"
        "def _bare(x): return x\n"
        '_bare.__module__ = "tokenmixup.functional"\n'
        "functional.bare = _bare\n"
        "functional.mix_tokens.__doc__ = None\n"
        "model.TokenMixupModel.detach.__doc__ = None\n"
        'functional.HorizontalMixup.__doc__ = "Without its fields."\n'
        'functional.gather_tokens.__doc__ = "See :func:`nowhere`."\n'
    )
    (site / "conf.py").write_text(conf + faults, encoding="utf-8")
    (site / "index.md").write_text(
        "# Site\n\n[a](nowhere.md) [b](paper_map.md#nowhere)\n\n```{toctree}\n*\napi/index\n```\n"
    )
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", str(site), "site"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    for expected in (
        "tokenmixup.functional.bare has no docstring",
        "tokenmixup.functional.bare is public, but on no page",
        "tokenmixup.functional.mix_tokens has no docstring",
        "tokenmixup.model.TokenMixupModel.detach has no docstring",
        "tokenmixup.functional.HorizontalMixup.mask has no docstring",
        "py:func reference target not found: nowhere",
        "'nowhere.md'",
        "'nowhere'",
    ):
        assert expected in done.stderr, done.stderr
