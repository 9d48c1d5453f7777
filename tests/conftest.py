"""Fixtures: a tiny encoder, a few dozen images, and the files of every stage made from them.

They depend on nothing downloaded and are the same in every session. Costly ones are made once; copy what you change.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import settings as hypothesis_settings

import mmfm.infra.torchvision_ops  # noqa: F401  (before transformers is imported)
from mmfm import data
from mmfm.infra import store
from support.tiny import CHANNELS, GRID, MODES, SECTIONS, SIZE, Pipeline, write_encoder, write_images, write_listing

# The same examples in every run.
hypothesis_settings.register_profile("mmfm", derandomize=True, deadline=None)
hypothesis_settings.load_profile("mmfm")


@pytest.fixture(scope="session", autouse=True)
def latent_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the session's latent caches, which the small settings name."""
    folder = tmp_path_factory.mktemp("latents")
    SECTIONS["latents"].update(cache="auto", folder=str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random encoder whose latents are (32, 4, 4)."""
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageFolder of 40 images, 32x32, in two classes."""
    return write_images(tmp_path_factory.mktemp("images"), 40)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, tiny_images: Path) -> Pipeline:
    """Statistics, mixtures of 4 modes and a random decoder for the tiny images, written as docs/stages.md lays down."""
    from mmfm.autoencoder.decoder import Decoder, DecoderConfig, save_decoder
    from mmfm.autoencoder.encoders import load_encoder

    root = tmp_path_factory.mktemp("pipeline")
    listing_path = write_listing(root / "listing.train.safetensors", tiny_images)
    listing = data.Listing.open(listing_path)
    images = next(data.image_batches(listing_path, SIZE, [range(len(listing))]))[1]
    latents, tokens = load_encoder("dinov2", tiny_encoder, SIZE)(data.to_float(images, torch.device("cpu")))
    made_from = {"listing_digest": listing.digest, "encoder_digest": store.folder_digest(tiny_encoder)}

    mean, var = latents.mean(0), latents.var(0, correction=0)
    torch.save({"mean": mean, "var": var}, root / "stats.pt")
    stats_digest = store.file_digest(root / "stats.pt")
    store.write_json(root / "stats.json", {"digest": stats_digest, **made_from})

    labels = torch.arange(len(listing)) % MODES
    weights = np.full(MODES, 1 / MODES)
    means = torch.stack([tokens[labels == k].mean(0) for k in range(MODES)]).double().numpy()
    variances = np.broadcast_to(tokens.var(0).double().numpy(), means.shape)
    gmm = {"weights": weights, "means": means, "variances": variances}
    metadata = {"covariance_type": "diag", "listing_digest": listing.digest}
    gmm_digest = store.write_arrays(root / "gmm.safetensors", gmm, metadata)

    normalised = (latents - mean) / (var + 1e-5).sqrt()
    spatial = {
        "means": torch.stack([normalised[labels == k].mean(0) for k in range(MODES)]).numpy(),
        "variances": np.array([normalised[labels == k].var(correction=0).item() for k in range(MODES)]),
        "weights": weights,
        "counts": np.bincount(labels.numpy(), minlength=MODES),
    }
    group = zarr.open_group(root / "spatial_gmm.zarr", mode="w")
    for name, array in spatial.items():
        chunks = (1, *array.shape[1:]) if name == "means" else array.shape
        group.create_array(name, data=array, chunks=chunks, compressors=None)
    group.attrs.update(
        {"digest": store.array_digest(*spatial.values()), "gmm_digest": gmm_digest, "stats_digest": stats_digest}
        | made_from
    )
    sizes = DecoderConfig(CHANNELS, 32, 64, 2, 1, SIZE // GRID, GRID * GRID)
    save_decoder(Decoder(sizes, generator=torch.Generator().manual_seed(0)), root / "decoder.safetensors")
    return Pipeline(
        root, listing_path, tiny_encoder, root / "stats.pt", root / "gmm.safetensors", root / "spatial_gmm.zarr",
        root / "decoder.safetensors", len(listing),
    )  # fmt: skip


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> dict:
    """Every stage's command with the results of an undisturbed run, each stage on those of the stages before it."""
    from support import stage_commands

    return stage_commands.make(tmp_path_factory.mktemp("stages"), tiny_encoder)
