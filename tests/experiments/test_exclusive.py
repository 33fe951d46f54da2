"""Locks end with the process that holds them."""

import os

import pytest

from experiments.files import exclusive


def test_a_crash_releases_the_lock_of_a_path_and_leaves_no_file(tmp_path):
    path = tmp_path / "file"
    if not (child := os.fork()):
        with exclusive(path):
            os._exit(9)
    os.waitpid(child, 0)
    assert (tmp_path / ".file.lock").exists()
    with exclusive(path, lambda: pytest.fail("nobody holds it")):
        pass
    assert list(tmp_path.iterdir()) == []
