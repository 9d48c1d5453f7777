"""Configuration: YAML read by OmegaConf into frozen dataclasses, one per section, strictly.

The values live in ``config/config.yaml`` alone. The dataclasses have no defaults, so a new key never changes a number
behind anybody's back. Every key has one of three kinds:

* ``identity``: changes the numbers; part of a stage's parameter and of the fingerprint of its state.
* ``budget``: how far to go; part of the parameter, not of the fingerprint, so that raising it continues.
* ``operation``: speed, memory, logging; in neither.

:mod:`~mmfm.config.registry` has the stages, :mod:`~mmfm.config.choices` what keys can be set to,
:mod:`~mmfm.config.sections` the keys, and :class:`StageConfig` is what one stage reads of them.
"""

from mmfm.config.choices import SETTINGS, did_you_mean
from mmfm.config.reading import build, load, parse_overrides
from mmfm.config.registry import STAGES
from mmfm.config.sections import (
    Config,
    Data,
    Decoder,
    Encoder,
    Extract,
    Fid,
    Gmm,
    Guidance,
    Guide,
    Image,
    LossWeighting,
    Model,
    Preview,
    Sample,
    SpatialGmm,
    Sweep,
    Train,
    declared,
    keys_of_kind,
)
from mmfm.config.stage import SECTIONS, StageConfig, effective

__all__ = [
    "SECTIONS",
    "SETTINGS",
    "STAGES",
    "Config",
    "Data",
    "Decoder",
    "Encoder",
    "Extract",
    "Fid",
    "Gmm",
    "Guidance",
    "Guide",
    "Image",
    "LossWeighting",
    "Model",
    "Preview",
    "Sample",
    "SpatialGmm",
    "StageConfig",
    "Sweep",
    "Train",
    "build",
    "declared",
    "did_you_mean",
    "effective",
    "keys_of_kind",
    "load",
    "parse_overrides",
]
