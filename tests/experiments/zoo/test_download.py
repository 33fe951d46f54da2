"""Downloads against a real server on the loopback address: the right file, or none and a reason."""

import contextlib
import os
import signal
import threading
import time

import pytest

from experiments.checkpoint import LOCK_FILE, known_files, read_weights
from experiments.errors import CheckpointError
from experiments.zoo.download import MissingFileError, Zoo
from tests.helpers.commands import finished, started, wait_until
from tests.helpers.http_server import (
    Server,
    cut_whole,
    page,
    ranges,
    status,
    whole,
)
from tests.helpers.zoo_helper import (
    CONTENT,
    entry,
    files_in,
    manifest_of,
    quick_zoo,
    saved,
    sha,
)

LARGE = saved(1, numbers=300_000)  # gdown writes pieces of half a megabyte
PIECE = 512 * 1024


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


def asked(server, path):
    return [request.get("range") for request in server.requests[path]]


# Hashes


def test_the_first_download_records_the_hash_and_says_so(server, small_zoo, weights, said):
    wanted = entry(server.offer("/first", ranges(CONTENT)))
    assert small_zoo.obtain(wanted).read_bytes() == CONTENT
    assert files_in(weights) == [wanted.file, LOCK_FILE]
    known = known_files(weights)[wanted.file]
    assert known["sha256"] == sha(CONTENT) and known["source"] == wanted.url
    assert any("its hash was not known; recorded in" in line for line in said)
    assert small_zoo.state(wanted)[0] == "verified"
    small_zoo.obtain(wanted)  # again: nothing is requested
    assert len(server.requests["/first"]) == 1


def test_a_known_hash_is_checked_and_not_recorded(server, small_zoo, weights):
    wanted = entry(server.offer("/known", ranges(CONTENT)), sha256=sha(CONTENT))
    small_zoo.obtain(wanted)
    assert files_in(weights) == [wanted.file]
    assert small_zoo.state(wanted)[0] == "verified"


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


def test_the_hash_is_checked_wherever_weights_are_read(small_zoo, weights):
    weights.mkdir()
    path = weights / "small.pth.tar"
    path.write_bytes(CONTENT)
    small_zoo.verify(entry())
    assert read_weights(path).kind == "checkpoint of timm"
    path.write_bytes(saved(1))
    with pytest.raises(CheckpointError, match="is not the file that it should be"):
        read_weights(path)


def test_a_damaged_hash_file_is_not_repaired(weights, small_zoo):
    weights.mkdir()
    (weights / "small.pth.tar").write_bytes(CONTENT)
    for text in ("[", "a: b", "a: {sha256: 1}", "- 1", "a: 1\na: 2"):
        (weights / LOCK_FILE).write_text(text)
        with pytest.raises(CheckpointError, match=LOCK_FILE):
            small_zoo.verify(entry())
        assert (weights / LOCK_FILE).read_text() == text


def test_a_folder_that_is_shared_and_read_only(small_zoo, weights, said, monkeypatch):
    def refuse(path, source):
        raise PermissionError(13, "Permission denied")

    weights.mkdir()
    (weights / "small.pth.tar").write_bytes(CONTENT)
    monkeypatch.setattr("experiments.checkpoint.record_hash", refuse)
    assert small_zoo.verify(entry()) == sha(CONTENT)
    assert "cannot record its hash: Permission denied" in said[0]


# What servers do


FAULTS = {
    "page": ([page("<title>Quota exceeded</title>")], "not kept: it is a web page"),
    "refusal": ([status(403)], "/fault-refusal: 403 Forbidden$"),
    "busy": ([status(503)], "503 Service Unavailable$"),
    "cut": ([cut_whole(CONTENT, 1000)], "."),
    "no answer": ([lambda handler: handler.cut()], "."),
    "half": ([whole(CONTENT[:1500])], "cut off"),
    "no checkpoint": ([whole(b"hello")], "no checkpoint"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_leaves_a_file_under_the_name(server, small_zoo, weights, fault):
    path = f"/fault-{fault.replace(' ', '-')}"
    behaviours, message = FAULTS[fault]
    with pytest.raises(MissingFileError, match=message) as caught:
        small_zoo.obtain(entry(server.offer(path, *behaviours)))
    assert "\n" not in str(caught.value)
    assert [name for name in files_in(weights) if not name.endswith(".part")] == []
    # and the right file comes when the fault is gone
    wanted = entry(server.offer(path, ranges(CONTENT)))
    assert small_zoo.obtain(wanted).read_bytes() == CONTENT
    assert files_in(weights) == [wanted.file, LOCK_FILE]


def test_a_cut_connection_is_continued(server, small_zoo, said):
    # gdown asks first whether the file has changed, then for the rest of it
    cut = ranges(LARGE, cut_after=PIECE + 1000)
    wanted = entry(server.offer("/cut", cut, ranges(LARGE)))
    assert small_zoo.obtain(wanted).read_bytes() == LARGE
    assert asked(server, "/cut") == [None, None, f"bytes={PIECE}-"]
    assert any("continuing" in line for line in said)


def test_a_later_command_continues_the_part(server, small_zoo, weights):
    cut = ranges(LARGE, cut_after=PIECE + 1000)
    url = server.offer("/later", cut, status(404))
    with pytest.raises(MissingFileError, match="404"):
        small_zoo.obtain(entry(url))
    words, arrived = small_zoo.state(entry(url))
    assert words == "a part" and 0 < arrived <= PIECE + 1000
    server.offer("/later", ranges(LARGE))
    assert small_zoo.obtain(entry(url)).read_bytes() == LARGE
    assert asked(server, "/later")[-1] == f"bytes={arrived}-"
    assert files_in(weights) == ["small.pth.tar", LOCK_FILE]


def test_a_server_without_ranges_starts_again(server, small_zoo, said):
    behaviours = (cut_whole(LARGE, PIECE + 1000), whole(LARGE))
    assert small_zoo.obtain(entry(server.offer("/plain", *behaviours))).read_bytes() == LARGE
    assert any("starting again" in line for line in said)


def test_a_server_without_ranges_that_always_cuts_is_given_up(server, small_zoo, weights):
    with pytest.raises(MissingFileError):
        small_zoo.obtain(entry(server.offer("/always", cut_whole(LARGE, PIECE + 1000))))
    assert not (weights / "small.pth.tar").exists()
    assert len(server.requests["/always"]) < 10


@pytest.mark.parametrize("other", [saved(2, numbers=300_000), saved(2, numbers=500_000)])
def test_a_part_of_another_version_is_not_joined(server, small_zoo, other):
    url = server.offer("/version", ranges(other, cut_after=PIECE + 1000), status(404))
    with pytest.raises(MissingFileError):
        small_zoo.obtain(entry(url))
    server.offer("/version", ranges(LARGE))
    with contextlib.suppress(MissingFileError):
        small_zoo.obtain(entry(url))  # joined to the other's part, its checksums do not fit
    small_zoo.obtain(entry(url))
    assert small_zoo.path(entry(url)).read_bytes() == LARGE


def test_a_stalled_connection_is_left_and_continued(server, small_zoo, weights):
    gate = threading.Event()
    url = server.offer("/stall", cut_whole(LARGE, PIECE + 1000, gate), ranges(LARGE))
    start = time.monotonic()
    assert small_zoo.obtain(entry(url)).read_bytes() == LARGE
    gate.set()
    assert time.monotonic() - start < 10


def test_the_failure_names_link_path_and_command_at_once(small_zoo, weights):
    with Server() as gone:
        wanted = entry(gone.offer("/x"))
    start = time.monotonic()
    with pytest.raises(MissingFileError, match=r"/x: Connection refused$") as caught:
        small_zoo.obtain(wanted)
    assert time.monotonic() - start < 2
    advice = "\n".join(caught.value.advice)
    assert wanted.url in advice
    assert str(weights.resolve() / wanted.file) in advice
    assert f"python -m experiments.zoo verify small --weights {weights}" in advice
    assert files_in(weights) == []


def test_a_folder_that_cannot_be_written(server, said, tmp_path):
    (tmp_path / "file").write_text("in the way")
    zoo_there = Zoo(tmp_path / "file" / "weights", say=said.append)
    with pytest.raises(MissingFileError, match="cannot write: Not a directory"):
        zoo_there.obtain(entry(server.offer("/unwritten", ranges(CONTENT))))


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_no_file_under_the_name(server, tmp_path, weights):
    gate = threading.Event()
    url = server.offer("/kill", cut_whole(LARGE, PIECE + 1000, gate), ranges(LARGE))
    manifest = manifest_of(tmp_path, big={"url": url})
    command = ("-m", "experiments.zoo", "download", "big")
    command += ("--manifest", manifest, "--weights", weights)
    with started(*command) as process:
        assert process.stdout is not None and "from http" in process.stdout.readline()
        wait_until(lambda: any(p.stat().st_size for p in weights.glob("*.part")), process)
        os.kill(process.pid, signal.SIGKILL)
    gate.set()
    assert not (weights / "big.pth.tar").exists()
    code, _, err = finished(*command)
    assert code == 0, err
    assert (weights / "big.pth.tar").read_bytes() == LARGE
    assert files_in(weights) == ["big.pth.tar", LOCK_FILE]
