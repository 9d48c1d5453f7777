"""The reference of a Fréchet distance: feature moments of real images."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfm.evaluation.collected import Gaussian, Statistics
from mmfm.infra import store


@dataclass(frozen=True)
class Reference:
    """Feature moments of real images.

    Attributes:
        mu: (D,) float64.
        sigma: (D, D) float64, unbiased covariance.
        about: metadata; see docs/stages.md.
        spatial: moments of the spatial features; None if no metric needs them.
        bank: features of some of the images, (n, D) float32; None if no metric needs them.
    """

    mu: np.ndarray
    sigma: np.ndarray
    about: dict[str, Any]
    spatial: Gaussian | None = None
    bank: np.ndarray | None = None

    @classmethod
    def open(cls, path: str | Path) -> "Reference":
        """Open a reference written by :mod:`mmfm.stages.fid_reference`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated or not a reference.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no reference at '{path}'; run the stage fid_reference")
        try:
            arrays, about = store.map_arrays(path)
            spatial = Gaussian(arrays["mu_s"], arrays["sigma_s"]) if "mu_s" in arrays else None
            return cls(arrays["mu"], arrays["sigma"], about, spatial, arrays.get("bank"))
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"'{path}' is not a reference for Frechet distances; run fid_reference") from error

    def statistics(self) -> Statistics:
        """Return what metrics compare with."""
        return Statistics(
            self.about["n_images"], Gaussian(self.mu, self.sigma), self.spatial, inception_score=None, bank=self.bank
        )
