"""`python -m tokenmixup`, or `tokenmixup`: what is installed, for reports of problems."""

import importlib.metadata
import platform

import tokenmixup
from tokenmixup import _assignment, hosts

_LIBRARIES = ("timm", "torchvision", "transformers")
"""The distributions that hosts come from."""


def report() -> str:
    """Versions, what was built, and which hosts' libraries are there, a line each."""
    solver = "built" if _assignment.compiled_solver() else "not built; lapx finds the same partners"
    lines = {
        "tokenmixup": tokenmixup.__version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **{name: importlib.metadata.version(name) for name in ("torch", "numpy", "lapx")},
        "solver in C": solver,
    }
    for library in _LIBRARIES:
        families = ", ".join(f.removeprefix(f"{library} ") for f in hosts.families_of(library))
        try:
            version = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        lines[library] = f"{version} (hosts: {families})"
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())


def main() -> None:
    """Print the report."""
    print(report())


if __name__ == "__main__":
    main()
