"""The command ``fid`` on the demo's images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfm.cli.__main__ import main
from mmfm.data.fashion_mnist import pad_to_rgb, read_idx
from mmfm.data.moments import CovarianceMoments
from mmfm.evaluation.detector import load_detector
from mmfm.infra import npz, store
from support.places import DEMO, DETECTOR

SETTINGS = {"fid": {"detector": "fashion", "weights": "unused", "reference": "train", "batch_size": 32, "workers": 0}}


def write_reference(path: Path, images: np.ndarray, *, bank: bool = False, **changes: object) -> Path:
    detector = load_detector("fashion", DETECTOR)
    features = detector.features(torch.from_numpy(images).permute(0, 3, 1, 2))
    moments = CovarianceMoments.zeros(64).update(features)
    about = {
        "detector": detector.name, "detector_digest": detector.digest, "source": "the 300 training images",
        "n_images": 300, "image_size": 32, "floor": 0.25, "floor_n_images": 70, "listing_digest": "0", "version": 1,
    }  # fmt: skip
    arrays = {"mu": moments.mean.numpy(), "sigma": moments.covariance().numpy()}
    arrays |= {"bank": features.numpy()} if bank else {}
    store.write_arrays(path, arrays, {**about, **changes})
    return path


def write_samples(folder: Path, images: np.ndarray, **changes: object) -> Path:
    """Write images and a description as the stage sample does."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = npz.write_parts(folder / "images.npz", images.shape, np.uint8, [images])
    weights = {"digest": "ab" * 32, "step": 620, "epochs": 10.0, "seed": 3, "images_seen": 79360, "model": {}}
    about = {
        "images_digest": digest, "n_images": len(images), "image_size": images.shape[1], "seed": 5, "setting": "mode",
        "encoder": {"family": "dinov2", "weights": "resources/demo/encoder", "input_size": 32}, "n_modes": 64,
        "mode_draw": "k ~ mixture weights", "source_only": False, "solver": "euler", "time_points": 25,
        "first_time": 1.0, "last_time": 0.0069, "function_evaluations": 24, "seconds": 9.25, "precision": "float32",
        "device": "cpu", "weights": weights, "guidance": None,
    }  # fmt: skip
    store.write_json(folder / "samples.json", {**about, **changes})
    return folder


@pytest.fixture(scope="module")
def garments() -> np.ndarray:
    """uint8 (600, 32, 32, 3)."""
    images = pad_to_rgb(read_idx(DEMO / "fashion-mnist" / "t10k-images-idx3-ubyte.gz")[:600])
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


@pytest.fixture(scope="module")
def reference(garments: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reference(tmp_path_factory.mktemp("reference") / "reference.safetensors", garments[:300])


def arguments(samples: Path, reference: Path, out: Path, **keys: object) -> list[str]:
    """Return the command line; ``keys`` are those of the section ``fid``."""
    settings = json.dumps({"fid": {**SETTINGS["fid"], **keys}})
    return [
        "fid", "--settings", settings, "--images", str(samples / "images.npz"), "--samples",
        str(samples / "samples.json"), "--reference", str(reference), "--detector-weights", str(DETECTOR), "--out-txt",
        str(out / "fid.txt"), "--out-json", str(out / "fid.json"),
    ]  # fmt: skip


def run(samples: Path, reference: Path, out: Path, **keys: object) -> tuple[str, dict]:
    assert main(arguments(samples, reference, out, **keys)) == 0
    return (out / "fid.txt").read_text(), store.read_json(out / "fid.json")
