"""Import of networks: the checkpoints of flow-matching models and guides, and decoders.

PyTorch files are read with ``weights_only``, so nothing in them runs, and mapped: a checkpoint of a training holds four
times the weights. Both kinds may also come in this project's own layout.
"""

import math
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfm.autoencoder.decoder import Decoder, DecoderConfig, save_decoder
from mmfm.autoencoder.rae import load_statistics
from mmfm.config import Model
from mmfm.config.choices import SETTINGS
from mmfm.infra import disk, store
from mmfm.models.dit import DiT, DiTConfig
from mmfm.models.weights import weights_metadata

TABLE = "y_embedder.embedding_table.weight"
"""The label table, which published checkpoints hold even where the model has no labels."""

_TABLE_STD = 0.02
_ENOUGH = 10_000
_NULL_DROPOUT = 0.1
_CLASSES = 1000

_NAMES = {"MODE-CONDITIONAL-GMM": "mode", "UNCONDITIONAL-GMM": "gmm", "UNCONDITIONAL": "uncond"}


@dataclass(frozen=True)
class Expected:
    """What a checkpoint must be.

    Attributes:
        setting: name in :data:`mmfm.config.choices.SETTINGS`.
        model: sizes of the model.
        modes: number of modes of the mixture; None for a setting without one.
        step: optimiser step; None if it is not known beforehand.
        encoder: the section ``encoder``, as JSON values, for the record.
        image_size: of the images, pixels, for the record.
        means_precision: the ``train.means_precision`` of the training. Published training rounds the source's means and
            standard deviations to bf16.
    """

    setting: str
    model: Model
    modes: int | None
    step: int | None
    encoder: dict[str, Any]
    image_size: int
    means_precision: str = "reference"


def read_torch(path: Path) -> Any:
    """Read a PyTorch file, mapped if it can be; nothing in it runs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}'; fetch it, or give another")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickles, which are refused in any case
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
    except Exception as error:  # a damaged file can raise anything
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"'{path}' ({path.stat().st_size:,} bytes) is not a PyTorch file of tensors and plain values, or is "
            f"damaged ({reason[:200]}); fetch it again"
        ) from None


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict; raises ValueError if it is none."""
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"'{path}' holds no state dict; give a checkpoint in the published layout")
    return {str(name): tensor for name, tensor in content.items()}


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the EMA weights of a checkpoint in the published layout, and what else it says as plain values.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or holds no EMA weights.
    """
    content = read_torch(path)
    if isinstance(content, Mapping) and "ema" in content:
        return _tensors(content["ema"], path), {k: v for k, v in content.items() if isinstance(v, str | int | float)}
    if isinstance(content, Mapping) and "model" in content:
        raise ValueError(f"'{path}' holds weights, but no average of them (`ema`); give a checkpoint with `ema`")
    return _tensors(content, path), {}


def import_weights(source: Path, out: Path, stats: Path, expected: Expected) -> str:
    """Write a checkpoint as weights of this project, and return their digest.

    Args:
        source: a checkpoint in the published layout, or weights of this project.
        stats: latent statistics, for the shape of the latents.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is damaged, or another model, setting or number of modes than expected.
    """
    shape = tuple(load_statistics(stats)[1].shape)
    if source.suffix == ".safetensors":
        return _copy_weights(source, out, shape, expected)
    state, about = read_checkpoint(source)
    table = state.pop(TABLE, None)
    _check_setting(source, table, about, expected)
    config = _model_config(source, table, shape, expected)
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in DiT(config).state_dict().items()}
    if config.num_classes:
        assert table is not None  # checked with the setting
        state[TABLE] = table
    _check_shapes(source, state, wanted, "the configured model", "name the model that it is (train.model, guide.model)")
    disk.require(out.parent / "import", "import", 4 * sum(map(math.prod, wanted.values())), written=0)
    step = about.get("train_steps", expected.step)
    metadata = {
        "setting": expected.setting,
        "encoder": expected.encoder,
        "latent_shape": list(shape),
        "step": step,
        "epochs": None,
        "seed": 0,
        "images_seen": None,
        "settings": {
            "encoder": expected.encoder,
            "image": {"size": expected.image_size},
            "train": {"means_precision": expected.means_precision},
        },
        "source": _origin(source),
        "model": asdict(config),
    }

    def read(name: str) -> np.ndarray:
        array = state[name].float().numpy()
        if not np.isfinite(array).all():
            raise ValueError(f"'{name}' in '{source}' has values that are not finite; fetch it again")
        return array

    return store.stream_arrays(out, {n: (np.dtype(np.float32), s) for n, s in wanted.items()}, read, metadata)


def _origin(source: Path) -> dict[str, Any]:
    """Return the record of a file that was imported."""
    return {"file": source.name, "sha256": store.file_digest(source)}


def _copy_weights(source: Path, out: Path, shape: tuple[int, ...], expected: Expected) -> str:
    about = weights_metadata(source)
    sizes = about["model"]
    if about.get("setting") != expected.setting:
        raise ValueError(
            f"'{source}' has weights of the setting '{about.get('setting')}', not '{expected.setting}'; give those of "
            f"'{expected.setting}'"
        )
    if shape != (sizes["in_channels"], sizes["input_size"], sizes["input_size"]):
        raise ValueError(
            f"'{source}' is for other latents than the statistics, {list(shape)}; give files of one encoder"
        )
    for key, own in asdict(expected.model).items():
        if list(sizes[key]) != list(own):
            raise ValueError(f"'{source}' has {key} {list(sizes[key])}, not {list(own)}; name the model that it is")
    if SETTINGS[expected.setting].condition == "mode" and sizes["num_classes"] != expected.modes:
        raise ValueError(
            f"'{source}' knows {sizes['num_classes']:,} modes, but the mixture has {expected.modes:,}; give the one "
            "that it was trained with"
        )
    with store.whole_file(out) as partial:
        shutil.copyfile(source, partial)
    return about["digest"]


def _check_setting(source: Path, table: Tensor | None, about: Mapping[str, Any], expected: Expected) -> None:
    """Raise ValueError if a checkpoint shows that it is of another setting.

    It need not say so, but its label table tells: it is there in any case, with a row for each mode (or class), and
    keeps its initial values N(0, 0.02^2) where the model has no labels.
    """
    wanted, rows = SETTINGS[expected.setting], 0 if table is None else len(table)
    path = str(about.get("config_path", ""))
    named = next((setting for part, setting in _NAMES.items() if part in path.upper()), None)
    if named is not None and named != expected.setting:
        raise ValueError(
            f"'{source}' was trained by '{path}', in the setting '{named}', not '{expected.setting}'; give the "
            f"checkpoint of '{expected.setting}'"
        )
    labels = expected.modes if wanted.condition == "mode" or (wanted.mixture and wanted.condition is None) else None
    if table is None and wanted.condition:
        raise ValueError(
            f"'{source}' has no label table, so it is not of the setting '{expected.setting}'; give another checkpoint"
        )
    if labels is not None and table is not None and rows not in (labels, labels + 1):
        raise ValueError(
            f"'{source}' knows {rows:,} labels, but the mixture has {labels:,} modes; give the mixture that it was "
            "trained with, or another checkpoint"
        )
    if expected.setting == "uncond" and table is not None and rows not in (_CLASSES, _CLASSES + 1):
        raise ValueError(
            f"'{source}' has a label table of {rows:,} rows, one for each mode, so it is not of the setting 'uncond'; "
            "give the checkpoint of 'uncond'"
        )
    if table is None or table.numel() < _ENOUGH:
        return
    # The standard error of a standard deviation from n values is a share of sqrt(1 / 2n) of it.
    deviations = abs(float(table.float().std()) / _TABLE_STD - 1) * math.sqrt(2 * table.numel())
    if wanted.condition and deviations < 5:
        raise ValueError(
            f"'{source}' has a label table that was never trained, so it is not of the setting '{expected.setting}'; "
            f"give the checkpoint of '{expected.setting}'"
        )
    if not wanted.condition and deviations > 50:
        raise ValueError(
            f"'{source}' has a trained label table, so it is not of the setting '{expected.setting}', which has no "
            f"labels; give the checkpoint of '{expected.setting}'"
        )


def _model_config(source: Path, table: Tensor | None, shape: tuple[int, ...], expected: Expected) -> DiTConfig:
    """Return the sizes of the model, with the labels that the table has rows for."""
    rows = 0 if table is None else len(table)
    labels = {"mode": expected.modes, "class": _CLASSES if rows == _CLASSES + 1 else rows, None: 0}
    number = labels[SETTINGS[expected.setting].condition] or 0
    return DiTConfig(
        input_size=shape[1], patch_size=1, in_channels=shape[0], **asdict(expected.model),
        num_classes=number, label_dropout=_NULL_DROPOUT if number and rows == number + 1 else 0.0,
    )  # fmt: skip


def _check_shapes(
    source: Path, state: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], what: str, remedy: str
) -> None:
    """Raise ValueError at the first tensor that is missing, too many, or of another shape."""
    for name, shape in wanted.items():
        if name not in state:
            raise ValueError(f"'{source}' lacks '{name}', which {what} has; {remedy}")
        if tuple(state[name].shape) != shape:
            found = list(state[name].shape)
            raise ValueError(f"'{name}' in '{source}' is {found}, but {list(shape)} in {what}; {remedy}")
    if extra := sorted(set(state) - set(wanted)):
        raise ValueError(f"'{source}' has '{extra[0]}', which {what} lacks; {remedy}")


def import_decoder(source: Path, out: Path, stats: Path, num_heads: int, image_size: int) -> list[str]:
    """Write a decoder as this project's, and return the names of tensors in the file that are not the decoder's.

    Args:
        source: a state dict in a PyTorch file; its sizes follow from its tensors, all but the heads.
        stats: latent statistics, for the shape of the latents.
        num_heads: attention heads.
        image_size: side of the images, pixels.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is damaged, no decoder, or one for other latents or images.
    """
    channels, height, width = load_statistics(stats)[1].shape
    content = read_torch(source)
    nested = content.get("model", content) if isinstance(content, Mapping) else content
    state = _tensors(nested, source)
    try:
        config = DecoderConfig(
            latent_dim=state["decoder_embed.weight"].shape[1],
            hidden_size=state["decoder_embed.weight"].shape[0],
            intermediate_size=state["decoder_layers.0.intermediate.dense.weight"].shape[0],
            num_heads=num_heads,
            num_layers=1 + max(int(m[1]) for m in (re.match(r"decoder_layers\.(\d+)\.", n) for n in state) if m),
            patch_size=math.isqrt(state["decoder_pred.weight"].shape[0] // 3),
            num_patches=state["decoder_pos_embed"].shape[1] - 1,
        )
    except (KeyError, IndexError) as error:
        raise ValueError(f"'{source}' is not a decoder in the published layout (it lacks {error}); give one") from None
    found = (config.latent_dim, config.num_patches, config.patch_size * math.isqrt(config.num_patches))
    if found != (channels, height * width, image_size):
        raise ValueError(
            f"'{source}' decodes {found[1]} tokens of {found[0]} channels into images of {found[2]} pixels, but the "
            f"statistics are of {height * width} tokens of {channels}, and 'image.size' is {image_size}; give the "
            "decoder of this encoder"
        )
    with torch.device("meta"):
        decoder = Decoder(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    extra = sorted(set(state) - set(wanted))
    own = {name: tensor for name, tensor in state.items() if name in wanted}
    _check_shapes(source, own, wanted, "a decoder of its width and depth", "fetch it again")
    decoder.load_state_dict({name: tensor.float() for name, tensor in own.items()}, assign=True)
    save_decoder(decoder, out, {"source": _origin(source)})
    return extra
