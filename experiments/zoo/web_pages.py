"""Web pages that arrive in place of a file: recognised, and told in a few words."""

import html
import re

_SIGNS = (
    (
        "the owner's download quota is used up (it is given back within a day)",
        ("quota exceeded", "too many users have viewed or downloaded", "download quota"),
    ),
    (
        "it wants somebody to sign in",
        ("accounts.google.com/", "servicelogin", "you need access", "sign in", "log in"),
    ),
    (
        "it asks to confirm a download without a virus scan",
        ("virus scan", "can't scan this file", "download anyway"),
    ),
    ("it wants a human to prove that it is one", ("unusual traffic", "captcha")),
)


def is_page(head: bytes) -> bool:
    """Whether a file's first bytes are those of a web page (or of other mark-up)."""
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<"


def looks_like_page(head: bytes, content_type: str) -> bool:
    """Whether an answer is a page: by its first bytes, or called one and without a zero byte."""
    return is_page(head) or (content_type.startswith("text/html") and b"\0" not in head)


def describe_page(content: bytes) -> str:
    """A page's title and what it says about the file, as far as it is known.

    Args:
        content: the beginning of the page; 64 KiB are plenty.
    """
    text = content.decode("utf-8", errors="replace")
    found = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
    title = " ".join(html.unescape(found[1]).split())[:80] if found else ""
    named = f"a web page titled {title!r}" if title else "a web page without a title"
    lowered = html.unescape(text).lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    for meaning, signs in _SIGNS:
        if any(sign in lowered for sign in signs):
            return f"{named}: {meaning}"
    return named
