"""MM-FM: flow matching in the latent space of a frozen vision encoder, with a Gaussian mixture as the source.

Open a target that the workflow has finished, and use its model:

>>> import mmfm
>>> model = mmfm.open("results/fid/dinov2_mode.txt", device="cpu")
>>> images = model.generate(16)

The guide is docs/python.md. PyTorch is imported only when one of the names is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmfm.api import (
        Detector,
        Encoded,
        Images,
        Mixture,
        Model,
        Trajectory,
        distance,
        load_detector,
        open,
    )

__all__ = ["Detector", "Encoded", "Images", "Mixture", "Model", "Trajectory", "distance", "load_detector", "open"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("mmfm.api"), name)
    raise AttributeError(f"module 'mmfm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
