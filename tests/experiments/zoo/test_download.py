"""Downloads against a real server on the loopback address: the right file, or none and a reason."""

import os
import re
import threading
import time

import pytest

from experiments.zoo.download import discard, fetch, size_of
from experiments.zoo.transfer import DiskError, Patience, TransferError, UnreachableError, retried
from tests.helpers.http_server import (
    Server,
    busy,
    cut_at_once,
    cut_whole,
    dripping,
    page,
    ranges,
    redirect,
    stalled,
    status,
    whole,
)

CONTENT = os.urandom(300_000)


class Told:
    """A Progress that remembers."""

    def __init__(self):
        self.notes = []
        self.last = None

    def at(self, done, total):
        self.last = (done, total)

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@pytest.fixture
def waits():
    return []


@pytest.fixture
def patience(waits):
    return Patience(connect_seconds=2, stall_seconds=0.3, attempts=4, sleep=waits.append)


@pytest.fixture
def partial(tmp_path):
    return tmp_path / "weights.bin.part"


@pytest.fixture
def get(partial, patience):
    """Fetch an address and give what arrived and what was told."""

    def call(url, **kwargs):
        told = Told()
        fetch(url, partial, told, patience, **kwargs)
        assert told.last in (None, (len(CONTENT), len(CONTENT)))
        return partial.read_bytes(), told

    return call


def path_of(request):
    return "/" + re.sub(r"\W", "-", request.node.name)


def address(server, request, *behaviours):
    return server.offer(path_of(request), *behaviours)


def asked(server, request):
    return server.requests[path_of(request)]


def test_whole_file(server, request, get):
    content, told = get(address(server, request, whole(CONTENT)))
    assert content == CONTENT and told.notes == []
    assert "range" not in asked(server, request)[0]
    assert asked(server, request)[0]["user-agent"].startswith("tokenmixup/")


def test_empty_file(server, request, partial, patience):
    fetch(address(server, request, whole(b"")), partial, Told(), patience)
    assert partial.read_bytes() == b""


def test_unknown_length_and_compressed_transfer(server, request, partial, patience):
    import gzip

    def chunked(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(CONTENT), 70_000):
            piece = CONTENT[start : start + 70_000]
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        handler.wfile.write(b"0\r\n\r\n")

    fetch(address(server, request, chunked), partial, Told(), patience)
    assert partial.read_bytes() == CONTENT
    discard(partial)
    packed = whole(gzip.compress(CONTENT), Content_Encoding="gzip")
    fetch(address(server, request, packed), partial, Told(), patience)
    assert partial.read_bytes() == CONTENT


@pytest.mark.parametrize("tag", [True, False])
def test_a_cut_is_resumed_by_a_range(server, request, get, waits, tag):
    cut = ranges(CONTENT, cut_after=100_000, tag=tag)
    content, told = get(address(server, request, cut, cut, ranges(CONTENT, tag=tag)))
    assert content == CONTENT
    sent = [seen.get("range") for seen in asked(server, request)]
    assert sent == [None, "bytes=100000-", "bytes=200000-"]
    assert ("if-range" in asked(server, request)[1]) == tag
    assert len(told.notes) == 2 and "was cut" in told.notes[0]
    assert all(0.5 <= wait <= 1.5 for wait in waits)  # each brought bytes: the count began anew


def test_a_later_call_goes_on_with_the_part(server, request, get, partial):
    url = address(server, request, ranges(CONTENT, cut_after=100_000), status(404))
    with pytest.raises(TransferError, match="404 Not Found"):
        get(url)
    assert partial.read_bytes() == CONTENT[:100_000]
    address(server, request, ranges(CONTENT))
    content, _ = get(url)
    assert content == CONTENT
    assert asked(server, request)[-1]["range"] == "bytes=100000-"


def test_a_part_that_is_whole_already(server, request, get, partial):
    url = address(server, request, ranges(CONTENT))
    get(url)
    content, _ = get(url)
    assert content == CONTENT
    assert asked(server, request)[-1]["range"] == f"bytes={len(CONTENT)}-"


def test_a_part_of_another_version_is_not_continued(server, request, get, partial):
    other = os.urandom(len(CONTENT))
    url = address(server, request, ranges(other, cut_after=100_000), status(404))
    with pytest.raises(TransferError):
        get(url)
    address(server, request, ranges(CONTENT))
    content, _ = get(url)
    assert content == CONTENT


def test_a_part_of_another_length_is_not_continued(server, request, get, partial):
    # without an ETag, the length is all that tells
    url = address(server, request, ranges(CONTENT + b"more", 100_000, tag=False), status(404))
    with pytest.raises(TransferError):
        get(url)
    address(server, request, ranges(CONTENT, tag=False))
    content, told = get(url)
    assert content == CONTENT
    assert "another part" in told.notes[0]


def test_a_part_longer_than_the_file_is_not_continued(server, request, get, partial):
    url = address(server, request, ranges(CONTENT * 2, 400_000, tag=False), status(404))
    with pytest.raises(TransferError):
        get(url)
    address(server, request, ranges(CONTENT, tag=False))
    content, told = get(url)
    assert content == CONTENT
    assert "no such part" in told.notes[0]


@pytest.mark.parametrize("trace", [b"", b"{", b'{"url": "http://x/", "validator": "a"}', b"[1]"])
def test_a_part_of_unknown_origin_is_not_continued(server, request, get, partial, trace):
    partial.write_bytes(b"stray")
    if trace:
        partial.with_name(partial.name + ".origin").write_bytes(trace)
    content, _ = get(address(server, request, ranges(CONTENT)))
    assert content == CONTENT
    assert "range" not in asked(server, request)[0]


def test_a_server_without_ranges_starts_anew(server, request, get):
    content, _ = get(address(server, request, cut_whole(CONTENT, 100_000), whole(CONTENT)))
    assert content == CONTENT
    assert asked(server, request)[1]["range"] == "bytes=100000-"


def test_a_server_without_ranges_that_always_cuts_is_given_up(server, request, get, waits):
    with pytest.raises(TransferError, match=r"was cut.*\(4 times in a row\)"):
        get(address(server, request, cut_whole(CONTENT, 100_000)))
    # the first one brought bytes, the following ones the same bytes again
    assert len(asked(server, request)) == 4
    assert len(waits) == 3 and waits[2] > waits[0]


def test_a_server_that_never_answers_whole_is_given_up(server, request, get, partial):
    with pytest.raises(TransferError, match="was cut"):
        get(address(server, request, cut_at_once()))
    assert not partial.exists()


def test_redirects_are_followed(server, request, get):
    final = server.offer("/final", ranges(CONTENT))
    content, _ = get(address(server, request, redirect(final)))
    assert content == CONTENT


def test_endless_redirects_end(server, request, get):
    url = address(server, request)
    address(server, request, redirect(url))
    with pytest.raises(TransferError, match="redirects"):
        get(url)


@pytest.mark.parametrize("code", [401, 403, 404, 410, 451])
def test_refusals_are_final(server, request, get, partial, code):
    with pytest.raises(TransferError, match=f"127.0.0.1 answers {code}"):
        get(address(server, request, status(code)))
    assert len(asked(server, request)) == 1
    assert not partial.exists()


def test_a_refusal_tells_what_its_page_says(server, request, get):
    with pytest.raises(TransferError, match=r"403 Forbidden.*'Drive - Quota exceeded': the owner"):
        get(address(server, request, page("<title>Drive - Quota exceeded</title>", 403)))


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_busy_servers_recover(server, request, get, waits, code):
    content, told = get(address(server, request, busy(code), busy(code), whole(CONTENT)))
    assert content == CONTENT
    assert str(code) in told.notes[0] and "attempt 2 of 4" in told.notes[0]
    assert 0.5 <= waits[0] <= 1.5 and 1 <= waits[1] <= 3  # backs off


@pytest.mark.parametrize(("after", "low", "high"), [(7, 7, 7), ("date", 0, 0), ("?", 0.5, 1.5)])
def test_the_wait_that_a_server_asks_for_is_kept(server, request, get, waits, after, low, high):
    content, _ = get(address(server, request, busy(429, after), whole(CONTENT)))
    assert content == CONTENT
    assert low <= waits[0] <= high


def test_too_long_a_wait_is_told_instead(server, request, get, waits):
    with pytest.raises(TransferError, match=r"503 .*wants to be asked again in 86400 s"):
        get(address(server, request, busy(503, 86400)))
    assert waits == []


def test_servers_that_stay_busy_are_given_up(server, request, get):
    with pytest.raises(TransferError, match=r"429 Too Many Requests \(4 times in a row\)"):
        get(address(server, request, busy(429)))


def test_a_stalled_connection_is_left_and_resumed(server, request, get):
    gate = threading.Event()
    start = time.monotonic()
    content, told = get(address(server, request, stalled(CONTENT, 100_000, gate), ranges(CONTENT)))
    gate.set()
    assert content == CONTENT
    assert "stalled" in told.notes[0]
    assert asked(server, request)[1]["range"] == "bytes=100000-"
    assert time.monotonic() - start < 5


def test_a_connection_that_only_drips_counts_as_stalled(server, request, get):
    gate = threading.Event()
    content, told = get(address(server, request, dripping(CONTENT, gate), ranges(CONTENT)))
    gate.set()
    assert content == CONTENT
    assert "stalled" in told.notes[0] and "bytes in" in told.notes[0]


def test_a_server_that_does_not_answer_is_given_up(server, request, get, partial):
    gate = threading.Event()
    with pytest.raises(TransferError, match=r"stalled.*4 times"):
        get(address(server, request, lambda handler: gate.wait(20)))
    gate.set()
    assert not partial.exists()


def test_a_file_of_another_size_is_not_fetched(server, request, get, partial):
    with pytest.raises(TransferError, match="a file of 300,000 bytes, and the zoo knows 299,999"):
        get(address(server, request, whole(CONTENT)), expected_size=299_999)
    assert not partial.exists()


def test_no_room_is_seen_before(server, request, get, partial, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(10, 10, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskError, match="300,000 bytes are needed, 1,000 are free"):
        get(address(server, request, whole(CONTENT)))
    assert not partial.exists()


def test_no_way_to_the_server_is_told_at_once(get, waits):
    with Server() as gone:
        url = gone.offer("/x", whole(CONTENT))
    start = time.monotonic()
    with pytest.raises(UnreachableError, match=r"no way to 127.0.0.1: Connection refused"):
        get(url)
    assert waits == [] and time.monotonic() - start < 1


def test_no_such_host_is_told_at_once(get, waits):
    with pytest.raises(UnreachableError, match=r"no way to nowhere.invalid: "):
        get("http://nowhere.invalid/x")
    assert waits == []


def test_an_impossible_address_is_told(get):
    with pytest.raises(TransferError, match="http"):
        get("http://")


def test_a_way_that_is_lost_on_the_way_is_looked_for_again(partial):
    first = Server()
    url = first.offer("/x", ranges(CONTENT, cut_after=100_000))
    second: list[Server] = []

    def sleep(seconds):
        """The server goes away during the first wait, and comes back during the second."""
        if first.fileno() != -1:
            first.__exit__()
        else:
            second.append(Server(first.server_port).__enter__())
            second[0].offer("/x", ranges(CONTENT))

    told = Told()
    first.__enter__()
    fetch(url, partial, told, Patience(connect_seconds=2, attempts=3, sleep=sleep))
    second[0].__exit__()
    assert partial.read_bytes() == CONTENT
    assert "was cut" in told.notes[0] and "no way to 127.0.0.1" in told.notes[1]


def test_attempts_that_bring_bytes_are_not_counted():
    arrived, calls = [0], []

    def attempt():
        from experiments.zoo.transfer import Again

        calls.append(1)
        if len(calls) < 20:
            arrived[0] += 1
            raise Again("cut")

    patience = Patience(attempts=2, sleep=lambda seconds: None)
    retried(attempt, lambda: arrived[0], Told(), patience)
    assert len(calls) == 20


def test_size_of_nothing(tmp_path):
    assert size_of(tmp_path / "nothing") == 0
