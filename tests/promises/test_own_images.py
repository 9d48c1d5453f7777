"""docs/your-own-data.md, followed word by word on a folder as people have them: from pictures to a comparison."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from support.checkout import link_workflow
from support.places import ROOT

COMMANDS = re.findall(r"```console\n(.*?)\n```", (ROOT / "docs" / "your-own-data.md").read_text(), re.DOTALL)


def write_pictures(folder):
    """Write 64 colour pictures of several sizes and formats into nested folders with odd names, and others."""
    generator = np.random.default_rng(0)
    for i in range(64):
        height, width = (48, 40, 96, 64)[i % 4], (64, 40, 70, 50)[i % 4]
        row, column = np.mgrid[0:height, 0:width] / 48
        colour = generator.uniform(0, 1, 3)
        disc = (row - 0.5) ** 2 + (column - 0.5) ** 2 < 0.1 + 0.1 * (i % 2)
        pixels = np.where(disc[..., None], colour, 1 - colour * row[..., None] / 2)
        path = folder / ("été 夏" if i % 2 else "winter days/deep") / f"picture {i:02d}.{('png', 'jpg')[i // 2 % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8)).save(path)
    (folder / "winter days" / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    (folder / "winter days" / "moving.gif").write_bytes(b"GIF89a")
    (folder / "été 夏" / ".hidden.png").write_bytes(b"")
    (folder / "été 夏" / "notes.txt").write_text("not a picture")


def settings_in(table):
    """Return the settings in the order in which a comparison first names them."""
    return list(dict.fromkeys(re.findall(r"\b(uncond|gmm|mode)\b", table.replace("_", " "))))


@pytest.mark.slow
def test_from_a_folder_to_a_comparison(tmp_path):
    write_pictures(link_workflow(tmp_path) / "pictures")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": "/nowhere"}

    def follow(command):
        name, *rest = command.split()
        module = {"mmfm": "mmfm.cli", "snakemake": "snakemake"}[name]
        done = subprocess.run(
            [sys.executable, "-m", module, *rest], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        return done.stdout + done.stderr

    look, run, compare, again = COMMANDS
    said = follow(look)
    assert "65 images in 2 classes" in said and "broken.jpg" in said and ".gif" in said and run in said
    assert (tmp_path / "mine.png").exists()

    # A budget that makes no good pictures, in seconds.
    mine = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    mine["train"] |= {"epochs": 1, "constant_epochs": 0, "decay_end_epoch": 1}
    mine["decoder"] |= {"steps": 4, "horizon": 4}
    mine["sample"] |= {"n_images": 120, "time_points": 3}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    follow(run)
    table = (tmp_path / "results" / "pictures" / "comparison.txt").read_text()
    assert settings_in(table) == ["uncond", "gmm", "mode"]
    assert "not an FID" in table and "the generator's own encoder" in table
    with Image.open(tmp_path / "results" / "pictures" / "comparison.png") as picture:
        assert picture.width > 3 * 256
    assert settings_in(follow(compare)) == ["uncond", "gmm", "mode"]

    added = next((tmp_path / "pictures").rglob("*.png"))
    added.with_stem("one more").write_bytes(added.read_bytes())
    said = follow(f"{again} -n")
    assert "list_images" in said
