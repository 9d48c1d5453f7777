"""Reading models in the layout of transformers, with errors that name the model and the remedy."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mmfm.infra.torchvision_ops  # noqa: F401  # isort: skip  (before transformers, which imports torchvision)

import torch
from safetensors import SafetensorError
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mmfm.infra.model_folder import Preprocessing, from_processor

log = logging.getLogger(__name__)


def read_config(weights: str) -> dict[str, Any]:
    """Return the contents of config.json."""
    with readable_errors(weights, "config.json"):
        config, _ = PreTrainedConfig.get_config_dict(weights, local_files_only=True)
    if config.get("model_type") == "timm_wrapper":  # what transformers adds to timm's
        del config["model_type"]
    return dict(config)


def preprocessing(weights: str) -> Preprocessing:
    """Return how the model wants its pixels, by preprocessor_config.json."""
    with readable_errors(weights, "preprocessor_config.json"):
        values, _ = BaseImageProcessor.get_image_processor_dict(weights, local_files_only=True)
    return from_processor(values, f"preprocessor_config.json of {weights}")


def load(model_class: Any, weights: str, unused: set[str], **options: Any) -> PreTrainedModel:
    """Load a model in float32.

    Args:
        model_class: class of transformers with `from_pretrained`.
        unused: parameters that the weights may lack.
        options: for `from_pretrained`.

    Raises:
        ValueError: other parameters are missing, which transformers would leave at random values.
    """
    model, missing = load_partly(model_class, weights, **options)
    require(missing - unused, model, weights)
    return model


def load_partly(model_class: Any, weights: str, **options: Any) -> tuple[PreTrainedModel, set[str]]:
    """Load a model in float32, and return it with the names of the parameters that the weights lack."""
    with readable_errors(weights, "the weights"), _quiet_transformers():
        loaded: Any = model_class.from_pretrained(
            weights, local_files_only=True, dtype=torch.float32, output_loading_info=True, **options
        )
    model, info = loaded
    log.debug("%s: ignored %d tensors outside the vision tower", weights, len(info["unexpected_keys"]))
    return model, set(info["missing_keys"])


def require(missing: set[str], model: PreTrainedModel, weights: str) -> None:
    """Raise ValueError if parameters are missing."""
    if missing:
        names = sorted(missing)
        raise ValueError(
            f"{weights} lacks {len(names)} parameter(s) of {type(model).__name__} "
            f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); fetch the model again"
        )


@contextmanager
def readable_errors(weights: str, part: str) -> Iterator[None]:
    """Turn the errors of transformers for absent or damaged files into ones that name the model and the remedy."""
    remedy = f"fetch it with `hf download {weights}`, or give an existing folder"
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{part} of the encoder {weights} cannot be read ({error}); {remedy}") from error
    except OSError as error:
        if Path(weights).is_dir():
            raise ValueError(f"{part} of the encoder folder {weights} cannot be read: {error}") from error
        raise FileNotFoundError(
            f"encoder {weights} is neither a folder nor a model in the local Hugging Face cache; {remedy}"
        ) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide the progress bar and the report of ignored tensors (hundreds for a SigLIP text tower)."""
    verbosity, progress = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress:
            transformers_logging.enable_progress_bar()
