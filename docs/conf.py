"""Settings of Sphinx, which makes the site from `docs/` and the docstrings: `bash run/docs.sh`.

The build is strict. Sphinx and MyST check every link and reference; this file checks that every
public name has a docstring and a place in the reference.
"""

import builtins
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's library

import tokenmixup
import tokenmixup._attach
import tokenmixup.integrations.timm
import tokenmixup.integrations.transformers

project = "TokenMixup"
author = "The TokenMixup contributors"
version = release = tokenmixup.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False

# Links such as `page.md#heading` work as on a code host, and are checked.
myst_heading_anchors = 4
# The tutorial is shown with its committed outputs; tests/docs/test_tutorial.py executes it.
nb_execution_mode = "off"

nitpicky = True
# The build works offline, without inventories, so names of other libraries are plain text.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|F|abc|collections|typing)\..*"),
    (r"py:.*", "|".join(name for name in dir(builtins) if not name.startswith("_"))),
]
default_role = "py:obj"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "extra_repr"}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

PUBLIC_MODULES = (
    tokenmixup,
    tokenmixup._attach,
    tokenmixup.config,
    tokenmixup.functional,
    tokenmixup.horizontal,
    tokenmixup.hosts,
    tokenmixup.hosts.base,
    tokenmixup.integrations.timm,
    tokenmixup.integrations.transformers,
    tokenmixup.model,
    tokenmixup.rules,
    tokenmixup.scorenet,
    tokenmixup.vertical,
)

logger = logging.getLogger(__name__)


def public_objects() -> Iterator[tuple[str, Any]]:
    """Public functions and classes by full name, each in the module that defines it."""
    for module in PUBLIC_MODULES:
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__
            if own and not name.startswith("_") and callable(value) and inspect.getmodule(value):
                yield f"{module.__name__}.{name}", value


def undocumented(name: str, value: Any) -> Iterator[str]:
    """The missing docstrings of a function, or of a class, its methods and its fields."""
    if not inspect.getdoc(value):
        yield name
    if not inspect.isclass(value):
        return
    for member, method in vars(value).items():
        is_public = not member.startswith("_") and inspect.isfunction(method)
        if is_public and not inspect.getdoc(getattr(value, member)):
            yield f"{name}.{member}"
    fields = list(getattr(value, "_fields", ()))
    if dataclasses.is_dataclass(value):
        fields += [field.name for field in dataclasses.fields(value)]
    described = inspect.getdoc(value) or ""
    for field in fields:
        if not re.search(rf"^ +{field}: \S", described, re.MULTILINE):
            yield f"{name}.{field}"


def check_docstrings(app: Sphinx) -> None:
    """Warn of every public name without a docstring."""
    for name, value in public_objects():
        for missing in undocumented(name, value):
            logger.warning("%s has no docstring", missing)


def check_reference(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of every public name outside the reference."""
    shown = env.domains.python_domain.objects
    for name, value in public_objects():
        short = f"tokenmixup.{value.__name__}"
        if name not in shown and short not in shown:
            logger.warning("%s is public, but on no page of docs/api", name)


def skip_tuple_fields(app: Sphinx, what: str, name: str, value: Any, skip: bool, *_: Any) -> Any:
    """Skip fields of NamedTuples: the class's docstring describes them."""
    return True if type(value).__name__ == "_tuplegetter" else None


def tidy_docstring(app: Sphinx, what: str, name: str, value: Any, opts: Any, lines: Any) -> None:
    """Escape a lone "P.", which would start a list, and shorten types as in signatures."""
    for number, line in enumerate(lines):
        line = re.sub(r"^(:\w+ \w+: [A-Z]|\s+[A-Z])\.$", r"\1\\.", line)
        if line.startswith(":vartype "):
            line = re.sub(r"(?<![\w.])(?=[a-z]\w*\.)", "~", line)
        lines[number] = line


def link_code(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Link names of the library, where they stand as code, to the reference."""
    shown = app.env.domains.python_domain.objects
    for literal in list(doctree.findall(nodes.literal)):
        if isinstance(literal.parent, nodes.reference):
            continue
        text = literal.astext().removesuffix("()")
        for module in ("", "tokenmixup.", "tokenmixup.functional.", "tokenmixup.hosts."):
            name = module + text
            if name in shown:
                entry = shown[name]
                link = make_refnode(
                    app.builder, page, entry.docname, entry.node_id, literal.deepcopy(), name
                )
                literal.replace_self(link)
                break


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", check_docstrings)
    app.connect("env-check-consistency", check_reference)
    app.connect("autodoc-skip-member", skip_tuple_fields)
    app.connect("autodoc-process-docstring", tidy_docstring, priority=900)  # after napoleon
    app.connect("doctree-resolved", link_code)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
