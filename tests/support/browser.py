"""A page opened in a browser without a window: what it could not load, and what its console says."""

import base64
import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_LISTEN = """<script>
const problems = [];
addEventListener("error", (e) => problems.push(e.message || "not loaded: " + e.target.outerHTML.slice(0, 80)), true);
addEventListener("unhandledrejection", (e) => problems.push(String(e.reason)));
console.warn = () => {};  // Snakemake's own report warns of what it is made with
const seen = {};
</script>"""
_LOOK = """<script>
addEventListener("load", async () => {
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  const look = async () => {
    await pause(100);
    for (const image of document.images) {
      for (let tries = 0; !image.complete && tries < 20; tries++) await pause(100);
      if (!image.naturalWidth) problems.push("broken: " + image.outerHTML.slice(0, 80));
    }
  };
  await look();
  %s
  seen.width = document.documentElement.scrollWidth;
  const told = document.createElement("pre");
  told.id = "told";
  told.textContent = btoa(encodeURIComponent(JSON.stringify({problems, seen})));
  document.body.append(told);
});
</script>"""


def browser() -> str:
    """Return the path of a browser; without one, warn and skip the test."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        warnings.warn(f"no browser, so no page was opened: install one of {', '.join(_NAMES)}", stacklevel=2)
        pytest.skip(f"no browser; install one of {', '.join(_NAMES)}")
    return found


def _run(page: Path, *options: str) -> subprocess.CompletedProcess:
    line = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    line += [f"--user-data-dir={page.parent / 'browser'}", "--virtual-time-budget=20000", *options, page.as_uri()]
    return subprocess.run(line, capture_output=True, text=True, timeout=600, check=True)


def examine(page: Path, folder: Path, steps: str = "", width: int = 1280) -> tuple[list[str], dict]:
    """Open a page; return its problems, and what was seen: ``width``, pixels that it needs, and what the steps add.

    Problems are pictures that can't be shown, errors of scripts, and lines of the console.

    Args:
        folder: for a copy of the page with scripts.
        steps: JavaScript to run in the page; ``await look()`` checks its pictures, ``seen`` is an object.
    """
    copy = _with_scripts(page, folder, _LOOK % steps)
    done = _run(copy, f"--window-size={width},900", "--dump-dom")
    told = re.search(r'<pre id="told">([^<]+)</pre>', done.stdout)
    assert told, f"the page's scripts did not come to their end: {done.stderr[-2000:]}"
    value = json.loads(unquote(base64.b64decode(told[1]).decode()))
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return value["problems"] + console, value["seen"]


def screenshot(page: Path, folder: Path, steps: str = "", width: int = 1280, height: int = 900) -> np.ndarray:
    """Return a picture of a page's upper end, (height, width) grey values; arguments as for :func:`examine`."""
    _run(
        _with_scripts(page, folder, f"<script>addEventListener('load', async () => {{ {steps} }});</script>"),
        f"--window-size={width},{height}",
        f"--screenshot={folder / 'screenshot.png'}",
    )
    with Image.open(folder / "screenshot.png") as picture:
        return np.asarray(picture.convert("L"))


def _with_scripts(page: Path, folder: Path, last: str) -> Path:
    """Return a copy of a page that keeps its problems and runs a script at the end."""
    text = page.read_text()
    # The last one: an earlier one can be in a script.
    head, body = text.index("<head>") + len("<head>"), text.rindex("</body>")
    copy = folder / f"examined-{page.name}"
    copy.write_text(text[:head] + _LISTEN + text[head:body] + last + text[body:])
    return copy
