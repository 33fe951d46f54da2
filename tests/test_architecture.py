"""The rules of the house, read from the source: a folder is a floor, and imports go downwards."""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.provenance import ROOT

FLOORS = (
    {"train", "evaluate", "reproduce", "study", "visualize"},
    {"training", "zoo"},
    {"data", "models"},
    {"checkpoint", "released"},
    {"cli"},
    {"config", "provenance"},
    {"documents"},
    {"errors", "files", "seeding", "strict_yaml"},
)
"""The rooms of `experiments`, from top to bottom; `tokenmixup` lies below them."""
STAIRS = {("reproduce", "study")}
"""`reproduce --train` is a study: the only import between two commands."""

LIBRARY_NEEDS = {"torch", "numpy", "lap", "tokenmixup"}
HOST_LIBRARIES = {"timm", "torchvision", "transformers"}

FOLDERS = (
    *("tokenmixup", "experiments", "tests", "examples", "benchmarks"),
    *(".ci", "configs", "docs", "run", "weights"),
)


def repository_files() -> Iterator[Path]:
    # `.git` is a file in a worktree
    yield from sorted(p for p in ROOT.iterdir() if p.is_file() and p.name != ".git")
    for folder in FOLDERS:
        paths = sorted((ROOT / folder).rglob("*"))
        yield from (p for p in paths if p.is_file() and "__pycache__" not in p.parts)


FILES = list(repository_files())
SOURCES = [path for path in FILES if path.suffix == ".py"]
LIBRARY = [path for path in SOURCES if path.is_relative_to(ROOT / "tokenmixup")]
EXPERIMENTS = [path for path in SOURCES if path.is_relative_to(ROOT / "experiments")]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, at_run_time: bool = False) -> set[str]:
    """Full names of all imported modules, anywhere in the file.

    `from a import b` gives a.b if that is a module of this repository, else a.

    Args:
        path: a source file.
        at_run_time: leave out what only type checkers import.
    """
    for_types = [
        n for n in nodes(path) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)
    ]
    left_out = (
        {id(inner) for block in for_types for inner in ast.walk(block)} if at_run_time else set()
    )
    found: set[str] = set()
    for node in nodes(path):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return found


MODULES = {module_name(path): path for path in [*LIBRARY, *EXPERIMENTS]}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a plain or dotted name."""
    for node in nodes(path):
        if isinstance(node, ast.Call):
            parts: list[str] = []
            target: ast.expr = node.func
            while isinstance(target, ast.Attribute):
                parts.append(target.attr)
                target = target.value
            if isinstance(target, ast.Name):
                yield ".".join([target.id, *reversed(parts)]), node


def test_there_is_something_to_check() -> None:
    assert {"tokenmixup.functional", "tokenmixup.model"} <= MODULES.keys()
    assert {"experiments.train", "experiments.training.step"} <= MODULES.keys()
    assert "tokenmixup.config" in imports(MODULES["tokenmixup"])
    assert any(name == "torch.load" for path in SOURCES for name, _ in calls(path))


def test_library_imports_little() -> None:
    for path in LIBRARY:
        allowed = LIBRARY_NEEDS | set(sys.stdlib_module_names)
        if path.parent.name in ("hosts", "models", "integrations"):
            allowed |= HOST_LIBRARIES
        if path.parent.name == "integrations":
            allowed |= {"safetensors"}  # in which transformers saves
        others = {name.partition(".")[0] for name in imports(path)} - allowed
        assert not others, f"{name_of(path)} imports {', '.join(sorted(others))}"


def test_importing_the_library_imports_no_host_library() -> None:
    """An adapter knows its hosts by name, so a user of one family needs only its library."""
    for path in LIBRARY:
        if path.parent.name in ("models", "integrations"):  # imported on purpose, for timm
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            tops = {name.partition(".")[0] for name in names}
            assert not tops & HOST_LIBRARIES, f"{name_of(path)}:{node.lineno}"


def test_library_neither_prints_nor_rebinds_globals() -> None:
    for path in LIBRARY:
        printing = [node.lineno for name, node in calls(path) if name == "print"]
        command = path.name == "__main__.py"
        assert command or not printing, f"{name_of(path)}: prints in line {printing}"
        rebinding = [node.lineno for node in nodes(path) if isinstance(node, ast.Global)]
        assert not rebinding, f"{name_of(path)}: `global` in line {rebinding}"


def room(name: str) -> str:
    """The folder of a module in `experiments`, or its own name if it lies in none."""
    return name.split(".")[1]


def floor(name: str) -> int:
    found = [number for number, rooms in enumerate(FLOORS) if room(name) in rooms]
    assert found, f"{name} is in no room that FLOORS names"
    return found[0]


def is_command(name: str) -> bool:
    return name.endswith(".__main__") or name in ("experiments.train", "experiments.evaluate")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_imports_go_downwards(path: Path) -> None:
    own = module_name(path)
    if own == "experiments":
        assert not imports(path) & MODULES.keys(), "an import of a part would load the whole"
        return
    lies_in_no_folder = path.parent.name == "experiments"
    for name in sorted(imports(path)):
        if not name.startswith("experiments.") or room(name) == room(own):
            continue
        if (room(own), room(name)) in STAIRS:
            continue
        assert not is_command(name), f"{own} imports the command {name}"
        beside = lies_in_no_folder and MODULES[name].parent.name == "experiments"
        allowed = floor(name) > floor(own) or (beside and floor(name) == floor(own))
        assert allowed, f"{own} imports {name}, which does not lie below it"


def test_few_modules_lie_in_no_folder() -> None:
    assert sum(path.parent.name == "experiments" for path in EXPERIMENTS) <= 12


def test_only_commands_can_be_started() -> None:
    for name, path in MODULES.items():
        if '__name__ == "__main__"' in path.read_text():
            assert is_command(module_name(path)), f"{name} can be started, but is no command"


def test_no_cycle_of_imports() -> None:
    graph = {
        name: imports(path, at_run_time=True) & MODULES.keys() for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, "a cycle: " + " -> ".join([*way, name])
        if name not in done:
            for other in sorted(graph[name] - {name}):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def is_true(node: ast.Call, keyword: str) -> bool:
    return any(
        k.arg == keyword and isinstance(k.value, ast.Constant) and k.value.value is True
        for k in node.keywords
    )


def safe_loaders(path: Path) -> set[str]:
    """Classes of this file that extend PyYAML's safe loader."""
    return {
        node.name
        for node in nodes(path)
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base) in ("yaml.SafeLoader", "yaml.CSafeLoader") for base in node.bases)
    }


# Functions that turn a file or a text into code.
NEVER = {
    *("eval", "exec", "compile", "os.system", "os.popen", "os.execl", "os.execv", "os.execvp"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"),
    *("torch.jit.load", "torch.package.PackageImporter", "torch.serialization.add_safe_globals"),
    *("torch.hub.load", "shutil.unpack_archive", "subprocess.getoutput"),
}
# Packages that run what they read; the tests write with pickle.
RUNNING = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
READING = {"load", "loads", "Unpickler", "open"}
# `safe_globals` may allow these further classes in torch's reader.
SAFE_CLASSES = {"argparse.Namespace"}


def faults(path: Path) -> Iterator[str]:
    for name, node in calls(path):
        where = f"{name_of(path)}:{node.lineno}: {name}"
        keywords = {k.arg: k.value for k in node.keywords}
        first, _, last = name.rpartition(".")
        # A test may read what it has pickled itself.
        own = first == "pickle" and path.is_relative_to(ROOT / "tests")
        if name in NEVER or (first in RUNNING and last in READING and not own):
            yield where
        if "shell" in keywords and name.startswith("subprocess."):
            yield f"{where} with shell"
        if name == "torch.load" and not is_true(node, "weights_only"):
            yield f"{where} without weights_only=True"
        if name in ("np.load", "numpy.load"):
            value = keywords.get("allow_pickle")
            if not (isinstance(value, ast.Constant) and value.value is False):
                yield f"{where} without allow_pickle=False"
        if name in ("yaml.load", "yaml.load_all"):
            loader = keywords.get("Loader")
            if loader is None or ast.unparse(loader) not in safe_loaders(path):
                yield f"{where} with a loader that is not safe"
        if last in ("extract", "extractall") and not path.is_relative_to(ROOT / "tests"):
            yield f"{where}: names in an archive may be any paths"
        if last == "safe_globals" and {ast.unparse(argument) for argument in node.args} != {
            f"[{', '.join(sorted(SAFE_CLASSES))}]"
        }:
            yield f"{where} of more than {', '.join(SAFE_CLASSES)}"
        # The source must name what it imports.
        is_import = name in ("importlib.import_module", "__import__")
        if (
            is_import
            and not path.is_relative_to(ROOT / "tests")
            and not (node.args and isinstance(node.args[0], ast.Constant))
        ):
            yield f"{where} of a computed name"
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module in RUNNING:
            names = READING & {alias.name for alias in node.names}
            yield from (f"{name_of(path)}:{node.lineno}: {name}" for name in names)


def test_nothing_executes_what_it_reads() -> None:
    found = [fault for path in SOURCES for fault in faults(path)]
    assert not found, "\n".join(found)


def test_no_shell_script_runs_what_it_reads() -> None:
    scripts = [path for path in FILES if path.suffix == ".sh" or path.parent.name == ".ci"]
    assert scripts
    pattern = re.compile(r"(^|[;&|]\s*)\s*eval\s|\b(curl|wget)\b.*\|\s*(ba)?sh\b", re.MULTILINE)
    found = [name_of(path) for path in scripts if pattern.search(path.read_text())]
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "exec(text)",
        "torch.serialization.safe_globals([X])",
        "from pickle import loads",
        "archive.extractall()",
        "importlib.import_module(name)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "pickle.loads(content)",
    ],
)
def test_faults_are_found(text: str, tmp_path: Path) -> None:
    path = tmp_path / "case.py"
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "ROOT", tmp_path)
        assert len(list(faults(path))) == 1


def test_pytest_finds_every_test() -> None:
    for path in SOURCES:
        if path.is_relative_to(ROOT / "tests"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            functions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
            has_tests = any(name.startswith("test_") for name in functions)
            assert has_tests == path.name.startswith("test_"), name_of(path)
            assert len(set(functions)) == len(functions), f"{name_of(path)}: a test hides another"


def test_what_tests_share_lies_in_helpers() -> None:
    """A file of tests is imported at most as a whole, for its tests to run on something else."""
    for path in SOURCES:
        modules = (n.module or "" for n in nodes(path) if isinstance(n, ast.ImportFrom))
        shared = [name for name in modules if name.rpartition(".")[2].startswith("test_")]
        assert not shared, f"{name_of(path)} imports from {', '.join(shared)}"


# In pieces, so that this file does not contain what it searches for.
UNWANTED = {
    "a path of some machine": r"(?<![\w.])/(?:wo"
    + r"rk|ro"
    + r"ot|ho"
    + r"me|fa"
    + r"rm|Us"
    + r"ers)/\w",
    "the host of a registry": r"pypi\.o" + r"rg|python" + r"hosted|registry\.npm" + r"js|deb\.deb",
    "unfinished work": r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b",
}


@pytest.mark.parametrize("what", UNWANTED)
def test_text_files_are_free_of(what: str) -> None:
    found = []
    for path in FILES:
        if path.stat().st_size > 2**20:
            continue  # weights
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # an array, a picture
        found += [
            f"{name_of(path)}:{number}: {line.strip()[:80]}"
            for number, line in enumerate(lines, 1)
            if re.search(UNWANTED[what], line)
        ]
    assert not found, "\n".join(found)
