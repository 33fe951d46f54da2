"""Google Drive by gdown, against a server that answers in Drive's name.

gdown asks for https://drive.google.com as ever. The environment names a proxy, which is the tests'
own server: it answers for every host, over TLS, with certificates of an authority that the tests
made and that the environment names, too.
"""

import ssl

import pytest
import trustme

from experiments.checkpoint import LOCK_FILE
from experiments.zoo.download import MissingFileError
from tests.helpers.http_server import Server, page, ranges, redirect, status
from tests.helpers.zoo_helper import entry, files_in, quick_zoo, saved

CONTENT = saved(1, numbers=300_000)
DRIVE, FILES = "drive.google.com", "drive.usercontent.google.com"
HOSTS = (DRIVE, "docs.google.com", FILES, "accounts.google.com")
FILE = {
    "Content_Disposition": 'attachment; filename="cct.pth.tar"',
    "Content_Type": "application/octet-stream",
}
WANTED = entry(drive="ID")

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
        target = f"https://{FILES}/download?id=ID&export=download"
        server.hosts[DRIVE]["/uc"] = [redirect(target, 303)]
        yield server


@pytest.fixture
def said():
    return []


@pytest.fixture
def zoo(tmp_path, said):
    return quick_zoo(tmp_path / "weights", said.append)


def test_a_file_and_one_behind_the_warning_of_no_virus_scan(drive, zoo):
    drive.hosts[FILES]["/download"] = [ranges(CONTENT, **FILE)]
    assert zoo.obtain(WANTED).read_bytes() == CONTENT
    drive.hosts[FILES]["/download"] = [page(WARNING)]
    drive.hosts[FILES]["/big"] = [ranges(CONTENT, **FILE)]
    assert zoo.obtain(entry(name="big", drive="ID")).read_bytes() == CONTENT


def test_a_cut_is_continued_and_so_is_a_part_by_a_later_command(drive, zoo, said):
    cut = ranges(CONTENT, cut_after=700_000, **FILE)
    drive.hosts[FILES]["/download"] = [cut, status(404, **FILE)]
    with pytest.raises(MissingFileError, match="404"):
        zoo.obtain(WANTED)
    assert 0 < zoo.state(WANTED)[1] <= 700_000
    assert any("continuing" in line for line in said)
    drive.hosts[FILES]["/download"] = [ranges(CONTENT, **FILE)]
    assert zoo.obtain(WANTED).read_bytes() == CONTENT
    assert drive.requests["/download"][-1]["range"].startswith("bytes=")
    assert files_in(zoo.folder) == [WANTED.file, LOCK_FILE]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (page(QUOTA), "/view: Too many users have viewed"),
        (page(SIGN_IN), "/view: Cannot retrieve the public link"),
        (page("<title>Error 404 (Not Found)!!1</title>", 404), "Cannot retrieve the public link"),
        (lambda handler: handler.reply(200, b"?"), "an answer that gdown cannot read"),
        (
            page("<html>", Content_Disposition=FILE["Content_Disposition"]),
            "is not kept: it is a web page",
        ),
    ],
    ids=["quota", "sign in", "gone", "not understood", "page called a file"],
)
def test_what_comes_in_place_of_the_file_is_told_and_not_kept(drive, zoo, answer, message):
    drive.hosts[DRIVE]["/uc"] = [answer]
    with pytest.raises(MissingFileError, match=message) as caught:
        zoo.obtain(WANTED)
    advice = "\n".join(caught.value.advice)
    assert "https://drive.google.com/file/d/ID/view" in advice and "--cookies" in advice
    assert files_in(zoo.folder) == []


def test_cookies_are_sent_only_when_given(drive, zoo, tmp_path):
    drive.hosts[FILES]["/download"] = [ranges(CONTENT, **FILE)]
    zoo.obtain(WANTED)
    assert "cookie" not in drive.requests["/uc"][0]
    zoo.path(WANTED).unlink()
    zoo.cookies = tmp_path / "cookies.txt"
    line = ".google.com\tTRUE\t/\tTRUE\t4102444800\tSID\tsecret"
    zoo.cookies.write_text(f"# Netscape HTTP Cookie File\n{line}\n")
    zoo.obtain(WANTED)
    assert "SID=secret" in drive.requests["/uc"][-1]["cookie"]
