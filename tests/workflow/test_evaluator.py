"""The original evaluator as a target: its files are checked, its numbers kept; a stand-in takes its place."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from mmfm.infra import npz, store
from support.checkout import dry_runs, link_workflow
from support.places import ROOT

STAND_IN = """
import os, sys, warnings
import numpy as np

assert __name__ == "__main__" and os.path.exists("beside_the_script"), "it fetches its network into its folder"
reference, samples = (np.load(path) for path in sys.argv[1:])
assert samples.files == ["arr_0"] and samples["arr_0"].dtype == np.uint8 and samples["arr_0"].shape == (5, 8, 8, 3)
assert set(reference.files) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s"}
sys.stderr.write("10it [00:01]\\r20it [00:02]")
warnings.warn("np.bool is deprecated")
print("computing reference batch activations...")
print("Inception Score:", 215.8370361328125)
print("FID:", 3.9425574129223264)
print("sFID:", 6.140433703346162)
print("Precision:", 0.8265)
print("Recall:", 0.5309)
"""
NUMBERS = ["Inception Score: 215.8370361328125", "FID: 3.9425574129223264", "sFID: 6.140433703346162",
           "Precision: 0.8265", "Recall: 0.5309"]  # fmt: skip


def write_reference(path: Path, *without: str, images: np.ndarray | None = None) -> Path:
    moments = {"mu": np.zeros(4), "sigma": np.eye(4), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    images = np.zeros((6, 8, 8, 3), np.uint8) if images is None else images
    np.savez(path, **{name: array for name, array in {**moments, "arr_0": images}.items() if name not in without})
    return path


def write_evaluator(folder: Path, text: str = STAND_IN) -> Path:
    folder.mkdir(parents=True)
    (folder / "evaluator.py").write_text(text)
    (folder / "beside_the_script").touch()
    return folder / "evaluator.py"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Arguments of the script, with images as `sample` writes them."""
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    npz.write_parts(tmp_path / "images.npz", images.shape, np.uint8, [images])
    return {
        "evaluator": write_evaluator(tmp_path / "evaluations"), "reference": write_reference(tmp_path / "ref.npz"),
        "images": tmp_path / "images.npz", "out": tmp_path / "result.txt",
    }  # fmt: skip


def script(files: dict[str, Path], python: str = sys.executable) -> tuple[int, str]:
    words = [str(word) for name, path in files.items() for word in (f"--{name}", path)]
    line = [python, str(ROOT / "workflow" / "scripts" / "run_evaluator.py"), *words]
    done = subprocess.run(line, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_result_has_the_numbers_and_the_files(files):
    status, said = script(files)
    assert status == 0, said
    lines = files["out"].read_text().splitlines()
    assert lines[:5] == NUMBERS and lines[5] == ""
    for name, line in zip(("evaluator", "reference", "images"), lines[6:], strict=True):
        assert line.split() == [name, f"{files[name].name},", "sha256", store.file_digest(files[name])]
    assert "computing reference batch" in said and not list(files["out"].parent.glob(".*"))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("reference", lambda p: write_reference(p, "arr_0"), "has no images (arr_0)"),
        ("reference", lambda p: write_reference(p, "mu_s", "sigma_s"), "has mu, sigma, but lacks mu_s, sigma_s"),
        ("reference", lambda p: write_reference(p, images=np.zeros((6, 8, 8, 3))), "images are uint8 (n, S, S, 3)"),
        ("images", lambda p: p.write_bytes(p.read_bytes()[:100]), "is truncated or not an .npz file"),
        ("images", lambda p: np.savez(p, np.zeros((5, 8, 8), np.uint8)), "has arr_0 (5, 8, 8) |u1"),
        ("images", lambda p: p.unlink(), "No such file"),
        (
            "evaluator",
            lambda p: p.write_text("print('FID: 3.5')"),
            "printed no Inception Score, sFID, Precision, Recall",
        ),
    ],
)
def test_what_the_evaluator_would_stumble_over(files, name, spoil, message):
    spoil(files[name])
    status, said = script(files)
    assert status == 2 and message in said and said.splitlines()[-1].startswith("adm_evaluator: error: ")
    assert not files["out"].exists()


def test_moments_are_not_required(files):
    """Without any, the evaluator computes them from the images."""
    write_reference(files["reference"], "mu", "sigma", "mu_s", "sigma_s")
    files["evaluator"].write_text(STAND_IN.replace('"arr_0", "mu", "sigma", "mu_s", "sigma_s"', '"arr_0"'))
    assert script(files)[0] == 0


def test_a_python_without_tensorflow_says_how_to_get_one(files):
    files["evaluator"].write_text("import tensorflow_of_another_environment")
    status, said = script(files)
    assert status == 2 and "has no TensorFlow; make the environment envs/tf-evaluator.yaml" in said


def snakemake(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    line = [sys.executable, "-m", "snakemake", "--cores", "1", *arguments, "--configfile", "overlay.yaml"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment})
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the workflow, an evaluator, and the images of a result."""
    link_workflow(tmp_path)
    images = np.zeros((5, 8, 8, 3), np.uint8)
    npz.write_parts(
        tmp_path / "results/sample/dinov2_mode/seed0.tiny.k256.t25/images.npz", images.shape, np.uint8, [images]
    )
    write_reference(tmp_path / "given.npz")
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump({"gpus": 0, "fid": {"reference": "given.npz"}}))
    return tmp_path


@pytest.mark.parametrize("name", ["dinov2_mode", "dinov2_mode.seed0.t25"])
def test_the_target_runs_the_evaluator(checkout, name):
    write_evaluator(checkout / "published" / "guided-diffusion" / "evaluations")
    target = f"results/fid/{name}.adm.txt"
    status, said = snakemake(checkout, target, "--allowed-rules", "adm_evaluator", EVALUATOR_PYTHON=sys.executable)
    assert status == 0, said
    assert (checkout / target).read_text().splitlines()[:5] == NUMBERS
    assert NUMBERS[1] in (checkout / "results" / "logs" / f"adm_evaluator.{name}.log").read_text()


def test_what_is_missing_is_said_before_anything_runs(checkout):
    target = "results/fid/dinov2_mode.adm.txt"
    status, said = snakemake(checkout, "-n", target)
    assert status != 0 and "git clone https://github.com/openai/guided-diffusion published/guided-diffusion" in said
    write_evaluator(checkout / "published" / "guided-diffusion" / "evaluations")
    (checkout / "overlay.yaml").write_text(yaml.safe_dump({"gpus": 0}))
    status, said = snakemake(checkout, "-n", target)
    assert status != 0 and "set 'fid.detector' to inception and add sfid" in said
    (checkout / "weights.pth").touch()
    fid = {"detector": "inception", "weights": "weights.pth", "metrics": ["frechet", "sfid"]}
    (checkout / "overlay.yaml").write_text(yaml.safe_dump({"gpus": 0, "fid": fid}))
    status, said = snakemake(checkout, "-n", target)
    assert status == 0 and "rule adm_reference:" in said and "rule adm_evaluator:" in said and "rule fid:" not in said
    (checkout / "overlay.yaml").write_text(yaml.safe_dump({"gpus": 0, "fid": {"reference": "given.npz"}}))
    status, said = snakemake(checkout, "-n", "results/fid_reference/reference.npz")
    assert status != 0 and "'fid.reference' is 'given.npz', so the reference is a file already" in said


def test_the_training_keeps_the_step_that_is_asked_for(checkout):
    write_evaluator(checkout / "published" / "guided-diffusion" / "evaluations")
    keys = {"fid": {"reference": "given.npz"}, "train": {"milestone_steps": []}}
    call = {"keys": keys, "targets": ["results/fid/dinov2_mode.step60.adm.txt"]}
    (found,) = dry_runs(checkout, [{**call, "operation": True}])
    (words,) = (
        words for output, words in found.items() if output.endswith("ema.safetensors") and ".step" not in output
    )
    assert "train.milestone_steps=[60]" in words


def test_a_mistyped_name_is_explained(checkout):
    status, said = snakemake(checkout, "-n", "results/fid/dinov2_mod.adm.txt")
    assert status != 0 and "no target" in said


def test_the_environment_pins_what_the_evaluator_needs():
    """np.bool, which it uses, is gone from NumPy 1.24 on."""
    listed = yaml.safe_load((ROOT / "envs" / "tf-evaluator.yaml").read_text())["dependencies"][-1]["pip"]
    versions = dict(line.split("==") for line in listed)
    assert set(versions) == {"tensorflow[and-cuda]", "numpy", "scipy", "requests", "tqdm"}
    assert tuple(map(int, versions["numpy"].split(".")[:2])) < (1, 24)
