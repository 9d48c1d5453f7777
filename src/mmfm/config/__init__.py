"""Configuration: YAML read by OmegaConf into frozen dataclasses, one per section, strictly.

The values live in ``config/config.yaml`` alone. The dataclasses have no defaults, so a new key never changes a number
behind anybody's back. Every key has one of three kinds:

* ``identity``: changes the numbers; part of a stage's parameter and of the fingerprint of its state.
* ``budget``: how far to go; part of the parameter, not of the fingerprint, so that raising it continues.
* ``operation``: speed, memory, logging; in neither.
"""

from mmfm.config.reading import build, load, parse_overrides
from mmfm.config.sections import (
    ADAPTIVE_SOLVERS,
    FIXED_SOLVERS,
    SECTIONS,
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
)
from mmfm.config.spelling import nearest
from mmfm.config.stages import STAGES, VERSIONS, identity, keys_of_kind, stage_operation, stage_settings

__all__ = [
    "ADAPTIVE_SOLVERS",
    "FIXED_SOLVERS",
    "SECTIONS",
    "STAGES",
    "VERSIONS",
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
    "Sweep",
    "Train",
    "build",
    "identity",
    "keys_of_kind",
    "load",
    "nearest",
    "parse_overrides",
    "stage_operation",
    "stage_settings",
]
