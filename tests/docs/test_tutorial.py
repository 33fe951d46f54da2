"""docs/tutorial.ipynb: it runs, and the committed outputs are those that it gives."""

import re

import pytest
from nbformat import NotebookNode

from tests.helpers import tutorial_notebook

COMMITTED = tutorial_notebook.read()
CODE = [cell for cell in COMMITTED.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def executed() -> NotebookNode:
    return tutorial_notebook.execute(tutorial_notebook.read())


def shape(cell: NotebookNode) -> list[str]:
    """The outputs of a cell without their numbers, which differ by rounding between machines."""
    found = []
    for output in cell.outputs:
        if output.output_type == "stream":
            text = re.sub(r"-?\d[\d.]*", "#", output.text)
            found.append(f"{output.name}: {' '.join(text.split())}")
        else:
            found.append(" ".join([output.output_type, *sorted(output.get("data", ()))]))
    return found


def printed(notebook: NotebookNode) -> str:
    outputs = (o for cell in notebook.cells for o in cell.get("outputs", ()))
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.mark.slow
def test_it_runs_and_gives_the_committed_outputs(executed: NotebookNode) -> None:
    again = [cell for cell in executed.cells if cell.cell_type == "code"]
    for number, (committed, now) in enumerate(zip(CODE, again, strict=True), 1):
        assert shape(committed) == shape(now), (
            f"cell {number} gives other outputs: run `python -m tests.helpers.tutorial_notebook`"
        )


@pytest.mark.slow
def test_its_models_learn(executed: NotebookNode) -> None:
    for notebook in (COMMITTED, executed):
        accuracies = re.findall(r"test accuracy ([\d.]+)", printed(notebook))
        assert len(accuracies) == 2
        assert all(float(accuracy) > 0.7 for accuracy in accuracies), accuracies
        mixed = re.search(r"easy_share +([\d.]+)", printed(notebook))
        assert mixed is not None
        assert 0.1 < float(mixed[1]) < 1, "a notebook that mixes nothing shows nothing"


def test_the_committed_notebook_is_complete_and_clean() -> None:
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 3
    assert tutorial_notebook.PATH.stat().st_size < 400_000
    assert set(COMMITTED.metadata) == {"kernelspec", "language_info"}
    assert all(not cell.metadata for cell in COMMITTED.cells)
