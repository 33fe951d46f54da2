"""Web pages that come in place of a file: recognised, told in a few words, and never kept."""

import pytest

from experiments.zoo.transfer import TransferError
from experiments.zoo.web_pages import describe_page, is_page
from tests.experiments.zoo.test_download import (
    CONTENT,
    address,
    get,
    partial,
    patience,
    server,
    waits,
)
from tests.helpers.http_server import page, ranges, whole

__all__ = ["get", "partial", "patience", "server", "waits"]  # fixtures


QUOTA = """<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>
<p class="uc-error-caption">Sorry, you can't view or download this file at this time.</p>
<p>Too many users have viewed or downloaded this file recently.</p></body></html>"""
SIGN_IN = """<html><head><title>Sign in - Google Accounts</title></head>
<body><form action="https://accounts.google.com/signin"></form></body></html>"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (QUOTA, "'Google Drive - Quota exceeded': the owner's download quota"),
        (SIGN_IN, "'Sign in - Google Accounts': it wants somebody to sign in"),
        ("Try again tomorrow", "a web page without a title"),
        ("", "a web page without a title"),
    ],
)
def test_pages_with_status_200_are_not_files(server, request, get, partial, text, message):
    with pytest.raises(TransferError, match=message):
        get(address(server, request, page(text)))
    assert not partial.exists()


def test_pages_that_do_not_say_so_are_not_files(server, request, get, partial):
    body = b"\xef\xbb\xbf \n" + QUOTA.encode()
    behaviour = whole(body, Content_Type="application/octet-stream")
    with pytest.raises(TransferError, match="Quota exceeded"):
        get(address(server, request, behaviour))
    assert not partial.exists()


def test_files_that_are_called_pages_are_files(server, request, get):
    content, _ = get(address(server, request, whole(CONTENT, Content_Type="text/html")))
    assert content == CONTENT


def test_a_page_in_the_place_of_the_rest_is_not_joined(server, request, get, partial):
    url = address(server, request, ranges(CONTENT, cut_after=100_000), page(QUOTA))
    with pytest.raises(TransferError, match="Quota exceeded"):
        get(url)
    assert not partial.exists() or partial.read_bytes() == CONTENT[:100_000]


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("<title>Google Drive - Virus scan warning</title>", "virus scan"),
        ("<title>a &amp; b</title>", "titled 'a & b'"),
        ("<p>You need access</p>", "without a title: it wants somebody to sign in"),
        ("<p>unusual traffic from your network</p>", "prove"),
        ("\ufeff<!doctype html>", "without a title"),
    ],
)
def test_pages_are_told_in_a_few_words(text, meaning):
    assert is_page(text.encode())
    assert meaning in describe_page(text.encode())


def test_files_are_no_pages():
    assert not is_page(b"PK\3\4") and not is_page(b"\x80\x02}") and not is_page(b"")
