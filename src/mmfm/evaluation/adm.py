"""Reference files of the ADM evaluator, and images in its format."""

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfm.evaluation.collected import Gaussian
from mmfm.infra import npz


@dataclass(frozen=True)
class AdmFile:
    """The contents of an ``.npz`` for guided-diffusion's evaluator; None for what it lacks.

    In ADM's ImageNet files (``VIRTUAL_imagenet256_labeled.npz``), the moments are those of all training images, and the
    images are 10,000 of them, for precision and recall.

    Attributes:
        gaussian: ``mu`` (D,) and ``sigma`` (D, D).
        spatial: ``mu_s`` and ``sigma_s``.
        images: ``arr_0`` (n, S, S, 3) uint8, memory-mapped.
    """

    gaussian: Gaussian | None
    spatial: Gaussian | None
    images: np.ndarray | None

    @classmethod
    def open(cls, path: str | Path) -> "AdmFile":
        """Read the moments and map the images. Python objects are refused, not unpickled.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated or no ``.npz``, has none of the arrays, Python objects, or arrays of
                other shapes.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no file '{path}'; give an .npz with mu and sigma, or with images in arr_0")
        try:
            with zipfile.ZipFile(path) as archive:
                names = {name.removesuffix(".npy") for name in archive.namelist()}
                compressed = {m.filename.removesuffix(".npy") for m in archive.infolist() if m.compress_type}
        except zipfile.BadZipFile as error:
            raise ValueError(f"'{path}' is truncated or not an .npz file ({error}); download it again") from error
        pairs = [_moments(path, names, mean, covariance) for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s"))]
        # Compressed images can't be mapped; the moments serve without them.
        usable = npz.MEMBER in names and not (npz.MEMBER in compressed and pairs[0])
        images = npz.map_array(path) if usable else None
        if images is not None and (images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8):
            raise ValueError(f"'{path}' holds {images.dtype} {images.shape}, but images are uint8 (n, S, S, 3)")
        if images is not None and len(images) < 2:
            raise ValueError(f"'{path}' holds {len(images)} images; at least 2 are needed")
        if images is None and pairs == [None, None]:
            raise ValueError(
                f"'{path}' has {', '.join(sorted(names)) or 'no arrays'}, but neither mu and sigma nor arr_0"
            )
        return cls(pairs[0], pairs[1], images)


def write(
    path: str | Path,
    gaussian: Gaussian,
    spatial: Gaussian | None,
    shape: tuple[int, int, int, int],
    images: Iterable[np.ndarray],
) -> None:
    """Write a file that :meth:`AdmFile.open` and guided-diffusion's evaluator read, atomically.

    Args:
        spatial: None for a detector without spatial features; the evaluator then can't use the file.
        shape: (n, S, S, 3) of all images.
        images: parts (n_i, S, S, 3) uint8 of them; only one is in memory at a time.

    Raises:
        ValueError: the parts don't fit the shape.
    """
    moments = {"mu": gaussian.mean, "sigma": gaussian.covariance}
    moments |= {} if spatial is None else {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    npz.write_parts(path, shape, np.uint8, images, {name: np.asarray(array) for name, array in moments.items()})


def _moments(path: Path, names: set[str], mean: str, covariance: str) -> Gaussian | None:
    if mean not in names and covariance not in names:
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            mu, sigma = (np.asarray(archive[name], np.float64) for name in (mean, covariance))
    except KeyError as error:
        raise ValueError(f"'{path}' has only one of {mean} and {covariance}; give a file with both") from error
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{mean} or {covariance} in '{path}' can't be read as numbers ({error}); download it again"
        ) from error
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        raise ValueError(f"'{path}' has {mean} {mu.shape} and {covariance} {sigma.shape}, not (D,) and (D, D)")
    return Gaussian(mu, sigma)
