"""`snakemake --report` and the comparison's page, opened in a browser: nothing is broken, and the wanted is there."""

import os
import re
import subprocess
import sys
from html import escape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmfm.cli.__main__ import main
from support.browser import examine, screenshot
from support.checkout import dry_runs, link_workflow
from support.fid_runs import garments  # noqa: F401 (fixture)
from support.finished_results import write_mixture, write_result
from support.places import ROOT

pytestmark = pytest.mark.slow

TARGETS = ["results/comparison.html", "results/fid/dinov2_mode.txt", "results/gmm/dinov2/sweep.png"]
KEYS = {"gpus": 0, "gmm": {"n_components": 64}, "sweep": {"modes": [64]}, "decoder": {"weights": "train"}}

# Opens every picture, then the statistics, then the comparison by the link on the front page.
WALK = """
  seen.front = document.querySelector(".prose").innerText;
  seen.captions = Object.fromEntries(Object.entries(results).map(([path, result]) => [path, result.caption]));
  for (const [path, result] of Object.entries(results)) {
    app.setView({content: result.mime_type === "text/html" ? "html" : "img", contentPath: result.data_uri});
    if (result.mime_type.startsWith("image/")) await look();
  }
  app.setView({content: "stats"}); await look();
  app.setView({content: "rulegraph"}); await look();
  seen.top = document.querySelector(".prose").getBoundingClientRect().top;
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, garments):
    """A checkout whose results Snakemake takes for finished: numbers, images and curves of the demo, no training."""
    folder = link_workflow(tmp_path_factory.mktemp("report"))
    dry_runs(folder, [{"keys": KEYS, "targets": TARGETS, "touch": True}])
    results = folder / "results"
    for i, (setting, distance) in enumerate({"uncond": 35.6, "gmm": 7.1, "mode": 6.7}.items()):
        write_result(results, garments[i : 40 + i], setting, distance)
    write_mixture(results / "gmm" / "dinov2" / "k64")
    (results / "fid" / "dinov2_mode.txt").write_text("Frechet distance (not an FID): 6.7000\n")
    for picture in (path for path in results.rglob("*.png") if not path.stat().st_size):
        Image.fromarray(garments[0]).resize((640, 480)).save(picture)
    files = [f"--out={results}/comparison.{kind}" for kind in ("html", "txt", "json", "png")]
    assert main(["compare", str(results), *files]) == 0
    return folder


@pytest.fixture(scope="module")
def report(finished):
    line = [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "1",
        "--configfile",
        "overlay.yaml",
        "--report",
        "report.html",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([*line, "--", *TARGETS], cwd=finished, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return finished / "report.html"


def test_the_report_has_no_broken_picture_and_no_error(report, tmp_path):
    problems, seen = examine(report, tmp_path, WALK)
    assert problems == []
    assert seen["top"] >= 0  # a tall front page is not cut off
    front = seen["front"]
    assert "Does it pay to start near the images?" in front and "Open the comparison" in front
    assert "35.6000" in front and "dinov2_mode: Frechet distance (not an FID): 6.7000" in front
    captions = seen["captions"]
    assert {Path(path).name for path in captions} >= {"comparison.html", "modes.png", "likelihood.png", "sweep.png"}
    for path, caption in captions.items():
        assert "Bad sign" in caption and (path.endswith(".txt") or "Look for" in caption), path


def test_the_report_shows_the_comparison(report, tmp_path):
    """In a frame, whose contents can't be read from outside; so the picture must not be empty."""
    link = "document.querySelector('.prose a[href*=html]').click()"
    right = screenshot(report, tmp_path, f"setTimeout(() => {link}, 1000)")[:, 300:]
    assert right.std() > 15 and (right < 100).mean() > 0.01


def test_the_page_alone(finished, tmp_path):
    page = finished / "results" / "comparison.html"
    assert examine(page, tmp_path)[0] == []
    text = page.read_text()
    assert not re.search(r"(src|href)=.(?!data:|#)", text) and "<script" not in text  # nothing from elsewhere
    assert len(re.findall("<img ", text)) == 6 == len(re.findall(r"<img [^>]*alt=\"\w", text))
    assert len(re.findall(r'<svg [^>]*role="img" aria-label="loss', text)) == 1


def test_the_page_fits_a_phone(finished, tmp_path):
    """The browser's windows are at least 500 pixels wide, so the phone is a frame."""
    page = escape((finished / "results" / "comparison.html").read_text())
    frame = tmp_path / "phone.html"
    frame.write_text(
        "<html><head></head><body><script>addEventListener('load', () => {"
        "const frame = document.querySelector('iframe').contentDocument.documentElement;"
        "document.body.dataset.needed = frame.scrollWidth; })</script>"
        f'<iframe style="width: 375px; height: 800px; border: 0" srcdoc="{page}">'
        "</iframe></body></html>"
    )
    problems, seen = examine(frame, tmp_path, "seen.needed = document.body.dataset.needed;")
    assert problems == [] and seen["needed"] == "375"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ('<img src="data:image/png;base64,AAAA">', "broken"),
        ("<script>nothing.there</script>", "nothing is not defined"),
        ("<script>console.error('amiss')</script>", "amiss"),
    ],
)
def test_a_fault_is_found(tmp_path, fault, said):
    page = tmp_path / "page.html"
    page.write_text(f"<html><head></head><body>{fault}</body></html>")
    problems, _ = examine(page, tmp_path)
    assert any(said in problem for problem in problems)


def test_pictures_shrink_until_a_report_can_show_the_page(garments, tmp_path, monkeypatch):
    from mmfm.evaluation import comparison_page

    noise = np.random.default_rng(0).integers(0, 256, (40, 96, 96, 3), np.uint8)
    for seed in range(9):
        write_result(tmp_path, np.roll(noise, seed, axis=0), "gmm", 5.0 + seed, seed=seed)
    sizes = {}
    for most in (10**9, comparison_page.LARGEST):
        monkeypatch.setattr(comparison_page, "LARGEST", most)
        assert main(["compare", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
        sizes[most] = (tmp_path / "page.html").stat().st_size
    assert sizes[10**9] > 1_500_000 >= sizes[1_500_000]
