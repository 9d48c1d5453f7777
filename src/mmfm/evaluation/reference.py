"""What generated images are compared with: moments of the real images' features."""

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
        about: metadata, see docs/stages.md.
    """

    mu: np.ndarray
    sigma: np.ndarray
    about: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> "Reference":
        """Open what :mod:`mmfm.stages.fid_reference` wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is truncated or something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no reference at '{path}'; run the stage fid_reference")
        try:
            arrays, about = store.map_arrays(path)
            found = cls(arrays["mu"], arrays["sigma"], about)
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"'{path}' is no reference of the Frechet distance; make it with fid_reference") from error
        return found
