"""The files that ``sample`` reads, and whether they belong together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfm.infra import store
from mmfm.settings import SETTINGS, Setting


@dataclass(frozen=True)
class SampleFiles:
    """Files that ``sample`` reads; ``spatial_gmm`` in the settings with a mixture, ``guide`` for autoguidance."""

    ema: Path
    decoder: Path
    stats: Path
    encoder_weights: Path
    spatial_gmm: Path | None = None
    guide: Path | None = None

    def digests(self, weights: dict[str, Any]) -> dict[str, str]:
        """Return the digests of all inputs, after checking that the weights were trained with these files.

        Args:
            weights: metadata of the EMA weights; what they do not say (imported files) passes.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the weights belong to another encoder, other statistics or another mixture.
        """
        found = {"ema": weights["digest"], "decoder": store.file_digest(self.decoder)}
        compare(found, "stats", store.file_digest(self.stats), f"the statistics {self.stats}", weights)
        encoder = store.folder_digest(self.encoder_weights)
        compare(found, "encoder", encoder, f"the encoder {self.encoder_weights}", weights)
        if setting_of(weights).mixture and self.spatial_gmm is not None:
            from mmfm.mixture.spatial import SpatialMixture

            spatial = SpatialMixture.open(self.spatial_gmm).attributes["digest"]
            compare(found, "spatial_gmm", spatial, f"the spatial mixture {self.spatial_gmm}", weights)
        return found


def compare(found: dict[str, str], part: str, digest: str, thing: str, weights: dict[str, Any]) -> None:
    """Put the digest of ``part`` into ``found``, unless the weights say that they were trained with another one.

    Raises:
        ValueError: they say so.
    """
    recorded = weights.get(f"{part}_digest")
    if recorded is not None and recorded != digest:
        raise ValueError(
            f"the weights were not trained with {thing} (digest {digest[:12]}, not {recorded[:12]}); "
            "give the one they were trained with, or train again"
        )
    found[part] = digest


def setting_of(weights: dict[str, Any]) -> Setting:
    """Return the setting that weights say they are of.

    Raises:
        ValueError: it is none of this project.
    """
    if weights.get("setting") not in SETTINGS:
        raise ValueError(
            f"the weights are of setting {weights.get('setting')!r}; sample knows {', '.join(SETTINGS)}: "
            "train or import them again"
        )
    return SETTINGS[weights["setting"]]


def trained_means(weights: dict[str, Any]) -> str:
    """Return the key ``train.means_precision`` that weights were trained with; imported ones were with float32."""
    return weights.get("settings", {}).get("train", {}).get("means_precision", "float32")
