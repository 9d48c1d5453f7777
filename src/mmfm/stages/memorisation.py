"""``memorisation``: compare generated images with the training images nearest to them, and with held-out real images.

Reads: ``images.npz`` (memory-mapped), ``samples.json``, the encoder, the tokens of the training and of the held-out
    images, and the training images that are drawn, by their listing. Tokens record what they were extracted with;
    generated images are encoded in the same way.
Writes: ``.png``, the closest pairs and the histogram of distances; ``.json``, the numbers, the pairs and the warnings.
Unit of work: none; there is nothing to resume. The training images are not encoded again, as their tokens exist.
After a kill: no output; the same command encodes the generated images again.
Memory: tokens of generated and held-out images, 3 kB each for 768 dimensions (154 MB for 50,000). Those of the training
    images stay on disk and are read seven times (3.9 GB each for 1.28 million) in blocks of 4,096 (12 MB). With several
    processes, all encode, and the main one compares.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfm.autoencoder.encoders import load_encoder
from mmfm.data.images import center_crop, crop_generated, read_image
from mmfm.data.listing import Listing
from mmfm.data.loader import to_float
from mmfm.data.tokens import TokenStore
from mmfm.evaluation.detector import Detector
from mmfm.evaluation.features import image_statistics
from mmfm.evaluation.memorisation import CLOSE, Memorisation, draw
from mmfm.evaluation.memorisation import memorisation as compare
from mmfm.infra import store
from mmfm.infra.distributed import Ranks
from mmfm.infra.progress import Progress
from mmfm.stages import provenance

PAIRS = 10
"""Number of closest pairs that are drawn and listed."""

_QUANTILES = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)


@dataclass(frozen=True)
class Files:
    """What the command reads.

    Attributes:
        images: ``images.npz`` from sample, (n, S, S, 3) uint8.
        samples: ``samples.json`` from sample, which describes these images.
        train: tokens of the training images.
        heldout: tokens of the held-out images.
        listing: of the training images.
        encoder: folder of the encoder that made the tokens.
    """

    images: Path
    samples: Path
    train: Path
    heldout: Path
    listing: Path
    encoder: Path


@dataclass(frozen=True)
class _Rows:
    """A store of tokens as features that are read by consecutive rows."""

    tokens: TokenStore

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.tokens), self.tokens.width

    @property
    def ndim(self) -> int:
        return 2

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self.tokens))
        return self.tokens.read(start, stop)


def memorisation(files: Files, out_png: Path, out_json: Path, ranks: Ranks, batch_size: int = 64) -> dict[str, Any]:
    """Compare the images, write picture and numbers, and return the numbers on every process. A collective call.

    Args:
        batch_size: images per call of the encoder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: files that do not belong together, tokens that do not say how they were extracted, an image that
            can't be read, or fewer than two images.
    """
    images, samples = provenance.generated(files.images, files.samples)
    train, heldout = TokenStore.open(files.train), TokenStore.open(files.heldout)
    provenance.extracted_alike(train, heldout)
    inputs = ranks.from_main(
        lambda: provenance.belong_together(
            provenance.tokens(train), provenance.listing(files.listing), provenance.encoder(files.encoder)
        )
    )
    digest = ranks.from_main(lambda: provenance.described(images, files.images, samples, files.samples))
    detector = _detector(files, train, inputs.digests["encoder"], ranks.device)
    part = image_statistics(images, ["bank"], detector, batch_size, ranks, name="memorisation")
    statistics = part.of_all(ranks)

    def compared() -> dict[str, Any]:
        """Compare, draw and write on the main process."""
        assert statistics is not None and isinstance(statistics.bank, np.ndarray)  # on the main process
        others = heldout.read(0, len(heldout))
        pairs = (len(images) + len(others)) * len(train)
        with Progress("memorisation", pairs, "pairs") as progress:
            found = compare(statistics.bank, others, _Rows(train), ranks.device, advance=progress.advance)
        listing = Listing.open(files.listing)
        closest = found.closest(PAIRS)
        draw(out_png, found, images[closest].transpose(0, 3, 1, 2), _training_images(listing, found, images.shape[1]))
        result = _result(found, listing) | {
            "images_digest": digest,
            "train_listing_digest": train.listing_digest,
            "heldout_listing_digest": heldout.listing_digest,
            "encoder_digest": detector.encoder_digest,
        }
        store.write_json(out_json, result)
        return result

    return ranks.from_main(compared)


def _detector(files: Files, train: TokenStore, digest: str, device: torch.device) -> Detector:
    """Return the encoder that made the tokens, with their settings, as a detector."""
    settings = train.attributes.get("settings")
    if not isinstance(settings, dict) or "encoder" not in settings:
        raise ValueError(f"the tokens in '{files.train}' do not say how they were extracted; run extract again")
    section, crop = settings["encoder"], settings.get("extract", {}).get("crop", "image")
    encoder = load_encoder(
        section["family"],
        files.encoder,
        section["input_size"],
        device,
        section.get("precision", "float32"),
        section.get("norm_affine", False),
    )

    def run(images: Tensor) -> Tensor:
        if crop == "encoder":
            pixels = images.permute(0, 2, 3, 1).cpu().numpy()
            images = torch.from_numpy(np.array(crop_generated(pixels, section["input_size"]))).permute(0, 3, 1, 2)
        return encoder(to_float(images, device)).global_token

    name = f"global tokens of the {encoder.family} encoder in {files.encoder}"
    return Detector(name, digest, encoder.hidden_size, False, run, device, digest)


def _training_images(listing: Listing, found: Memorisation, size: int) -> np.ndarray:
    """Return the training images (k, 3, S, S) uint8 nearest to the closest generated ones."""
    chosen = found.nearest[found.closest(PAIRS)].tolist()
    cropped = [center_crop(read_image(listing.path(index)), size) for index in chosen]
    return np.stack([np.asarray(image, np.uint8) for image in cropped]).transpose(0, 3, 1, 2)


def _result(found: Memorisation, listing: Listing) -> dict[str, Any]:
    """Return the numbers as JSON values."""
    sets = {"generated": found.generated, "heldout": found.heldout}
    pairs = [
        {
            "generated": int(index),
            "train": int(found.nearest[index]),
            "path": listing.relative_path(int(found.nearest[index])),
            "distance": float(found.generated[index]),
        }
        for index in found.closest(PAIRS)
    ]
    return {
        "stage": "memorisation",
        "n_generated": len(found.generated),
        "n_heldout": len(found.heldout),
        "n_train": len(listing),
        "closer": found.closer,
        "close": found.close,
        "close_expected": CLOSE,
        "distances": {
            name: {f"{q:g}": float(np.quantile(values, q)) for q in _QUANTILES} for name, values in sets.items()
        },
        "closest_pairs": pairs,
        "warnings": list(found.warnings),
    }


def render(result: dict[str, Any]) -> str:
    """Return the result as text."""
    median = {name: values["0.5"] for name, values in result["distances"].items()}
    lines = [
        f"a generated image is closer to the training images than a held-out one in {result['closer']:.1%} of pairs "
        "(50% are expected)",
        f"{result['close']:.2%} of the generated images are closer than all but the closest "
        f"{result['close_expected']:.0%} of the held-out ones ({result['close_expected']:.0%} are expected)",
        f"median distance from the nearest of {result['n_train']:,} training images: {median['generated']:.4g} of "
        f"{result['n_generated']:,} generated images, {median['heldout']:.4g} of {result['n_heldout']:,} held-out ones",
        *(
            f"image {pair['generated']} is {pair['distance']:.4g} from '{pair['path']}'"
            for pair in result["closest_pairs"][:3]
        ),
    ]
    lines += [f"WARNING: {line}" for line in result["warnings"]]
    return "\n".join(lines) + "\n"
