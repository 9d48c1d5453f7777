"""``adm_reference``: write a reference and its images in the format of the ADM evaluator.

Reads: the reference, the listing of the training images, and those of the images that are written.
Writes: an ``.npz`` with ``mu`` and ``sigma``, with ``mu_s`` and ``sigma_s`` if the reference has them, and with images
    in ``arr_0``: evenly spaced in the listing, those whose features the reference keeps for metrics of single images.
Unit of work: none; 10,000 images are read in a minute or two.
After a kill: no output, or the earlier one.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mmfm import data
from mmfm.evaluation import adm
from mmfm.evaluation.collected import Gaussian
from mmfm.evaluation.reference import Reference
from mmfm.infra.progress import Progress
from mmfm.stages import provenance

_BATCH = 64


def adm_reference(reference_path: Path, listing: Path, most: int, out: Path, workers: int = 0) -> list[str]:
    """Write the file, and return what a reader must know of it: a sentence each.

    Args:
        reference_path: reference of the training images, from fid_reference.
        listing: listing of these images.
        most: number of images to write, or all if there are fewer.
        workers: image-reading processes.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the reference was not made from these images.
    """
    reference = Reference.open(reference_path)
    about, known = reference.about, provenance.listing(listing).digest
    if about["listing_digest"] is None:
        raise ValueError(
            f"'{reference_path}' was imported from {about['source']}; give that file to other programs, not a copy"
        )
    if about["listing_digest"] != known:
        raise ValueError(
            f"'{reference_path}' was made from the images of another listing (digest {about['listing_digest'][:12]}, "
            f"not {known[:12]}); run fid_reference with this one"
        )
    size, rows = about["image_size"], data.evenly(len(data.Listing.open(listing)), most)

    def parts() -> Iterator[np.ndarray]:
        with Progress("adm_reference", len(rows), "images") as progress:
            batches = [rows[part.start : part.stop].tolist() for part in data.ranges(0, len(rows), _BATCH)]
            for _, images in data.image_batches(listing, size, batches, workers):
                yield images.permute(0, 2, 3, 1).numpy()
                progress.advance(len(images))

    adm.write(out, Gaussian(reference.mu, reference.sigma), reference.spatial, (len(rows), size, size, 3), parts())
    if reference.spatial is not None:
        return []
    return [
        "the file has no mu_s and sigma_s, without which guided-diffusion's evaluator.py stops; its features are those "
        f"of {about['detector']}. For all of them, set fid.detector to inception and add sfid to fid.metrics"
    ]
