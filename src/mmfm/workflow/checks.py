"""What the configured files say about themselves, asked before anything runs.

A dry run fails at once, in one line, instead of a job after hours. Nothing here imports PyTorch.
"""

import contextlib
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmfm.config import Config, Encoder
from mmfm.config.choices import DETECTORS, ENCODER_FAMILIES
from mmfm.infra import model_folder, store

PROCESSOR = "preprocessor_config.json"


def images(root: str) -> None:
    """Raise ValueError unless ``data.root`` is a folder."""
    if not root or not Path(root).is_dir():
        raise ValueError(
            f"'data.root' is '{root}', which is not a folder; set it to a folder of images, best with one folder per "
            "class"
        )


def heldout_images(root: str) -> None:
    """Raise ValueError unless ``data.heldout_root`` is empty or a folder."""
    if root and not Path(root).is_dir():
        raise ValueError(
            f"'data.heldout_root' is '{root}', which is not a folder; set it to a folder of images like 'data.root', "
            "or leave it empty"
        )


def encoder(name: str, about: Encoder) -> None:
    """Check an encoder's local folder against its entry in the configuration.

    Raises:
        ValueError: another family, a model without square patches, an input size that is not a multiple of the patch
            size, or a file that is missing.
    """
    folder, key = Path(about.weights), f"encoders.{name}"
    if not folder.is_dir():
        raise ValueError(
            f"'{key}.weights' is '{folder}', but there is no such folder; set it to a folder with config.json, "
            f"{PROCESSOR} and model.safetensors, or to `hf:` and a model id"
        )
    found, family = _read_json(folder / "config.json", f"'{key}.weights' is '{folder}'"), ENCODER_FAMILIES[about.family]
    model = model_folder.describe(found, folder / "model.safetensors")
    _check_family(key, about.family, model)
    patch = model.patch_size(f"'{key}.weights'")
    if patch and about.input_size % patch:
        raise ValueError(
            f"'{key}.input_size' is {about.input_size}, no multiple of the encoder's patch size {patch}; take "
            f"{model_folder.nearest_multiples(about.input_size, patch)}"
        )
    if not family.timm and not (folder / PROCESSOR).is_file():
        numbers = json.dumps({"image_mean": family.image_mean, "image_std": family.image_std})
        raise ValueError(
            f"'{folder}' has no {PROCESSOR}, the encoder's normalisation; fetch it, or write it "
            f"(for the usual {about.family} weights: {numbers})"
        )
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"'{folder}' has no model.safetensors; fetch it, or convert the weights to safetensors")


def _check_family(key: str, name: str, model: model_folder.VisionModel) -> None:
    """Raise ValueError if a model is of another family than its entry says."""
    family, other = ENCODER_FAMILIES[name], model.library == model_folder.TIMM
    if family.model_types:
        fits = not other and model.kind in family.model_types
    else:
        fits = family.timm == other
    if fits:
        return
    owner = next((own for own, f in ENCODER_FAMILIES.items() if model.kind in f.model_types), "timm" if other else "hf")
    raise ValueError(
        f"'{key}.weights' holds a '{model.kind}' model of {model.library}, which is not of the family {name}; set "
        f"'{key}.family' to {owner}"
        + (f", or give weights of {' or '.join(family.model_types)}" if family.model_types else "")
    )


def _latent_shape(about: Encoder) -> tuple[int, int, int] | None:
    """Return the shape (C, H, W) of an encoder's latents by its folder; None if that does not say."""
    if not (Path(about.weights) / "config.json").is_file():
        return None
    found = _read_json(Path(about.weights) / "config.json", about.weights)
    model = model_folder.describe(found, Path(about.weights) / "model.safetensors")
    patch = model.patch_size(f"'{about.weights}'")
    if patch is None or model.width is None:
        return None
    return model.width, about.input_size // patch, about.input_size // patch


def decoder(name: str, config: Config, path: Path) -> None:
    """Check what a decoder's file says of itself against an encoder's local folder and the image size.

    Raises:
        ValueError: it decodes latents of another shape or images of another size, or was trained with another encoder.
    """
    (sizes, trained_with), latent = _decoder_about(path), _latent_shape(config.encoders[name])
    if sizes is None or latent is None:
        return  # the stages that read it say what is wrong
    expected = (latent[0], latent[1] * latent[2], config.image.size)
    actual = (sizes["latent_dim"], sizes["num_patches"], sizes["patch_size"] * int(sizes["num_patches"] ** 0.5))
    if actual != expected:
        raise ValueError(
            f"'decoder.weights' is '{path}', which decodes {actual[1]} tokens of {actual[0]} channels into images of "
            f"{actual[2]} pixels, but the encoder '{name}' gives {expected[1]} tokens of {expected[0]} channels for "
            f"images of {expected[2]} pixels; set 'decoder.weights' to `train`, or to a decoder of this encoder"
        )
    folder = Path(config.encoders[name].weights)
    with contextlib.suppress(FileNotFoundError):  # a missing file of the encoder is another check's
        if trained_with not in ("", store.folder_digest(folder)):
            raise ValueError(
                f"'decoder.weights' is '{path}', which was trained with another encoder than '{name}' in '{folder}'; "
                "set 'decoder.weights' to `train`, or to a decoder of this encoder"
            )


def statistics(name: str, config: Config, path: Path) -> None:
    """Check the shape in a file of latent statistics against an encoder's local folder.

    Raises:
        ValueError: they are statistics of latents of another shape.
    """
    shape, expected = _statistics_shape(path), _latent_shape(config.encoders[name])
    if shape is None or expected is None:
        return  # the stage that reads it says what is wrong
    if shape != expected:
        raise ValueError(
            f"'latent_stats.weights' is '{path}', statistics of latents {shape}, but the encoder '{name}' gives "
            f"{expected}; set 'latent_stats.weights' to `compute`, or to a file for this encoder and input size"
        )


def detector(config: Config) -> None:
    """Check that the detector takes images of the configured size.

    Raises:
        ValueError: it doesn't.
    """
    size = DETECTORS[config.fid.detector].size
    if size and size != config.image.size:
        others = " or ".join(name for name, other in DETECTORS.items() if not other.size)
        raise ValueError(
            f"'fid.detector' {config.fid.detector} takes images of {size} x {size} pixels, but 'image.size' is "
            f"{config.image.size}; set 'fid.detector' to {others}"
        )


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{what}, but its {path.name} can't be read ({error}); fetch the model again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{what}, but its {path.name} is not a JSON object; fetch the model again")
    return values


class _Shapes(pickle.Unpickler):
    """Reads the pickle in a PyTorch file with tensors replaced by their shapes; nothing that it names is called."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        """Return the tensor's size for the function that rebuilds a tensor, and None for everything else."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, *rest: tuple(size)
        return lambda *arguments: None

    def persistent_load(self, pid: Any) -> None:
        """Return None for a tensor's contents."""


def _statistics_shape(path: Path) -> tuple[int, ...] | None:
    """Return the shape of the tensors in a file of statistics; None if it can't be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            content = _Shapes(io.BytesIO(archive.read(name))).load()
        shape = content["var"] if content.get("var") else content["mean"]
        return shape if isinstance(shape, tuple) else None
    except Exception:  # a damaged pickle can raise anything
        return None


def _decoder_about(path: Path) -> tuple[dict[str, int] | None, str]:
    """Return a decoder's sizes and its encoder's digest, by the header of its file; None and "" if it has none."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            metadata = json.loads(file.read(min(length, 100_000_000)))["__metadata__"]
        sizes: dict[str, int] = json.loads(metadata["decoder_config"])
        about = json.loads(metadata.get("provenance", "{}"))
        return sizes, about.get("digests", {}).get("encoder", "")
    except (OSError, ValueError, KeyError, struct.error):
        return None, ""
