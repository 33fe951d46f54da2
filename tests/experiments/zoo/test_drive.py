"""Google Drive by gdown, against a server that answers in Drive's name.

gdown asks for https://drive.google.com as ever. The environment names a proxy, which is the tests'
own server: it answers for every host, over TLS, with certificates of an authority that the tests
made and that the environment names, too.
"""

import os
import ssl
import threading

import pytest
import trustme

from experiments.zoo.drive import arrived, discard_drive, fetch_from_drive
from experiments.zoo.transfer import DiskError, Patience, TransferError, UnreachableError
from tests.experiments.zoo.test_download import Told
from tests.helpers.http_server import Server, page, ranges, redirect, status

CONTENT = os.urandom(1_200_000)
DRIVE, FILES = "drive.google.com", "drive.usercontent.google.com"
HOSTS = (DRIVE, "docs.google.com", FILES, "accounts.google.com")
ATTACHMENT = {"Content_Disposition": 'attachment; filename="cct.pth.tar"'}
FILE = {**ATTACHMENT, "Content_Type": "application/octet-stream"}
TO_FILES = redirect(f"https://{FILES}/download?id=ID&export=download", 303)

WARNING = f"""<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head>
<body><form id="download-form" action="https://{FILES}/big" method="get">
<input type="hidden" name="id" value="ID"><input type="hidden" name="confirm" value="t">
<input type="submit" value="Download anyway"></form></body></html>"""
QUOTA = """<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>
<p class="uc-error-caption">Sorry, you can't view or download this file at this time.</p>
<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p>
</body></html>"""
SIGN_IN = "<!DOCTYPE html><html><head><title>Sign in - Google Accounts</title></head></html>"


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def drive(authority, tmp_path, monkeypatch):
    with Server() as server:
        server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*HOSTS).configure_cert(server.tls)
        authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
        for name in ("NO_PROXY", "no_proxy", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HTTPS_PROXY", server.address)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "authority.pem"))
        server.hosts = {host: {} for host in HOSTS}
        server.hosts[DRIVE]["/uc"] = [TO_FILES]
        yield server


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    return folder / "cct.pth.tar.drive"


@pytest.fixture
def get(target):
    def call(**kwargs):
        told = Told()
        patience = Patience(connect_seconds=2, stall_seconds=0.4, attempts=3, sleep=lambda s: None)
        fetch_from_drive("ID", target, told, patience, **kwargs)
        return told

    return call


def nothing_left(target):
    return list(target.parent.iterdir()) == []


def test_a_small_file(drive, get, target):
    drive.hosts[FILES]["/download"] = [ranges(CONTENT, **FILE)]
    told = get()
    assert target.read_bytes() == CONTENT
    assert told.last == (len(CONTENT), len(CONTENT))
    assert list(target.parent.iterdir()) == [target]


def test_a_large_file_behind_the_warning_of_no_virus_scan(drive, get, target):
    drive.hosts[FILES]["/download"] = [page(WARNING)]
    drive.hosts[FILES]["/big"] = [ranges(CONTENT, **FILE)]
    get()
    assert target.read_bytes() == CONTENT


def test_a_cut_is_resumed(drive, get, target):
    cut = ranges(CONTENT, cut_after=700_000, **FILE)
    drive.hosts[FILES]["/download"] = [cut, ranges(CONTENT, **FILE)]
    told = get()
    assert target.read_bytes() == CONTENT
    assert "Google Drive" in told.notes[0] or "cut" in told.notes[0]
    assert drive.requests["/download"][-1]["range"].startswith("bytes=")


def test_a_later_call_goes_on_with_the_part(drive, get, target):
    cut = ranges(CONTENT, cut_after=700_000, **FILE)
    drive.hosts[FILES]["/download"] = [cut, status(404, **FILE)]
    with pytest.raises(TransferError, match="404"):
        get()
    assert 0 < arrived(target) <= 700_000 and not target.exists()
    drive.hosts[FILES]["/download"] = [ranges(CONTENT, **FILE)]
    get()
    assert target.read_bytes() == CONTENT
    assert drive.requests["/download"][-1]["range"].startswith("bytes=")


def test_a_part_that_cannot_be_continued_is_fetched_anew(drive, get, target):
    target.with_name(target.name + "abcd1234.part").write_bytes(b"x" * 2_000_000)
    target.with_name(target.name + "abcd5678.part").write_bytes(b"two")
    drive.hosts[FILES]["/download"] = [ranges(CONTENT, **FILE)]
    told = get()
    assert target.read_bytes() == CONTENT
    assert "starts anew" in told.notes[0]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (QUOTA, "Google Drive does not give the file: Too many users have viewed"),
        (SIGN_IN, "Google Drive does not give the file: Cannot retrieve the public link"),
    ],
)
def test_pages_in_place_of_the_file(drive, get, target, text, message):
    drive.hosts[DRIVE]["/uc"] = [redirect("https://accounts.google.com/page")]
    drive.hosts["accounts.google.com"]["/page"] = [page(text)]
    with pytest.raises(TransferError, match=message):
        get()
    assert nothing_left(target)


def test_a_file_that_is_gone(drive, get, target):
    drive.hosts[DRIVE]["/uc"] = [page("<title>Error 404 (Not Found)!!1</title>", 404)]
    with pytest.raises(TransferError, match="Google Drive does not give the file"):
        get()
    assert nothing_left(target)


def test_a_busy_drive_recovers(drive, get, target):
    drive.hosts[FILES]["/download"] = [status(503, **FILE), ranges(CONTENT, **FILE)]
    told = get()
    assert target.read_bytes() == CONTENT
    assert "503" in told.notes[0]


def test_a_stalled_drive_is_left_and_resumed(drive, get, target):
    gate = threading.Event()

    def stall(handler):
        handler.send_response(200)
        for name, value in {**FILE, "Content-Length": str(len(CONTENT))}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(CONTENT[:700_000])
        gate.wait(20)
        handler.cut()

    drive.hosts[FILES]["/download"] = [stall, ranges(CONTENT, tag=False, **FILE)]
    told = get()
    gate.set()
    assert target.read_bytes() == CONTENT
    assert "stalled" in told.notes[0]


def test_an_answer_that_gdown_cannot_read(drive, get, target):
    drive.hosts[DRIVE]["/uc"] = [lambda handler: handler.reply(200, b"?")]
    with pytest.raises(TransferError, match="an answer that gdown cannot read"):
        get()
    assert nothing_left(target)


def test_no_network_is_told_at_once(drive, get, target, monkeypatch):
    monkeypatch.delenv("HTTPS_PROXY")
    monkeypatch.setattr("socket.getaddrinfo", no_names)
    with pytest.raises(UnreachableError, match=r"no way to drive.google.com: no name"):
        get()
    assert nothing_left(target)


def no_names(*args, **kwargs):
    import socket

    raise socket.gaierror(socket.EAI_NONAME, "no name")


def test_a_proxy_that_is_gone_is_told_at_once(drive, get, target, monkeypatch):
    with Server() as gone:
        monkeypatch.setenv("HTTPS_PROXY", gone.address)
    with pytest.raises(UnreachableError, match="the proxy failed: Connection refused"):
        get()


def test_an_impostor_is_not_asked(drive, get, monkeypatch):
    other = trustme.CA()
    other.issue_cert(*HOSTS).configure_cert(drive.tls)
    with pytest.raises(TransferError, match=r"no safe connection to drive.google.com"):
        get()


def test_cookies_are_sent_and_only_when_given(drive, get, target, tmp_path):
    cookies = tmp_path / "cookies.txt"
    line = ".google.com\tTRUE\t/\tTRUE\t4102444800\tSID\tsecret"
    cookies.write_text(f"# Netscape HTTP Cookie File\n{line}\n")
    drive.hosts[FILES]["/download"] = [ranges(CONTENT, **FILE)]
    get()
    assert "cookie" not in drive.requests["/uc"][0]
    get(cookies=cookies)
    assert "SID=secret" in drive.requests["/uc"][-1]["cookie"]


def test_a_folder_that_cannot_be_written(drive, get, target):
    drive.hosts[FILES]["/download"] = [ranges(CONTENT, **FILE)]
    target.parent.rmdir()
    with pytest.raises(DiskError, match="cannot write: No such file"):
        get()


def test_discarding(target):
    target.write_bytes(b"1")
    target.with_name(target.name + "abcd1234.part").write_bytes(b"2")
    other = target.with_name("cct.pth.tar.drives")
    other.write_bytes(b"3")
    discard_drive(target)
    assert list(target.parent.iterdir()) == [other]
