"""Headless Chromium for the tests of pages."""

import re
import shutil
import subprocess
from pathlib import Path

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
    "--enable-logging=stderr --dump-dom"
)


def visit(address: str, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """Open a page with a fresh profile: what the document became, and the console's lines."""
    done = subprocess.run(
        [PROGRAM, *_FLAGS.split(), f"--user-data-dir={profile}", *flags, address],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    return done.stdout, re.findall(r":CONSOLE[:(]\d+\)?\] (.*)", done.stderr)


def framed(address: str, width: int, height: int) -> str:
    """A page that shows another one at a width, which a window cannot have below 500 pixels.

    It notes as JSON how large the content became, what sticks out of the page, the size in pixels
    of the plots' letters of 8 points, and the colour of the paper.
    """
    return f"""<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">
<style>body {{ margin: 0 }}</style>
<iframe id="frame" src="{address}" style="border:0;width:{width}px;height:{height}px"></iframe>
<p id="facts"></p>
<script>
document.getElementById("frame").onload = function () {{
  const inner = this.contentDocument, root = inner.documentElement;
  const box = element => element.getBoundingClientRect();
  const out = [...inner.querySelectorAll("body *:not(thead *):not(thead)")]
    .filter(element => box(element).right > {width} + 0.5 || box(element).left < -0.5);
  const letters = [...inner.querySelectorAll("figure > img")].map(drawing =>
    8 * 4 / 3 * box(drawing).width / drawing.naturalWidth);
  document.getElementById("facts").textContent = JSON.stringify({{
    width: root.scrollWidth, height: root.scrollHeight, letters: letters,
    out: out.map(element => element.outerHTML.slice(0, 80)),
    paper: getComputedStyle(inner.body).backgroundColor }});
}};
</script>"""
