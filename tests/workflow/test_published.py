"""From a folder like the published one to a Frechet distance, without images, encoder or network."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from support import published_folder as tiny
from support.checkout import link_workflow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with the workflow, and a folder of published files beside it."""
    folder = tmp_path_factory.mktemp("published")
    link_workflow(folder)
    made = tiny.write(folder / "files")
    values = tiny.keys("files")
    values["fid"]["reference"] = "published"
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return folder, made


def snakemake(folder, *arguments, **environment):
    """Run Snakemake there with config/published.yaml and the tiny values."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]
    command += ["--configfile", "config/published.yaml", "tiny.yaml"]
    said = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    )
    return said.returncode, said.stdout + said.stderr


@pytest.mark.slow
def test_published_files_give_a_distance(checkout):
    folder, _ = checkout
    targets = [f"results/published/fid/dinov2_{name}.txt" for name in ("mode", "mode_ag", "gmm.step25000")]
    code, said = snakemake(folder, *targets)
    assert code == 0, said
    result = json.loads((folder / "results/published/fid/dinov2_mode.json").read_text())
    assert result["frechet_distance"] > 0 and result["samples"]["weights"]["step"] == 100_000
    early = json.loads((folder / "results/published/fid/dinov2_gmm.step25000.json").read_text())
    assert early["samples"]["weights"]["step"] == 25_000 and early["samples"]["setting"] == "gmm"
    assert not (folder / "results/published/list_images").exists() and not (folder / "published").exists()
    assert "encoder.extra" in (folder / "results/published/logs/import_decoder.dinov2.log").read_text()
    code, said = snakemake(folder, *targets)
    assert code == 0 and "Nothing to be done" in said
    # Another seed of the same weights: sampled anew, not imported anew.
    code, said = snakemake(folder, "results/published/fid/dinov2_mode.seed1.txt", "-n")
    assert "import_weights" not in said and "sample" in said


def test_what_is_not_published_is_one_line_that_names_the_other_preset(checkout):
    folder, _ = checkout
    for target, said in {
        "dinov2_uncond.txt": "no checkpoint of the setting 'uncond' is published",
        "siglip2_mode.step100000.txt": "no checkpoint of siglip2 at step 100,000 is published, only at 25,000",
        "mae_gmm_ag.txt": "no guide of mae in the setting 'gmm' is published",
        "dinov2_mode.k512.txt": "the number of modes '512' is not that of the given weights, 6",
        "dinov2_mode.S.txt": "the model 'S' is not that of the given weights, XL",
    }.items():
        code, output = snakemake(folder, f"results/published/fid/{target}", "-n")
        lines = [line for line in output.splitlines() if said in line]
        assert code and len(lines) == 1 and "imagenet256.yaml" in lines[0], output


def test_a_file_that_the_folder_lacks_is_named(checkout):
    folder, _ = checkout
    code, output = snakemake(folder, "results/published/fid/siglip2_mode.txt", "-n")
    assert code and "'published.root' is 'files/checkpoints/siglip2-b/mode-gmm-25k.pt', which does not exist" in output


def test_without_a_folder_of_ones_own_only_what_a_target_needs_is_fetched(checkout):
    folder, _ = checkout
    code, output = snakemake(folder, "results/published/fid/dinov2_mode.txt", "-n", "--config", "published={root: ''}")
    fetched = sorted(line.split()[1] for line in output.splitlines() if line.strip().startswith("output: published/"))
    assert code == 0, output
    assert fetched == [
        "published/checkpoints/dinov2-b/mode-gmm-100k.pt",
        "published/decoders/dinov2-b/ViTXL_n08/model.pt",
        "published/fid_reference/VIRTUAL_imagenet256_labeled.npz",
        "published/gmm/dinov2-b/gmm_n8192_diag_k-means++.pkl",
        "published/gmm/dinov2-b/spatial_gmm_from_cls_n8192_diag_k-means++_flip.pkl",
        "published/normalization_stats/dinov2-b/stat.pt",
    ]
