"""Configuration: YAML files, read by OmegaConf and checked strictly, as one frozen dataclass per section.

Values live only in ``config/config.yaml``. The dataclasses have no defaults, so a new key cannot silently change
results. Every key has one of three kinds:

* ``identity``: changes results; part of the stage's parameter and of the fingerprint of its state.
* ``budget``: how far to go; part of the parameter but not of the fingerprint, so raising it continues a finished run.
* ``operation``: speed, memory, logging; part of neither.

:mod:`~mmfm.config.registry` lists the stages; :mod:`~mmfm.config.sections`, :mod:`~mmfm.config.training` and
:mod:`~mmfm.config.sampling` declare the keys, and :mod:`~mmfm.config.choices` the values they accept. :class:`Config`
is the whole, :class:`StageConfig` what one stage reads of it.
"""

from mmfm.config.choices import SETTINGS, did_you_mean
from mmfm.config.keys import declared, keys_of_kind
from mmfm.config.reading import build, demo_layer, imported, load, parse_overrides
from mmfm.config.registry import STAGES
from mmfm.config.sampling import Guidance, Guide, Sample
from mmfm.config.sections import (
    Data,
    Decoder,
    Encoder,
    Extract,
    Fid,
    Gmm,
    Image,
    Latents,
    LatentStats,
    Limit,
    Published,
    SpatialGmm,
    Sweep,
)
from mmfm.config.stage import SECTIONS, StageConfig, effective
from mmfm.config.training import InitialPhase, LossWeighting, Model, Preview, Recipe, Train
from mmfm.config.whole import Config

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
    "InitialPhase",
    "LatentStats",
    "Latents",
    "Limit",
    "LossWeighting",
    "Model",
    "Preview",
    "Published",
    "Recipe",
    "Sample",
    "SpatialGmm",
    "StageConfig",
    "Sweep",
    "Train",
    "build",
    "declared",
    "demo_layer",
    "did_you_mean",
    "effective",
    "imported",
    "keys_of_kind",
    "load",
    "parse_overrides",
]
