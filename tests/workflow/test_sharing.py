"""Jobs side by side: every stage gets the threads of its rule, independent ones run at once, none shares a GPU.

The stages are replaced where they would begin: a ``sitecustomize`` in their Python process writes down what it finds in
its environment, makes the outputs, and ends. Snakemake, its rules and the launcher are real.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from mmfm import config
from mmfm.infra import cores
from support.checkout import link_workflow

STAGE = """
import json, os, sys, time
from pathlib import Path

words = sys.orig_argv
if "mmfm.cli" in words:
    stage, record = words[words.index("mmfm.cli") + 1], Path(os.environ["RECORD"])
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    found = {name: os.environ.get(name) for name in names}
    pair = {"extract": "fid_reference", "fid_reference": "extract"}.get(stage)
    (record / f"{stage}.started").touch()
    end = time.monotonic() + 60
    while pair and not (record / f"{pair}.started").exists() and time.monotonic() < end:
        time.sleep(0.05)
    found["met"] = pair is None or (record / f"{pair}.started").exists()
    for path in map(Path, json.loads((record / "outputs.json").read_text())[stage]):
        path.mkdir(parents=True) if path.suffix in ("", ".zarr") else path.touch()
    (record / f"{stage}.json").write_text(json.dumps(found))
    os._exit(0)
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Threads and outputs of every rule as a dry run tells them, and what every stage found when it was run."""
    folder = tmp_path_factory.mktemp("shared")
    link_workflow(folder)
    (folder / "overlay.yaml").write_text(yaml.safe_dump({"gpus": 1, "decoder": {"weights": "train"}}))
    for name in ("record", "hook"):
        (folder / name).mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(STAGE)
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "7,3", "TMPDIR": str(folder), "RECORD": str(folder / "record")}
    variables["PYTHONPATH"] = f"{folder / 'hook'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    line = [sys.executable, "-m", "snakemake", "results/fid/dinov2_mode.txt", "--cores", "8"]
    line += ["--configfile", "overlay.yaml"]

    def call(*more):
        done = subprocess.run([*line, *more], cwd=folder, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    record = folder / "results" / "configuration.json"
    planned = call("-n")
    assert not record.exists()
    blocks = re.findall(r"rule (\w+):\n((?:    .+\n)+)", planned)
    outputs = {rule: re.search(r"    output: (.+)", text)[1].split(", ") for rule, text in blocks}
    threads = {rule: int((re.search(r"    threads: (\d+)", text) or [0, 1])[1]) for rule, text in blocks}
    (folder / "record" / "outputs.json").write_text(json.dumps(outputs))
    call()
    recorded = json.loads(record.read_text())
    assert config.build(config.Config, recorded["configuration"]).decoder.weights == "train"
    assert {"cls_tokens", "gmm", "spatial_gmm", "decoder", "train", "sample", "fid_reference"} <= set(
        recorded["folders"]
    )
    record.unlink()
    assert "Nothing to be done" in call() and record.exists()
    found = {path.stem: json.loads(path.read_text()) for path in (folder / "record").glob("*.json")}
    return threads, {stage: values for stage, values in found.items() if stage != "outputs"}


def test_every_stage_gets_the_threads_of_its_rule(shared):
    threads, found = shared
    assert len(found) == 11 and threads["latent_stats"] == 1
    # A job with one of two GPUs takes half of the cores, so that two trainings run side by side.
    assert threads["extract"] == threads["train"] == 4
    for stage, values in found.items():
        given = {values[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        assert given == {str(min(threads[stage], cores.given()))}, stage


def test_independent_stages_run_side_by_side(shared):
    assert shared[1]["extract"]["met"] and shared[1]["fid_reference"]["met"]


def test_two_jobs_at_once_have_different_gpus(shared):
    gpus = [shared[1][stage]["CUDA_VISIBLE_DEVICES"] for stage in ("extract", "fid_reference")]
    assert sorted(gpus) == ["3", "7"]
    assert shared[1]["train"]["CUDA_VISIBLE_DEVICES"] in ("3", "7")
