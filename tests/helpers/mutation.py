"""Small changes of the code, one at a time, each of which some test should notice.

    python -m tests.helpers.mutation tokenmixup/scorenet.py --tests tests/tokenmixup --sample 50

The tests run once, to see which of them reach which line. Then each mutant gets a process of its
own, a fork in which the functions of the file have the mutant's code, and the tests that reach its
line run there until one fails, fastest first. Only bodies of functions are changed, and in them
neither words of errors nor `assert`; what runs when a module is imported keeps its effect. Each
result is a line of JSON; a survivor needs a test, or a reason why nothing can notice it.
"""

import argparse
import ast
import contextlib
import copy
import gc
import json
import os
import pickle
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
MOST_SECONDS = 30  # of the tests of one mutant
PAIRS = "Lt LtE  Gt GtE  Eq NotEq  Is IsNot  In NotIn  Add Sub  Mult Div  And Or  BitAnd BitOr"
OTHER = {a: b for pair in PAIRS.split("  ") for a, b in (pair.split(), pair.split()[::-1])}
OTHER |= {
    "FloorDiv": "Div",
    "RShift": "LShift",
    "LShift": "RShift",
    "Mod": "FloorDiv",
    "Pow": "Mult",
    "MatMult": "Mult",
}
LIBRARIES = {"torch", "nn", "F", "np", "math", "functools", "ctypes"}
SKIPPED = ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.FunctionDef


def changed(node: ast.AST, **fields: Any) -> ast.AST:
    node = copy.copy(node)
    vars(node).update(fields)
    return node


def other(op: ast.AST) -> ast.AST:
    return getattr(ast, OTHER[type(op).__name__])()


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""
    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield changed(node, ops=[*ops[:i], other(op), *ops[i + 1 :]])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op):
            yield changed(node, op=other(op))
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() | str() as value):
            yield ast.Constant(value + ("X" if isinstance(value, str) else 1))
        case ast.Slice(lower=lower, upper=upper):
            yield from [changed(node, lower=None)] if lower else []
            yield from [changed(node, upper=None)] if upper else []
        case ast.Call(func=func, args=given, keywords=keywords):
            free = isinstance(func, ast.Name) or ast.unparse(func).split(".")[0] in LIBRARIES
            yield from given[:1] if free else [func.value] if hasattr(func, "value") else []
            if len(given) > 1 and not ast.unparse(func).endswith(".transpose"):
                yield changed(node, args=[given[1], given[0], *given[2:]])
            for i in range(len(keywords)):
                yield changed(node, keywords=keywords[:i] + keywords[i + 1 :])
        case ast.Return(value=ast.expr()):
            yield ast.Return(ast.Constant(None))
        case ast.If() | ast.IfExp():
            yield from (changed(node, test=ast.Constant(value)) for value in (False, True))
        case ast.With(body=body):
            yield ast.If(ast.Constant(True), body, [])
        case ast.comprehension(ifs=[_, *_]):
            yield changed(node, ifs=[])
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            if name in {part.id for part in ast.walk(value) if isinstance(part, ast.Name)}:
                yield ast.Pass()
    if isinstance(node, ast.Expr | ast.AugAssign | ast.Delete) or (
        isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name)
    ):
        yield ast.Pass()


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every (parent, field, index, node) below a node that may be changed."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list") or isinstance(value, ast.arguments):
            continue
        for i, inner in enumerate(value if isinstance(value, list) else [value]):
            text = isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant)
            if isinstance(inner, ast.AST) and not (text or isinstance(inner, SKIPPED)):
                yield node, field, i if isinstance(value, list) else None, inner
                yield from places(inner)


def mutants(path: Path, tree: ast.AST) -> Iterator[tuple[str, range, Callable[[], None]]]:
    """Name, lines and application of every change of a file's tree."""
    for function in filter(lambda node: isinstance(node, ast.FunctionDef), ast.walk(tree)):
        for parent, field, i, node in places(function):
            for variant in variants(node):
                old, new = (" ".join(ast.unparse(part).split()) for part in (node, variant))
                placed = node if hasattr(node, "lineno") else parent
                ast.fix_missing_locations(ast.copy_location(variant, placed))
                value = getattr(parent, field)
                value = variant if i is None else [*value[:i], variant, *value[i + 1 :]]
                where = f"{path.relative_to(ROOT)}:{placed.lineno}:{placed.col_offset}"
                body = getattr(node, "body", None)
                end = body[0].lineno if isinstance(body, list) else placed.end_lineno
                change = (lambda *to: lambda: setattr(*to))(parent, field, value)
                if old != new:
                    name = f"{where} {function.name}: {old[:90]} -> {new[:90]}"
                    yield name, range(placed.lineno, end + 1), change


def codes(code: CodeType) -> Iterator[tuple[tuple[str, int], CodeType]]:
    """The code of every function in that of a module, by its name and first line."""
    for inner in (constant for constant in code.co_consts if isinstance(constant, CodeType)):
        yield (inner.co_qualname, inner.co_firstlineno), inner
        yield from codes(inner)


def in_child(work: Callable[[], Any], seconds: int) -> Any:
    """What `work` gives in a process of its own; None where it took too long or died."""
    with tempfile.TemporaryFile() as answer:
        if (child := os.fork()) == 0:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            signal.alarm(20 * seconds)  # it waits for ever, or the machine is busy
            for stream in (0, 1, 2):
                os.dup2(os.open(os.devnull, os.O_RDWR), stream)
            try:
                pickle.dump(work(), answer)
            except BaseException as error:
                pickle.dump(error, answer)
            answer.flush()
            os._exit(0)
        os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what its tests started
        answer.seek(0)
        return pickle.loads(content) if (content := answer.read()) else None


class Mutation:
    """Plugin of pytest that tries mutants with the collected tests in place of running them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.failed = options, ""
        self.files = [path.resolve() for path in options.files]

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        import hypothesis  # a plugin of pytest, which imports it

        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # nobody reads the example
        hypothesis.settings.register_profile("mutation", hypothesis.settings(), phases=phases)
        hypothesis.settings.load_profile("mutation")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or (report.nodeid if report.failed else "")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = session.items
        failed, reach = in_child(self.reached, 1800)
        assert not failed, f"{failed} fails before a mutant is tried"
        functions = [thing for thing in gc.get_objects() if type(thing) is FunctionType]
        for path in self.files:
            own = [f for f in functions if f.__code__.co_filename == str(path)]
            tree = ast.parse(path.read_text(encoding="utf-8"))
            chosen = [m for m in mutants(path, tree) if re.search(self.options.match, m[0])]
            random.Random(self.options.seed).shuffle(chosen)
            for name, lines, change in chosen[: self.options.sample]:
                wanted = {(str(path), line) for line in lines}
                tests = sorted((s, i) for i, (s, reached) in enumerate(reach) if reached & wanted)
                while sum(seconds for seconds, _ in tests) > MOST_SECONDS:
                    tests.pop()
                work = (lambda *of: lambda: self.tried(*of))(change, tree, own, tests)
                by = in_child(work, 20 + int(5 * sum(seconds for seconds, _ in tests)))
                result = "timeout" if by is None else "killed" if by else "survived"
                result = "no code" if isinstance(by, Exception) else result
                row = {"mutant": name, "result": result, "by": str(by), "tests": len(tests)}
                print(json.dumps(row), flush=True)
        return True

    def run(self, item: pytest.Item) -> None:
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)

    def reached(self) -> tuple[str, list[tuple[float, set[tuple[str, int]]]]]:
        """Seconds of each test, and the lines of the files that it reaches."""
        files, found = set(map(str, self.files)), []
        for item in self.items:
            lines: set[tuple[str, int]] = set()

            def trace(frame, event, argument, lines=lines):
                if frame.f_code.co_filename not in files:
                    return None
                lines.add((frame.f_code.co_filename, frame.f_lineno))
                return trace

            begin = time.process_time()
            sys.settrace(trace)
            self.run(item)
            sys.settrace(None)
            found.append((time.process_time() - begin, lines))
        return self.failed, found

    def tried(self, change: Callable[[], None], tree: Any, functions: list, tests: list) -> str:
        """The test that notices a mutant, or nothing."""
        change()
        path = functions[0].__code__.co_filename
        new = dict(codes(SourceFileLoader("mutant", path).source_to_code(tree, path)))
        for function in functions:
            code = function.__code__
            function.__code__ = new.get((code.co_qualname, code.co_firstlineno), code)
        for _, index in tests:
            self.failed or self.run(self.items[index])
        return self.failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tests", nargs="+", required=True)
    parser.add_argument("--sample", type=int, help="mutants of each file, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--match", default="", help="only mutants whose name has this pattern")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CI": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["-qq", "-s", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
        fixed += [f"--basetemp={folder}/tests", *options.tests]
        sys.exit(pytest.main(fixed, plugins=[Mutation(options)]))
