"""What is known before a run of its images, its encoder and the machine, so that estimates need not assume it."""

from dataclasses import dataclass, replace
from pathlib import Path

from mmfm.config import Config
from mmfm.infra import image_files, store
from mmfm.workflow.costs import DEMO_BYTES, DEMO_IMAGES, IMAGENET_BYTES, IMAGENET_IMAGES, EncoderSize, Rates


@dataclass(frozen=True)
class Facts:
    """Images to train on, and what else is known.

    Attributes:
        n_images: training images.
        image_bytes: mean size of an image's file.
        origin: where both are from, for people.
        encoder: its sizes; None: from the folder's config.json, or a base model's.
        rates: the machine's; None: those of :mod:`mmfm.workflow.costs`.
        known: whether number and size are those of the run's images.
    """

    n_images: int
    image_bytes: float
    origin: str
    encoder: EncoderSize | None = None
    rates: Rates | None = None
    known: bool = True


def assumed(config: Config) -> Facts:
    """Return the demo's images, or as many as ImageNet has, limited, less those held out."""
    demo = config.data.root == "demo"
    count, size, name = (DEMO_IMAGES, DEMO_BYTES, "demo") if demo else (IMAGENET_IMAGES, IMAGENET_BYTES, "ImageNet")
    return Facts(_for_training(count, config), size, f"{name} has that many", known=demo)


def gather(config: Config, results: str | Path, n_images: int | None = None) -> Facts:
    """Return what is known of a run's images.

    Args:
        results: the run's folder; its listing says most.
        n_images: training images, where the user says how many there are.

    Returns:
        The numbers of the user, else of the listing, else of a quick count of ``data.root``, else the assumed ones.
    """
    root, usual = config.data.root, assumed(config)
    listing = Path(results) / "list_images" / "listing.train.safetensors"
    listed = _listed(listing)
    if n_images:
        return Facts(n_images, listed[1] if listed else usual.image_bytes, "as given")
    if listed:
        return Facts(*listed, f"from '{listing}'")
    if root == "demo":
        return usual
    counted = image_files.count(root)
    if counted:
        return Facts(_for_training(counted[0], config), counted[1], f"counted in '{root}'")
    reason = f"'{root}' can't be counted quickly" if Path(root).is_dir() else f"there is no folder '{root}'"
    return replace(usual, origin=f"{usual.origin}: there is no listing yet, and {reason}")


def _for_training(count: int, config: Config) -> int:
    """Return how many of a folder's images are limited to and not held out, for classes of equal size."""
    limit = config.data.limit
    return max(1, int(count * limit.images * limit.classes) - config.data.holdout)


def _listed(listing: Path) -> tuple[int, float] | None:
    """Return number and mean size in bytes of a listing's images; None if there is no (sound) listing."""
    try:
        sizes = store.map_arrays(listing)[0]["sizes"]
    except (OSError, ValueError, KeyError):
        return None  # the stages that read it say what is wrong
    return (len(sizes), float(sizes.mean())) if len(sizes) else None
