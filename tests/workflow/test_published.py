"""From a folder like the published one to a Frechet distance, without images, encoder or network."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml

from support import published_folder as tiny
from support.checkout import link_workflow
from support.hub import Hub, serving


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


def test_published_mixtures_with_a_training_of_ones_own(checkout):
    """The default targets are planned: no report of a given mixture is asked for, no history of given weights."""
    folder, _ = checkout
    (folder / "imagenet" / "train").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "snakemake", "-n", "--configfile", "config/imagenet256.yaml", "--config"]
    mixtures = ["gmm={weights: published}", "spatial_gmm={weights: published}"]
    said = subprocess.run([*command, *mixtures], cwd=folder, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "import_spatial" in said.stdout and "fit_gmm" not in said.stdout and "comparison" in said.stdout
    lone = subprocess.run([*command, "guide={weights: published}"], cwd=folder, capture_output=True, text=True)
    assert lone.returncode and "a guide knows its own mixture's modes only" in lone.stdout + lone.stderr
    code, output = snakemake(folder, "results/published/comparison.txt", "-n")
    assert code and "siglip2" in output  # the files of other encoders are not in this folder


def test_images_of_ones_own_with_a_published_decoder(checkout):
    folder, _ = checkout
    (folder / "pictures").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "snakemake", "-n", "results/own-256/comparison.txt"]
    command += ["--configfile", "config/own-256.yaml", "--config"]
    said = subprocess.run([*command, "data={root: pictures}"], cwd=folder, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
    rules = set(re.findall(r"^(?:local)?rule (\w+):", said.stdout, re.MULTILINE))
    assert {"fetch_encoder", "fetch_published", "import_decoder", "given_statistics", "fit_gmm", "train"} <= rules
    assert not {"train_decoder", "latent_stats", "fetch_detector"} & rules
    without = subprocess.run([*command, "data={root: ''}"], cwd=folder, capture_output=True, text=True)
    assert without.returncode and "'data.root' is '', which is not a folder" in without.stdout + without.stderr


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


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["hub", "published"])
@pytest.mark.parametrize("name", ["dinov2_mode_ag", "dinov2_gmm.step25000"])
def test_an_exported_target_makes_the_same_images(checkout, layout, name, tmp_path):
    import mmfm
    from mmfm.cli.__main__ import main
    from mmfm.models.weights import weights_metadata

    folder, _ = checkout
    target, out = folder / f"results/published/fid/{name}.txt", tmp_path / "exported"
    code, said = snakemake(folder, str(target.relative_to(folder)))
    assert code == 0, said
    assert main(["export", str(target), "--out", str(out), "--layout", layout, "--licence", "mit"]) == 0
    own, other = mmfm.open(target, "cpu"), mmfm.open(out, "cpu")
    assert np.array_equal(own.generate(4, progress=False).tensor, other.generate(4, progress=False).tensor)
    assert np.array_equal(own.mixture.means, other.mixture.means)
    weights = out / ("ema.safetensors" if layout == "hub" else "imported/ema.safetensors")
    place = {"dinov2_mode_ag": "dinov2_mode/given", "dinov2_gmm.step25000": "dinov2_gmm/given.step25000"}[name]
    first = folder / "results/published/train" / place / "ema.safetensors"
    assert weights_metadata(weights)["digest"] == weights_metadata(first)["digest"]
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and "grid.png" in card and (out / "grid.png").is_file()
    result = json.loads(target.with_suffix(".json").read_text())
    assert f"{result['frechet_distance']:.4f}" in card
    assert main(["export", str(target), "--out", str(out)]) == 2  # it exists


def test_pickles_of_an_export_are_those_of_scikit_learn(tmp_path):
    """The published code unpickles them and asks for these attributes."""
    import pickle

    import torch

    from mmfm.mixture.gaussian import Mixture
    from mmfm.mixture.spatial import SpatialMixture
    from mmfm.published.mixtures import import_mixture, import_spatial
    from mmfm.workflow.exporting import _pickle_spatial

    fitted, spatial = tiny.mixtures()
    torch.save({"mean": None, "var": torch.ones(tiny.CHANNELS, tiny.GRID, tiny.GRID)}, tmp_path / "stats.pt")
    (tmp_path / "gmm.pkl").write_bytes(pickle.dumps(fitted))
    (tmp_path / "spatial.pkl").write_bytes(pickle.dumps(spatial))
    import_mixture(tmp_path / "gmm.pkl", tmp_path / "gmm.safetensors", tmp_path / "stats.pt", tiny.MODES)
    import_spatial(tmp_path / "spatial.pkl", tmp_path / "s.zarr", tmp_path / "stats.pt", tmp_path / "gmm.safetensors")
    _pickle_spatial(SpatialMixture.open(tmp_path / "s.zarr"), {}, tmp_path / "out.pkl")
    found = pickle.loads((tmp_path / "out.pkl").read_bytes())
    assert type(found["model"]) is type(fitted) and found["model"].means_.shape == (tiny.MODES, 256)
    assert np.allclose(found["model"].means_, spatial["model"].means_, atol=1e-7)
    assert found["cluster_counts"].tolist() == spatial["cluster_counts"].tolist()
    own = Mixture.load(tmp_path / "gmm.safetensors").to_sklearn()
    tokens = np.random.default_rng(0).normal(size=(5, tiny.CHANNELS))
    assert np.allclose(own.predict_proba(tokens), fitted.predict_proba(tokens))
    assert not (tmp_path / "out.means").exists()


@pytest.mark.slow
def test_files_are_fetched_over_broken_connections_and_give_the_same_distance(checkout):
    """By Snakemake, from a stand-in for the hub; the size is said before, and a second run fetches nothing."""
    folder, _ = checkout
    root = folder / "files"
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    target = "results/fetched/fid/dinov2_gmm.txt"
    keys = yaml.safe_load((folder / "tiny.yaml").read_text())
    (folder / "hub.yaml").write_text(yaml.safe_dump({**keys, "run": "fetched", "published": {"root": ""}}))

    def run(hub: Hub) -> str:
        command = [sys.executable, "-m", "snakemake", "--cores", "2", target]
        command += ["--configfile", "config/published.yaml", "hub.yaml"]
        said = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, env={**os.environ, "HF_ENDPOINT": hub.address}
        )
        assert said.returncode == 0, said.stdout + said.stderr
        return said.stdout + said.stderr

    with serving(Hub(files=files, drop_after=20_000)) as hub:
        said = run(hub)
        total = sum(len(files[name]) for name in files if (folder / "published" / name).is_file())
        assert said.index(f"fetch: 6 files, {total / 1e9:.2f} GB, of luo00042/mm-fm at commit") < said.index(
            "localrule"
        )
        before = len(hub.requests)
        run(hub)
        assert len(hub.requests) == before
    one, other = (folder / f"results/{run}/fid/dinov2_gmm.json" for run in ("fetched", "published"))
    code, output = snakemake(folder, "results/published/fid/dinov2_gmm.txt")
    assert code == 0, output
    distances = [json.loads(path.read_text())["frechet_distance"] for path in (one, other)]
    assert distances[0] == distances[1]
