"""What the folder of a vision encoder says about itself, read without PyTorch: library, sizes, normalisation.

A folder has one of two layouts of the Hugging Face hub: that of transformers (config.json with `model_type`,
preprocessor_config.json, model.safetensors), or that of timm (config.json with `architecture` and `pretrained_cfg`,
model.safetensors).
"""

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfm.infra import store

TIMM, TRANSFORMERS = "timm", "transformers"
_PROCESSOR = "preprocessor_config.json"
_DEPTHS = {"large": 24, "giant": 40, "gigantic": 48, "so400m": 27, "huge": 32}
_RESAMPLING = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


_NESTED_DEFAULTS = {
    kind: {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": patch}
    for kind, patch in (("siglip", 16), ("siglip2", 16), ("clip", 32))
}
"""Sizes of the vision tower that a full model's config.json may lack, by its `model_type`."""


@dataclass(frozen=True)
class VisionModel:
    """A model by its config.json.

    Attributes:
        library: ``transformers`` or ``timm``.
        kind: `model_type`, or timm's `architecture`.
        width: channels of a token; None if it does not say.
        depth: layers; None if it does not say.
        patch: sides of a patch (height, width) in pixels; None if it does not say.
        image: height and width in pixels of the images that it was trained with; None if it does not say.
    """

    library: str
    kind: str
    width: int | None
    depth: int | None
    patch: tuple[int, int] | None
    image: tuple[int, int] | None

    def patch_size(self, where: str) -> int | None:
        """Return the side of a patch in pixels; None if config.json does not say.

        Args:
            where: the folder, for the error message.

        Raises:
            ValueError: patches or the grid are not square; or a transformers model has none.
        """
        if self.patch is None:
            if self.library == TRANSFORMERS:
                raise ValueError(f"{where} holds a '{self.kind}' model without patches; give a vision transformer")
            return None
        for what, sides, unit in (("patches", self.patch, "pixels"), ("a grid", self._grid(), "patches")):
            if sides and sides[0] != sides[1]:
                raise ValueError(
                    f"{where} holds a '{self.kind}' model with {what} of {sides[0]} x {sides[1]} {unit}; give one with "
                    "square patches in a square grid"
                )
        return self.patch[0]

    def _grid(self) -> tuple[int, int] | None:
        if self.patch is None or self.image is None:
            return None
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]


def nearest_multiples(size: int, patch: int) -> str:
    """Return the multiples of a patch size around a size, as text: ``224 or 238``."""
    below = size // patch * patch
    return f"{below} or {below + patch}" if below else str(patch)


def describe(values: Mapping[str, Any], weights: Path | None = None) -> VisionModel:
    """Return what a config.json says.

    Args:
        values: its contents.
        weights: model.safetensors, whose header says what timm's config.json does not; None if there is none yet.
    """
    if store.is_timm(values):
        return _describe_timm(values, _shapes(weights) if weights else {})
    vision = values.get("vision_config")
    # transformers leaves a nested configuration's defaults out of the file.
    nested = _NESTED_DEFAULTS.get(str(values.get("model_type")), {})
    vision = {**nested, **vision} if isinstance(vision, Mapping) else values
    # Encoders have one width and one patch size; models that change them from layer to layer have lists.
    width, depth = (_whole(vision.get(name)) for name in ("hidden_size", "num_hidden_layers"))
    patch, image = (_pair(vision.get(name)) for name in ("patch_size", "image_size"))
    return VisionModel(TRANSFORMERS, str(values.get("model_type")), width, depth, patch, image)


def read(folder: str | Path) -> VisionModel:
    """Return what a folder says of its model.

    Raises:
        OSError: there is no config.json.
        ValueError: it can't be read.
    """
    return describe(read_config(folder), Path(folder) / "model.safetensors")


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return the contents of a folder's config.json; errors as for :func:`read`."""
    values = json.loads((Path(folder) / "config.json").read_text())
    if not isinstance(values, dict):
        raise ValueError(f"'{folder}/config.json' is not a JSON object; fetch the model again")
    return values


@dataclass(frozen=True)
class Preprocessing:
    """How pixels are prepared.

    Attributes:
        mean, std: of the three colours in [0, 1].
        resampling: ``bicubic`` or ``bilinear``, by which images are resized; other filters count as bicubic.
    """

    mean: list[float]
    std: list[float]
    resampling: str


def preprocessing(folder: str | Path) -> Preprocessing:
    """Return how a folder's model wants its pixels.

    Raises:
        OSError: a file is missing.
        ValueError: it can't be read, or has no normalisation.
    """
    folder = Path(folder)
    values = read_config(folder) if (folder / "config.json").is_file() else {}
    if not store.is_timm(values):
        return from_processor(store.read_json(folder / _PROCESSOR), f"'{folder}/{_PROCESSOR}'")
    about = values.get("pretrained_cfg") or {}
    named = {"image_mean": about.get("mean"), "image_std": about.get("std")}
    given = {name: value for name, value in named.items() if value is not None}
    resample = 2 if about.get("interpolation") == "bilinear" else 3
    return from_processor({**given, "resample": resample}, f"'{folder}/config.json'")


def from_processor(values: Mapping[str, Any], where: str) -> Preprocessing:
    """Return what a preprocessor_config.json says.

    Args:
        where: the file, for the error message.

    Raises:
        ValueError: it has no normalisation.
    """
    for name in ("image_mean", "image_std"):
        if name not in values:
            raise ValueError(f"{where} has no {name}; fetch the encoder again")
    mean, std = (list(values[name]) for name in ("image_mean", "image_std"))
    return Preprocessing(mean, std, _RESAMPLING.get(values.get("resample", 3), "bicubic"))


def _describe_timm(values: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> VisionModel:
    name, given = str(values["architecture"]), values.get("model_args") or {}
    named = re.search(r"patch(\d+)", name)
    kernel = next((shape for key, shape in shapes.items() if key.endswith("patch_embed.proj.weight")), [])
    patch = _pair(given.get("patch_size")) or (
        (kernel[-2], kernel[-1]) if len(kernel) == 4 else _pair(int(named[1]) if named else None)
    )
    layers = {int(found[1]) for key in shapes if (found := re.match(r"blocks\.(\d+)\.", key))}
    usual = next((depth for size, depth in _DEPTHS.items() if size in name), 12)
    depth = _whole(given.get("depth")) or (max(layers) + 1 if layers else usual)
    width = _whole(given.get("embed_dim")) or _whole(values.get("num_features"))
    trained_with = (values.get("pretrained_cfg") or {}).get("input_size") or [3, None, None]
    image = tuple(trained_with[1:]) if all(map(_whole, trained_with)) else None
    return VisionModel(TIMM, name, width, depth, patch, image)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _pair(value: Any) -> tuple[int, int] | None:
    values = [value, value] if isinstance(value, int) else value
    if isinstance(values, (list, tuple)) and len(values) == 2 and all(map(_whole, values)):
        return values[0], values[1]
    return None


def _shapes(weights: Path) -> dict[str, list[int]]:
    """Return the shapes of the tensors in a safetensors file; none if it can't be read."""
    try:
        with weights.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100_000_000)))
        return {name: about["shape"] for name, about in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return {}
