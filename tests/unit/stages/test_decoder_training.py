"""Training the decoder: it learns, resumes, and says where it came from."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from mmfm.autoencoder.decoder import PROVENANCE_KEY, load_decoder
from mmfm.cli import train_decoder as command
from mmfm.config import STAGES
from mmfm.data import Listing
from mmfm.infra import store
from mmfm.stages.train_decoder import Reconstruction
from mmfm.training import trainer
from mmfm.training.latents import Inputs, MicroBatch
from support.tiny import CHANNELS, GRID, SIZE, Pipeline, settings


def run(files: Pipeline, out: Path, *options: str, sections: dict | None = None, **decoder) -> Path:
    text = settings(STAGES["train_decoder"].sections, decoder=decoder, **(sections or {}))
    inputs = ["--listing", str(files.listing), "--encoder-weights", str(files.encoder)]
    assert command.main(["--settings", text, *inputs, "--out-dir", str(out), *options]) == 0
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_decoder(out / "decoder.safetensors").state_dict()


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "history.jsonl").read_text().splitlines()]


def assert_equal(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


@pytest.fixture(scope="module")
def undisturbed(tiny_pipeline, tmp_path_factory) -> Path:
    return run(tiny_pipeline, tmp_path_factory.mktemp("decoder"))


def test_outputs_and_provenance(undisturbed, tiny_pipeline):
    sizes = load_decoder(undisturbed / "decoder.safetensors", latent_dim=CHANNELS).config
    assert (sizes.patch_size, sizes.num_patches) == (SIZE // GRID, GRID * GRID)
    with safe_open(undisturbed / "decoder.safetensors", "pt") as file:
        provenance = json.loads(file.metadata()[PROVENANCE_KEY])
    assert provenance["steps"] == 12 and provenance["seed"] == 0 and provenance["loss"] == losses(undisturbed)[-1]
    assert provenance["settings"]["decoder"]["noise"] == 0.8
    assert provenance["digests"] == {
        "listing": Listing.open(tiny_pipeline.listing).digest,
        "encoder": store.folder_digest(tiny_pipeline.encoder),
    }
    # 16 images in two double rows of 8, at 64 pixels and gaps of 2.
    assert Image.open(undisturbed / "reconstruction.png").size == (8 * 66 - 2, 4 * 66 - 2)
    assert (undisturbed / "curve.png").stat().st_size > 1000


def test_the_loss_falls(tiny_pipeline, tmp_path):
    curve = losses(run(tiny_pipeline, tmp_path, steps=200, horizon=400, lr=3e-3, checkpoint_every=200))
    assert len(curve) == 10
    assert curve[-1] < 0.6 * curve[0]


def test_a_stopped_run_goes_on_and_ends_the_same(tiny_pipeline, undisturbed, tmp_path, monkeypatch):
    step = trainer.Trainer._train_step

    def interrupted(self, *inputs):
        step(self, *inputs)
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_pipeline, tmp_path)
    assert not (tmp_path / "decoder.safetensors").exists()
    assert_equal(run(tiny_pipeline, tmp_path), undisturbed)
    assert losses(tmp_path) == losses(undisturbed)


def test_more_steps_continue(tiny_pipeline, undisturbed, tmp_path):
    run(tiny_pipeline, tmp_path, steps=5)
    run(tiny_pipeline, tmp_path)
    assert_equal(tmp_path, undisturbed)


def test_encoding_at_every_step_changes_only_the_rounding(tiny_pipeline, undisturbed, tmp_path):
    run(tiny_pipeline, tmp_path, sections={"latents": {"cache": "off"}})
    assert losses(tmp_path) == pytest.approx(losses(undisturbed), rel=1e-4)


@pytest.mark.parametrize("size", [2, 8])
def test_the_loss_is_a_mean_over_pixels(size):
    """So that neither the size of the images nor the batch moves what a learning rate means."""
    task = Reconstruction(0, 0.0, torch.full((3,), 0.25), torch.full((3,), 0.5))
    shown = torch.zeros(2, 3, size, size)
    decoded = torch.full_like(shown, -0.5)  # 0 without the encoder's normalisation
    decoded[0, :, : size // 2] = 1.0
    decoded[1] = -1.5
    micro = MicroBatch(range(2), torch.arange(2))
    loss = task.losses(lambda _: decoded, micro, Inputs(torch.zeros(2, 4, 1, 1), torch.zeros(2, 4), shown))
    assert loss.tolist() == [0.375, 0.5]


def test_noise_is_part_of_the_loss(tiny_pipeline, undisturbed, tmp_path):
    run(tiny_pipeline, tmp_path, noise=0.0)
    assert losses(tmp_path) != losses(undisturbed)


def test_an_image_size_that_the_latent_does_not_divide_is_refused(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"image.size 30 is not a multiple of the latent's 4 rows; take 28"):
        run(tiny_pipeline, tmp_path, sections={"image": {"size": 30}})
