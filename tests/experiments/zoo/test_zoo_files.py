"""The zoo's files: fetched, recorded, checked and locked; the right file, or none."""

import io
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from experiments.checkpoint import LOCK_FILE, read_lock, record_hash
from experiments.errors import CheckpointError
from experiments.files import exclusive
from experiments.zoo.files import Bar, MissingFileError, Zoo
from tests.helpers.http_server import Server, cut_whole, page, ranges, stalled, status, whole
from tests.helpers.zoo_helper import CONTENT, entry, files_in, quick_zoo, saved, sha

ROOT = Path(__file__).parent.parent.parent.parent


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@pytest.fixture
def said():
    return []


@pytest.fixture
def weights(tmp_path):
    return tmp_path / "weights"


@pytest.fixture
def small_zoo(weights, said):
    return quick_zoo(weights, said.append)


def test_the_first_download_records_the_hash_and_says_so(server, small_zoo, weights, said):
    wanted = entry(server.offer("/first", ranges(CONTENT)))
    assert small_zoo.obtain(wanted).read_bytes() == CONTENT
    assert files_in(weights) == [wanted.file, LOCK_FILE]
    assert read_lock(weights)[wanted.file].sha256 == sha(CONTENT)
    assert read_lock(weights)[wanted.file].source == wanted.url
    assert any("its hash was not known; recorded in" in line for line in said)
    assert small_zoo.state(wanted).verified
    # again: nothing is asked for
    small_zoo.obtain(wanted)
    assert len(server.requests["/first"]) == 1


def test_a_known_hash_is_checked_and_not_recorded(server, small_zoo, weights):
    wanted = entry(server.offer("/known", ranges(CONTENT)), sha256=sha(CONTENT))
    small_zoo.obtain(wanted)
    assert files_in(weights) == [wanted.file]
    assert small_zoo.state(wanted).verified


@pytest.mark.parametrize("where", ["manifest", "lock"])
def test_a_file_with_another_hash_is_not_kept(server, small_zoo, weights, where):
    url = server.offer(f"/wrong-{where}", ranges(CONTENT))
    if where == "lock":
        small_zoo.obtain(entry(url))
        (weights / "small.pth.tar").unlink()
        server.offer(f"/wrong-{where}", ranges(saved(1)))
    wanted = entry(url, sha256="0" * 64 if where == "manifest" else None)
    with pytest.raises(MissingFileError, match=r"its SHA-256 is .*, expected .*" + where):
        small_zoo.obtain(wanted)
    assert files_in(weights) == ([LOCK_FILE] if where == "lock" else [])


def test_mirrors_are_asked_in_turn(server, small_zoo, said):
    wanted = entry(
        server.offer("/m0", status(404)),
        mirrors=(server.offer("/m1", page("no")), server.offer("/m2", ranges(CONTENT))),
        sha256=sha(CONTENT),
    )
    assert small_zoo.obtain(wanted).read_bytes() == CONTENT
    assert sum("from http" in line for line in said) == 3


def test_a_wrong_file_at_one_source_does_not_stop_the_next(server, small_zoo):
    wanted = entry(
        server.offer("/w0", ranges(saved(1))),
        mirrors=(server.offer("/w1", ranges(CONTENT)),),
        sha256=sha(CONTENT),
    )
    assert small_zoo.obtain(wanted).read_bytes() == CONTENT


def test_the_failure_names_link_path_and_command(small_zoo, weights):
    with Server() as gone:
        wanted = entry(gone.offer("/x"))
    with pytest.raises(
        MissingFileError, match=r"no way to 127.0.0.1: Connection refused"
    ) as caught:
        small_zoo.obtain(wanted)
    advice = "\n".join(caught.value.advice)
    assert wanted.url in advice
    assert str(weights.resolve() / wanted.file) in advice
    assert f"python -m experiments.zoo verify small --weights {weights}" in advice
    assert files_in(weights) == []


def test_drive_without_a_network_fails_at_once_and_says_the_same(small_zoo, weights, monkeypatch):
    calls = []

    def no_names(host, *args, **kwargs):
        import socket

        calls.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "no name")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("socket.getaddrinfo", no_names)
    for name in ("one", "two"):  # the second is not even tried
        with pytest.raises(MissingFileError, match=r"no way to drive.google.com") as caught:
            small_zoo.obtain(entry(name=name, drive="ID"))
        advice = "\n".join(caught.value.advice)
        assert "https://drive.google.com/file/d/ID/view" in advice and "--cookies" in advice
    assert calls == ["drive.google.com"]
    assert files_in(weights) == []


FAULTS = {
    "page": [page("<title>Quota exceeded</title>")],
    "forbidden": [status(403)],
    "gone": [status(404)],
    "cut": [cut_whole(CONTENT, 1000)],
    "half": [whole(CONTENT[:1500])],
    "no checkpoint": [whole(b"hello")],
    "another kind": [whole(b"PK\5\6" + b"\0" * 18)],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_leaves_a_file_under_the_name(server, small_zoo, weights, fault):
    path = f"/fault-{fault.replace(' ', '-')}"
    with pytest.raises(MissingFileError) as caught:
        small_zoo.obtain(entry(server.offer(path, *FAULTS[fault])))
    assert len(str(caught.value)) > 30
    left = [name for name in files_in(weights) if ".part" not in name]
    assert left == []
    # and the right file comes when the fault is gone
    wanted = entry(server.offer(path, ranges(CONTENT)))
    assert small_zoo.obtain(wanted).read_bytes() == CONTENT
    assert files_in(weights) == [wanted.file, LOCK_FILE]


def test_a_stall_leaves_a_part_that_is_continued(server, small_zoo, weights):
    gate = threading.Event()
    url = server.offer("/stall", stalled(CONTENT, 1000, gate), status(404))
    with pytest.raises(MissingFileError, match="404"):
        small_zoo.obtain(entry(url))
    gate.set()
    assert small_zoo.state(entry(url)).words == "a part"
    assert small_zoo.state(entry(url)).size == 1000
    server.offer("/stall", ranges(CONTENT))
    assert small_zoo.obtain(entry(url)).read_bytes() == CONTENT
    assert server.requests["/stall"][-1]["range"] == "bytes=1000-"


def test_a_folder_that_cannot_be_written(server, said, tmp_path):
    (tmp_path / "file").write_text("in the way")
    zoo_there = Zoo(tmp_path / "file" / "weights", say=said.append)
    with pytest.raises(MissingFileError, match="cannot write: Not a directory"):
        zoo_there.obtain(entry(server.offer("/unwritten", ranges(CONTENT))))


def test_a_folder_that_is_shared_and_read_only(small_zoo, weights, said, monkeypatch):
    def refuse(path, source):
        raise PermissionError(13, "Permission denied")

    weights.mkdir()
    (weights / "small.pth.tar").write_bytes(CONTENT)
    monkeypatch.setattr("experiments.checkpoint.record_hash", refuse)
    assert small_zoo.verify(entry()) == sha(CONTENT)
    assert "cannot record its hash: Permission denied" in said[0]


def test_progress_is_a_bar_on_a_terminal(monkeypatch, said):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    bar = Bar("small", said.append)
    bar.at(200_000, 1_000_000)
    bar.note("cut")
    bar.close()
    assert "small:  20%" in screen.getvalue() and said == ["small: cut"]


# The lock file, and the locks of processes


def test_a_crash_sets_the_lock_free(tmp_path):
    path = tmp_path / "file"
    code = f"""
import os, pathlib
from experiments.checkpoint import exclusive
with exclusive(pathlib.Path({str(path)!r})):
    os._exit(9)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert result.returncode == 9
    assert (tmp_path / ".file.lock").exists()
    with exclusive(path, lambda: pytest.fail("nobody holds it")):
        pass
    assert files_in(tmp_path) == []


def test_many_hashes_recorded_at_once_are_all_kept(tmp_path):
    paths = [tmp_path / f"{number}.bin" for number in range(20)]
    for path in paths:
        path.write_bytes(path.name.encode())
    threads = [threading.Thread(target=record_hash, args=(path, "here")) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: r.sha256 for name, r in read_lock(tmp_path).items()} == {
        path.name: sha(path.name.encode()) for path in paths
    }


def test_a_damaged_lock_is_not_repaired(weights, small_zoo):
    weights.mkdir()
    (weights / "small.pth.tar").write_bytes(CONTENT)
    for text in ("[", "a: b", "a: {sha256: 1}", "- 1"):
        (weights / LOCK_FILE).write_text(text)
        with pytest.raises(CheckpointError, match=LOCK_FILE):
            small_zoo.verify(entry())
        assert (weights / LOCK_FILE).read_text() == text
