"""`python -m experiments.zoo`: list, download and verify, in this process and in others."""

import resource

import pytest

from experiments.checkpoint import LOCK_FILE, known_files
from experiments.zoo import __main__ as zoo
from tests.helpers.commands import ended, fails, finished, outcome, started
from tests.helpers.http_server import Server, ranges, slow, status
from tests.helpers.zoo_helper import CONTENT, files_in, manifest_of, saved, sha


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@pytest.fixture
def weights(tmp_path):
    return tmp_path / "weights"


@pytest.mark.slow
def test_a_full_disk_keeps_what_came(server, tmp_path, weights, capsys):
    big = saved(1, numbers=500_000)
    url = server.offer("/disk", ranges(big))
    manifest = manifest_of(tmp_path, big={"url": url})

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))

    words = ("download", "big", "--manifest", manifest, "--weights", weights)
    code, out, err = finished("-m", "experiments.zoo", *words, preexec_fn=limit)
    assert code == 2, out + err
    assert "File too large" in err and "Traceback" not in err
    (part,) = weights.glob("*.part")
    assert part.read_bytes() == big[: part.stat().st_size] != b""
    assert files_in(weights) == [part.name]
    # room again
    assert outcome(capsys, zoo, *words)[0] == 0
    assert (weights / "big.pth.tar").read_bytes() == big
    assert server.requests["/disk"][-1]["range"].startswith("bytes=")


@pytest.mark.slow
def test_two_downloads_of_one_file_at_once(server, tmp_path, weights):
    url = server.offer("/twice", slow(CONTENT))
    manifest = manifest_of(tmp_path, twice={"url": url})
    words = ("download", "twice", "--manifest", manifest, "--weights", weights)
    both = [started("-m", "experiments.zoo", *words) for _ in range(2)]
    outputs = [ended(process) for process in both]
    assert [code for code, *_ in outputs] == [0, 0], outputs
    assert len(server.requests["/twice"]) == 1
    assert sum("another process is fetching it, waiting" in out for _, out, _ in outputs) == 1
    assert files_in(weights) == ["twice.pth.tar", LOCK_FILE]
    assert (weights / "twice.pth.tar").read_bytes() == CONTENT


def test_list_tells_what_is_there(server, tmp_path, weights, capsys):
    url = server.offer("/list", ranges(CONTENT))
    names = {"missing": {}, "verified": {}, "unknown": {}, "page": {}, "part": {}, "wrong": {}}
    entries = {name: {"url": url, "published_top1": 97.5} for name in names}
    entries["wrong"]["sha256"] = "0" * 64
    place = ("--manifest", manifest_of(tmp_path, **entries), "--weights", weights)
    assert outcome(capsys, zoo, "download", "verified", *place)[0] == 0
    for name in ("unknown", "wrong"):
        (weights / f"{name}.pth.tar").write_bytes(CONTENT)
    (weights / "page.pth.tar").write_text("<html>")
    (weights / "part.pth.tar.newabcd1234.part").write_bytes(b"1234")
    code, out, _ = outcome(capsys, zoo, "list", *place)
    lines = {line.split()[0]: line.rstrip() for line in out.splitlines() if line.strip()}
    assert code == 0 and "\x1b" not in out
    assert lines["missing"].split()[-2:] == ["-", "-"]
    assert lines["verified"].endswith("verified")
    assert lines["unknown"].endswith("no hash known yet")
    assert "is a web page" in lines["page"]
    assert lines["part"].endswith("a part")
    assert "SHA-256" in lines["wrong"]
    assert all("97.50" in lines[name] for name in names)


def test_download_of_all_goes_on_after_a_failure(server, tmp_path, weights, capsys):
    manifest = manifest_of(
        tmp_path,
        bad={"url": server.offer("/all-bad", status(404))},
        good={"url": server.offer("/all-good", ranges(CONTENT))},
    )
    code, out, err = outcome(
        capsys, zoo, "download", "--all", "--manifest", manifest, "--weights", weights
    )
    assert code == 2
    assert "error: bad: http" in err and ": 404 Not Found\n" in err
    assert "1 of 2 could not be had: bad" in err
    assert f"put it at              {weights.resolve()}/bad.pth.tar" in err
    assert "good.pth.tar" in out
    assert files_in(weights) == ["good.pth.tar", LOCK_FILE]


def test_verify_takes_what_was_put_there_by_hand(tmp_path, weights, capsys):
    place = ("--manifest", manifest_of(tmp_path, hand={"drive": "ID"}), "--weights", weights)
    code, _, err = outcome(capsys, zoo, "verify", *place)
    assert code == 2 and "holds no checkpoint" in err
    code, _, err = outcome(capsys, zoo, "verify", "hand", *place)
    assert code == 2 and "is missing; python -m experiments.zoo download hand" in err
    weights.mkdir()
    (weights / "hand.pth.tar").write_bytes(CONTENT)
    code, out, _ = outcome(capsys, zoo, "verify", "hand", *place)
    assert code == 0 and f"verified, SHA-256 {sha(CONTENT)}" in out and "recorded in" in out
    assert known_files(weights)["hand.pth.tar"]["source"] == "put there by hand"
    for content, message in ((saved(1), "is not the file that it"), (b"<html>", "is a web page")):
        (weights / "hand.pth.tar").write_bytes(content)
        code, _, err = outcome(capsys, zoo, "verify", *place)
        assert code == 2 and message in err
        assert (weights / "hand.pth.tar").read_bytes() == content, "it is a person's file"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fetch"], "'fetch': allowed: list, download, verify, convert"),
        (["list", "x"], "list takes no name"),
        (["download"], "give names, or --all"),
        (["download", "x", "--all"], "give names, or --all"),
        (["download", "--al"], "--al: unknown option; the nearest is all"),
        (["verify", "--cookies", "x"], "--cookies: not an option of verify"),
        (["download", "--all", "--cookies", "nothing"], "nothing is not a file"),
        (["convert"], "give one FILE, got 0"),
        (["convert", "x"], "'x': no such checkpoint"),
        (["list", "--manifest", "nothing.yaml"], "nothing.yaml: cannot read"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(tmp_path, capsys, words, message):
    assert message in fails(capsys, zoo, *words, "--weights", tmp_path)


def test_help(capsys):
    assert outcome(capsys, zoo, "--help")[1] == outcome(capsys, zoo)[1] == zoo.USAGE
