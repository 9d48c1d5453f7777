"""The reference of a Fréchet distance: feature moments of real images."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfm.infra import store


@dataclass(frozen=True)
class Reference:
    """Feature moments of real images.

    Attributes:
        mu: (D,) float64.
        sigma: (D, D) float64, unbiased covariance.
        about: metadata; see docs/stages.md.
    """

    mu: np.ndarray
    sigma: np.ndarray
    about: dict[str, Any]

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
            return cls(arrays["mu"], arrays["sigma"], about)
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"'{path}' is not a reference for Frechet distances; run fid_reference") from error
