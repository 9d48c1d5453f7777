"""Disk space: refused before the start, a clear end when it runs out, and a state that goes on; `mmfm clean`."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import zarr

from mmfm import config
from mmfm.autoencoder.decoder import load_decoder
from mmfm.cli.__main__ import main
from mmfm.data.tokens import TokenStore
from mmfm.infra import disk as infra_disk
from mmfm.infra import npz, stage_state, store
from mmfm.models.weights import load_ema
from support.tiny import SECTIONS, Pipeline, settings

SECTIONS_MORE = {"sample": {**SECTIONS["sample"], "n_images": 40, "time_points": 3, "shard_size": 8, "batch_size": 8}}


@pytest.fixture(scope="module")
def files(tiny_pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights and an assignment that go with the tiny pipeline."""
    root = tmp_path_factory.mktemp("more")
    call = [
        "train",
        "--setting",
        "uncond",
        "--settings",
        settings(config.STAGES["train"].sections, train={"epochs": 1}),
    ]
    assert main([*call, "--out-dir", str(root), *tiny_pipeline.train_arguments]) == 0
    labels = (np.arange(tiny_pipeline.n_images) % 4).astype(np.int32)
    gmm = store.map_arrays(tiny_pipeline.gmm)[1]
    about = {"gmm_digest": gmm["digest"], "listing_digest": gmm["listing_digest"]}
    store.write_arrays(root / "assignment.safetensors", {"labels": labels, "counts": np.bincount(labels)}, about)
    return {"ema": root / "ema.safetensors", "assignment": root / "assignment.safetensors"}


def command(stage: str, out: Path, p: Pipeline, more: dict[str, Path]) -> list[str]:
    """Return the command that runs a stage on the tiny pipeline with its outputs in ``out``."""
    values = {name: {**SECTIONS, **SECTIONS_MORE}[name] for name in config.STAGES[stage].sections}
    if stage == "train":
        values["train"] = {**values["train"], "checkpoint_every": 1}
    encoder = ["--encoder-weights", p.encoder]
    arguments = {
        "extract": ["--listing", p.listing, *encoder, "--out-tokens", out / "t.zarr", "--out-moments", out / "m"],
        "spatial_gmm": ["--listing", p.listing, *encoder, "--stats", p.stats, "--gmm", p.gmm, "--assignment",
                        more["assignment"], "--out", out / "s.zarr"],
        "train_decoder": ["--listing", p.listing, *encoder, "--out-dir", out],
        "train": ["--setting", "mode", "--out-dir", out, *p.train_arguments],
        "sample": ["--ema", more["ema"], "--decoder", p.decoder, "--stats", p.stats, *encoder, "--out-dir", out],
    }  # fmt: skip
    return [stage, "--settings", json.dumps(values), *map(str, arguments[stage])]


def result(stage: str, out: Path) -> object:
    """Return what identifies a stage's result."""
    if stage == "extract":
        return TokenStore.open(out / "t.zarr").digest
    if stage == "spatial_gmm":
        return zarr.open_group(out / "s.zarr", mode="r").attrs["digest"]
    if stage == "sample":
        return store.array_digest(npz.map_array(out / "images.npz"))
    if stage == "train":
        return load_ema(out / "ema.safetensors")[1]["digest"]
    tensors = load_decoder(out / "decoder.safetensors").state_dict()  # the file says how long it took, too
    return store.array_digest(*(tensors[name].numpy() for name in sorted(tensors)))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 32 MB, and a function that leaves so many KB of it free."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting is not permitted here")

    def leave(kilobytes: int) -> None:
        (disk / "ballast").write_bytes(bytes(infra_disk.free(disk) - 1024 * kilobytes))

    try:
        yield disk, leave
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize(
    ("stage", "kilobytes", "units"),
    [
        ("extract", 80, "shard-*"),
        ("spatial_gmm", 56, "component-*"),
        ("train_decoder", 400, "step-*"),
        ("train", 2400, "step-*"),
        ("sample", 80, "shard-*"),
    ],
)
def test_a_full_disk_ends_with_one_line_and_goes_on(
    stage, kilobytes, units, small_disk, tiny_pipeline, files, tmp_path, capfd, monkeypatch
):
    disk, leave = small_disk
    leave(kilobytes)
    monkeypatch.setattr(infra_disk, "require", lambda *_: None)  # as if others had filled the disk after the start
    assert main(command(stage, disk / "out", tiny_pipeline, files)) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith(f"{stage}: error: the disk is full"), errors
    (state,) = (disk / "out").glob("state-*")
    stage_state.unlock(state)  # as the end of its process does
    assert list(state.glob(units)), sorted(path.name for path in state.iterdir())
    (disk / "ballast").unlink()
    assert main(command(stage, disk / "out", tiny_pipeline, files)) == 0
    assert "resuming" in capfd.readouterr().err
    undisturbed = tmp_path / "undisturbed"
    assert main(command(stage, undisturbed, tiny_pipeline, files)) == 0
    assert result(stage, disk / "out") == result(stage, undisturbed)


@pytest.mark.parametrize("stage", ["extract", "spatial_gmm", "train_decoder", "train", "sample"])
def test_a_stage_asks_for_space_before_it_starts(stage, tiny_pipeline, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(infra_disk, "free", lambda path: 1000)
    assert main(command(stage, tmp_path, tiny_pipeline, files)) == 2
    message = capsys.readouterr().err
    assert f"{stage} still has about" in message and "GB are free" in message and message.count("\n") == 1


def test_checkpoints_that_stay_are_no_room_for_new_ones(tiny_pipeline, tmp_path, capsys, monkeypatch):
    def train(epochs: int) -> int:
        values = settings(config.STAGES["train"].sections, train={"epochs": epochs, "milestones": [1, 2, 5]})
        line = ["train", "--setting", "uncond", "--settings", values, "--out-dir", str(tmp_path)]
        return main([*line, *tiny_pipeline.train_arguments])

    assert train(3) == 0
    one = infra_disk.used(next(tmp_path.glob("state-*/step-00000015")))
    # To come: milestones of epochs 5 and 6, one being written before one of the two others goes, and the weights.
    needed = 3 * one + one // 4
    monkeypatch.setattr(infra_disk, "free", lambda path: int(0.9 * needed))
    assert train(6) == 2
    assert "train still has about" in capsys.readouterr().err
    monkeypatch.setattr(infra_disk, "free", lambda path: int(1.1 * needed))
    assert train(6) == 0
