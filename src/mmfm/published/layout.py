"""Where the published files lie, below the root of their repository on the Hugging Face hub or of a copy of it.

This module must not import PyTorch: Snakemake reads it at every start.
"""

from mmfm.config.choices import ENCODER_FAMILIES, SETTINGS

REPOSITORY = "luo00042/mm-fm"
MODES = 8192
"""Number of modes of the published mixtures."""

REFERENCE = "fid_reference/VIRTUAL_imagenet256_labeled.npz"
"""ADM's reference batch, with the moments of ImageNet's features."""

_ENCODERS = {"dinov2": "dinov2-b", "siglip2": "siglip2-b", "mae": "mae-b"}
_SETTINGS = {"gmm": "uncond-gmm", "mode": "mode-gmm"}
_STEPS = {"dinov2": (100_000, 25_000), "siglip2": (25_000,), "mae": (25_000,)}
GUIDE_STEP = 25_000
"""Step of the published guides."""

INSTEAD = "train it, with --configfile config/imagenet256.yaml"
"""What to do for a result that is not published."""

FOLDERS = ("checkpoints", "decoders", "fid_reference", "gmm", "normalization_stats")


def _require(family: str) -> None:
    ENCODER_FAMILIES.require(family)
    if family not in _ENCODERS:
        raise ValueError(
            f"nothing is published for encoders of the family {family}, only for {', '.join(_ENCODERS)}; make it "
            "yourself: `train`, `fit` or `compute` instead of `published`"
        )


def _encoder(family: str) -> str:
    _require(family)
    return _ENCODERS[family]


def decoder(family: str) -> str:
    """Return the decoder of an encoder family, a PyTorch file with the weights of a ViT-XL."""
    return f"decoders/{_encoder(family)}/ViTXL_n08/model.pt"


def statistics(family: str) -> str:
    """Return the latent statistics of an encoder family, a PyTorch file."""
    return f"normalization_stats/{_encoder(family)}/stat.pt"


def mixture(family: str) -> str:
    """Return the mixture of the global tokens of an encoder family, a pickle of scikit-learn."""
    return f"gmm/{_encoder(family)}/gmm_n{MODES}_diag_k-means++.pkl"


def spatial_mixture(family: str) -> str:
    """Return the spatial mixture of an encoder family, a pickle of scikit-learn."""
    return f"gmm/{_encoder(family)}/spatial_gmm_from_cls_n{MODES}_diag_k-means++_flip.pkl"


def steps(family: str) -> tuple[int, ...]:
    """Return the steps of the published checkpoints, the largest first."""
    _require(family)
    return _STEPS[family]


def checkpoint(family: str, setting: str, step: int | None = None) -> str:
    """Return the checkpoint of a setting.

    Args:
        step: optimiser step; None for the last published one.

    Raises:
        ValueError: none is published.
    """
    SETTINGS.require(setting)
    if setting not in _SETTINGS:
        raise ValueError(
            f"no checkpoint of the setting '{setting}' is published, only of {' and '.join(_SETTINGS)}; {INSTEAD}"
        )
    step = steps(family)[0] if step is None else step
    if step not in steps(family):
        known = " and ".join(f"{known:,}" for known in steps(family))
        raise ValueError(f"no checkpoint of {family} at step {step:,} is published, only at {known}; {INSTEAD}")
    return f"checkpoints/{_encoder(family)}/{_SETTINGS[setting]}-{step // 1000}k.pt"


def guide(family: str, setting: str) -> str:
    """Return the checkpoint of the guide of a setting.

    Raises:
        ValueError: none is published.
    """
    SETTINGS.require(setting)
    if family != "dinov2" or setting not in _SETTINGS:
        raise ValueError(f"no guide of {family} in the setting '{setting}' is published; {INSTEAD}")
    return f"checkpoints/autoguidance/dit-s-{_SETTINGS[setting]}-{GUIDE_STEP // 1000}k.pt"


def checkpoints(family: str) -> list[str]:
    """Return all checkpoints of an encoder family."""
    return [checkpoint(family, setting, step) for setting in _SETTINGS for step in steps(family)]


def guides(family: str) -> list[str]:
    """Return all guides of an encoder family."""
    return [guide(family, setting) for setting in _SETTINGS] if family == "dinov2" else []
