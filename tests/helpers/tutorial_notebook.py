"""Runs the tutorial: `python -m tests.helpers.tutorial_notebook` writes the outputs into it."""

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

PATH = Path(__file__).resolve().parent.parent.parent / "docs" / "tutorial.ipynb"


def read() -> NotebookNode:
    """The notebook as it is committed."""
    return nbformat.read(PATH, as_version=4)


def execute(notebook: NotebookNode) -> NotebookNode:
    """Run all cells in a new kernel; a cell that fails raises its error."""
    client = NotebookClient(
        notebook,
        timeout=600,
        coalesce_streams=True,  # a busy machine splits them anywhere
        kernel_name="python3",
        record_timing=False,  # dates would change at every run
        resources={"metadata": {"path": str(PATH.parent)}},
    )
    # tqdm, which timm imports, warns about missing progress bars and names its own folder
    return client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"})


def main() -> None:
    """Execute the notebook in place."""
    notebook = execute(read())
    notebook.metadata = {
        "kernelspec": notebook.metadata["kernelspec"],
        "language_info": {"name": "python"},  # without the version of whoever ran it
    }
    nbformat.write(notebook, PATH)


if __name__ == "__main__":
    main()
