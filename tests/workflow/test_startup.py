"""What every start of the workflow costs: no heavy import, and no look into the folder of images."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from support.checkout import link_workflow
from support.tiny import write_images, write_listing

HEAVY = ("torch", "torchvision", "faiss", "transformers", "zarr", "scipy", "matplotlib", "sklearn")

DRY_RUN = """
import json, os, sys

root, found = os.path.abspath("images"), []

def hook(event, arguments):
    if event in ("os.scandir", "os.listdir", "open") and isinstance(arguments[0], str):
        if os.path.abspath(arguments[0]).startswith(root):
            found.append(arguments[0])

sys.path.remove("")  # as for the command `snakemake`: Python looks for packages in all folders that lie there
sys.addaudithook(hook)
from snakemake.cli import main

try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
print(json.dumps({"looked": found, "imported": sorted({name.split(".")[0] for name in sys.modules})}))
"""


def dry_run(folder: Path, *targets: str) -> tuple[dict, str]:
    """Return what a dry run in a folder looked at and imported, and what it printed."""
    line = [sys.executable, "-c", DRY_RUN, "-n", "--configfile", "mine.yaml", "--", *targets]
    result = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stdout + result.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a configuration for own images, which are not listed yet."""
    link_workflow(tmp_path)
    write_images(tmp_path / "images", 4)
    encoder = {"family": "dinov2", "weights": "resources/demo/encoder", "input_size": 32}
    keys = {"gpus": 0, "encoders": {"dinov2": encoder}, "data": {"root": "images"}, "image": {"size": 32}}
    keys |= {
        "gmm": {"n_components": 2},
        "sample": {"n_images": 8, "time_points": 3},
        "train": {"model": "tiny", "epochs": 1},
    }
    keys |= {"decoder": {"weights": "train", "horizon": 4, "steps": 4}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(keys))
    return tmp_path


def test_a_start_imports_nothing_heavy_and_leaves_listed_images_alone(checkout):
    write_listing(checkout / "results" / "list_images" / "listing.train.safetensors", checkout / "images")
    (checkout / "results" / "list_images" / "listing.heldout.safetensors").touch()
    found, said = dry_run(checkout, "results/fid/dinov2_mode.txt")
    assert not set(HEAVY) & set(found["imported"]), "every start of the workflow would pay for these"
    assert found["looked"] == []
    assert "train_decoder" in said


def test_the_hook_sees_a_look(checkout):
    """Images that are not listed yet are counted, for at most a second; that is seen."""
    found, _ = dry_run(checkout, "results/fid/dinov2_mode.txt")
    assert found["looked"]
