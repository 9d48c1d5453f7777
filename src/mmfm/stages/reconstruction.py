"""``reconstruction``: measure how closely the decoder reconstructs real images: rFID, PSNR and SSIM.

Reads: the listings, the images, the encoder, the decoder and the detector. The held-out images are measured, or without
    any, at most 50,000 training images, evenly spaced in the listing. They are encoded anew: the latent cache has
    training images only, and the originals must be read in any case.
Writes: the result as text (``.txt``) and as JSON (``.json``), with all that is needed to interpret it, and a picture of
    originals and their reconstructions (``.png``).
Unit of work: a shard of consecutive images, whose statistics are ``shard-00003.safetensors`` in the state.
After a kill: whole shards are kept; missing and damaged ones are made again.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfm import data
from mmfm.autoencoder import rae
from mmfm.autoencoder.decoder import load_decoder, read_provenance
from mmfm.autoencoder.encoders import configured_encoder
from mmfm.config import StageConfig
from mmfm.config.keys import keys_of_kind
from mmfm.data.moments import CovarianceMoments
from mmfm.evaluation.collected import Gaussian, Statistics
from mmfm.evaluation.detector import Detector
from mmfm.evaluation.frechet import frechet_distance
from mmfm.evaluation.reconstruction import PAIRED, means
from mmfm.evaluation.scores import PUBLISHED_IMAGES, cautions
from mmfm.infra import store, versions
from mmfm.infra.distributed import Ranks
from mmfm.infra.pictures import paired_grid, save_picture
from mmfm.stages import provenance
from mmfm.stages.runner import Advance, Context, Work, run_units

_SHARD_IMAGES = 500
_MOST_SHARDS = 32
_SHOWN = 16  # images in the picture
_SIDES = ("originals", "decoded")
_TEXT, _JSON, _PICTURE = "reconstruction.txt", "reconstruction.json", "reconstruction.png"


@dataclass(frozen=True)
class Files:
    """What is read besides the detector.

    Attributes:
        train: listing of the training images.
        heldout: listing of the held-out images; None, or an empty one, for the training images.
        encoder: folder of the frozen encoder.
        decoder: its decoder.
    """

    train: Path
    heldout: Path | None
    encoder: Path
    decoder: Path

    @functools.cached_property
    def is_heldout(self) -> bool:
        """Whether there are held-out images."""
        return provenance.real_images(self.train, self.heldout)[1]

    @property
    def listing(self) -> Path:
        """Listing of the images that are measured."""
        return provenance.real_images(self.train, self.heldout)[0]


def reconstruction(
    config: StageConfig, detector: Detector, files: Files, out_txt: Path, out_json: Path, out_png: Path, ranks: Ranks
) -> None:
    """Measure a decoder and write the result.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there are fewer than two images, or files do not belong together.
    """
    n = len(data.Listing.open(files.listing))
    if n < 2:
        raise ValueError(f"'{files.listing}' lists {n} image, a covariance needs at least 2; hold more out")
    inputs = ranks.from_main(
        lambda: provenance.belong_together(
            provenance.listing(files.listing),
            provenance.encoder(files.encoder),
            provenance.decoder(files.decoder),
            provenance.Input("detector", "detector", None, detector.digest),
        )
    )
    outputs = {_TEXT: out_txt, _JSON: out_json, _PICTURE: out_png}
    with Context.open(config, ranks, inputs, outputs) as context:
        _Reconstruction(context, detector, files, data.evenly(n, PUBLISHED_IMAGES)).run()


@dataclass(frozen=True)
class _Shard:
    """Images of the listing, (n,) int64, the file with their statistics, and the places of those in the picture."""

    images: np.ndarray
    file: Path
    shown: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.images)

    def arrays(self) -> Mapping[str, np.ndarray]:
        """Map what was made of the images; see :meth:`_Reconstruction.statistics`.

        Raises:
            FileNotFoundError: it has not been made.
            ValueError: the file is damaged.
        """
        return store.map_arrays(self.file)[0]

    def is_whole(self) -> bool:
        """Whether the statistics exist and are undamaged."""
        try:
            arrays = self.arrays()
            return all(len(arrays[name]) == len(self) for name in PAIRED) and len(arrays["shown"]) == len(_SIDES)
        except (FileNotFoundError, ValueError, KeyError):
            return False

    def moments(self, side: str) -> CovarianceMoments:
        """Read the moments of the features of the originals or of the decoded images."""
        arrays = self.arrays()
        return CovarianceMoments.from_arrays({name: arrays[f"{side}_{name}"] for name in ("count", "mean", "m2")})


class _Reconstruction:
    """The shards of one run."""

    def __init__(self, context: Context, detector: Detector, files: Files, images: np.ndarray) -> None:
        self.context, self.detector, self.files = context, detector, files
        self.section, self.device = context.config.fid, context.ranks.device
        self.n, shown = len(images), data.evenly(len(images), _SHOWN)
        self.shards = []
        for i, rows in enumerate(data.shards(self.n, _SHARD_IMAGES, _MOST_SHARDS)):
            places = tuple(int(row) - rows.start for row in shown if row in rows)
            file = context.state / f"shard-{i:05d}.safetensors"
            self.shards.append(_Shard(images[rows.start : rows.stop], file, places))

    def run(self) -> None:
        """Make the missing shards and publish the result."""
        written = 2 * len(self.shards) * 8 * self.detector.dimension * (self.detector.dimension + 1)
        work = Work(self.shards, self.make, is_done=_Shard.is_whole)
        run_units(self.context, work, publish=self.publish, bytes_written=lambda: written)

    @functools.cached_property
    def autoencoder(self) -> rae.RAE:
        """Encoder and decoder, loaded when the first image is encoded."""
        encoder = configured_encoder(self.context.config.encoder, self.files.encoder, self.device)
        decoder = load_decoder(self.files.decoder, self.device, latent_dim=encoder.hidden_size)
        whole = rae.RAE(encoder, decoder).eval()
        whole.require_image_size(self.context.config.image.size, self.files.decoder)
        return whole

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode and decode images (B, 3, S, S) uint8."""
        latent, _ = self.autoencoder.encoder(data.to_float(images, self.device))
        return rae.to_uint8(self.autoencoder.decode(latent))

    def make(self, shards: list[_Shard], advance: Advance) -> None:
        """Write the statistics of shards; one loader prefetches across them."""
        section, size, pin = self.section, self.context.config.image.size, self.device.type == "cuda"
        indices = [shard.images.tolist() for shard in shards]
        parts = data.batches_of_parts(self.files.listing, size, indices, section.batch_size, section.workers, pin)
        for shard, images in zip(shards, parts, strict=True):
            store.write_arrays(shard.file, self.statistics(shard, images, advance), {"first": int(shard.images[0])})

    def statistics(self, shard: _Shard, images: Iterator[Tensor], advance: Advance) -> dict[str, np.ndarray]:
        """Return the arrays of a shard's file.

        ``originals_*`` and ``decoded_*`` are the moments of their features, ``psnr`` and ``ssim`` (n,) float64 the
        values of its images, ``shown`` (2, m, 3, S, S) uint8 its originals and reconstructions for the picture.
        """
        moments = {side: CovarianceMoments.zeros(self.detector.dimension, self.device) for side in _SIDES}
        values: dict[str, list[Tensor]] = {name: [] for name in PAIRED}
        size, first = self.context.config.image.size, 0
        shown = [torch.empty((2, 0, 3, size, size), dtype=torch.uint8)]
        for batch in images:
            pair = (batch.to(self.device), self.reconstruct(batch))
            for side, part in zip(_SIDES, pair, strict=True):
                moments[side].update(self.detector.features(part))
            for name, metric in PAIRED.items():
                values[name].append(metric(*pair).cpu())
            places = [place - first for place in shard.shown if first <= place < first + len(batch)]
            shown.append(torch.stack([part[places].cpu() for part in pair]))
            first += len(batch)
            advance(len(batch))
        found = {f"{side}_{name}": array for side in _SIDES for name, array in moments[side].to_arrays().items()}
        found |= {name: torch.cat(parts).numpy() for name, parts in values.items()}
        return {**found, "shown": torch.cat(shown, 1).numpy()}

    def publish(self, finished: Path) -> None:
        """Write text, JSON and picture."""
        result = self.result()
        store.write_json(finished / _JSON, result)
        (finished / _TEXT).write_text(render(result), encoding="utf-8")
        above, below = torch.from_numpy(np.concatenate([shard.arrays()["shown"] for shard in self.shards], 1))
        save_picture(paired_grid(above, below), finished / _PICTURE)

    def result(self) -> dict[str, Any]:
        """Return the numbers and how they were measured as JSON values."""
        gaussians = {}
        for side in _SIDES:
            whole = functools.reduce(CovarianceMoments.merge, (shard.moments(side) for shard in self.shards))
            gaussians[side] = Gaussian(whole.mean, whole.covariance())
        config, detector, size = self.context.config, self.detector, self.context.config.image.size
        distance = frechet_distance(*gaussians["decoded"], *gaussians["originals"])
        each = {name: np.concatenate([shard.arrays()[name] for shard in self.shards]) for name in PAIRED}
        metrics, lines = means(each, (size, size))
        seen = self.seen()
        decoded = Statistics(self.n, gaussians["decoded"])
        lines += cautions(
            ["frechet"], decoded, Statistics(), "Keep more images aside (data.holdout, data.heldout_root)."
        )
        digests, identity = self.context.inputs.digests, self.context.identity
        return {
            "stage": "reconstruction",
            "version": self.context.version,
            "measure": _measure_name(detector),
            "frechet_distance": distance,
            "metrics": metrics,
            "warnings": self.warnings(seen) + lines,
            "images": {
                "set": "held-out" if self.files.is_heldout else "training",
                "seen_by_decoder": seen,
                "n_images": self.n,
                "of": len(data.Listing.open(self.files.listing)),
                "image_size": size,
                "listing_digest": digests["listing"],
            },
            "encoder": {**keys_of_kind(config.encoder, "identity"), "digest": digests["encoder"]},
            "decoder": {"digest": digests["decoder"], "steps": read_provenance(self.files.decoder).get("steps")},
            "detector": {"name": detector.name, "digest": detector.digest, "dimension": detector.dimension},
            "configuration_digest": store.fingerprint([identity, digests]),
            "versions": versions.installed(),
        }

    def seen(self) -> bool | None:
        """Return whether the decoder was trained on these images; None if its file does not say on which."""
        known = read_provenance(self.files.decoder).get("digests", {}).get("listing")
        if known != provenance.listing(self.files.train).digest:
            return None
        return not self.files.is_heldout

    def warnings(self, seen: bool | None) -> list[str]:
        """Return what a reader must know of the measurement itself."""
        lines, detector = [], self.detector
        if not self.files.is_heldout:
            lines.append(
                "These are training images, because none are held out, and a decoder reconstructs the images that it "
                "was trained on better than others. Set data.holdout or data.heldout_root."
            )
        elif seen is None:
            lines.append(
                "The decoder's file does not say on which images it was trained; if these were among them, it "
                "reconstructs them better than others."
            )
        if detector.encoder_digest is not None and detector.encoder_digest == self.context.inputs.digests["encoder"]:
            lines.append(
                "The features are those of the encoder whose latents are decoded, which favours it. Name a second "
                "encoder in fid.encoder for a fairer comparison."
            )
        if not detector.standard:
            lines.append(
                "The distance is NOT an rFID of Inception features and can't be compared with published ones. Compare "
                "it only with numbers for the same detector and images. PSNR and SSIM need no detector."
            )
        return lines


def _measure_name(detector: Detector) -> str:
    if detector.encoder_digest is not None:
        return "Frechet distance of encoder tokens of decoded and original images (not an rFID)"
    return "rFID" if detector.standard else "Frechet distance of decoded and original images (not an rFID)"


def render(result: dict[str, Any]) -> str:
    """Return the result of the stage as text."""
    images, decoder, encoder = result["images"], result["decoder"], dict(result["encoder"])
    digest, n, size = encoder.pop("digest"), images["n_images"], images["image_size"]
    of = "" if n == images["of"] else f", evenly spaced among {images['of']:,}"
    seen = {
        True: "on which the decoder was trained",
        False: "on which the decoder was not trained",
        None: "of which the decoder's file does not say whether it was trained on them",
    }[images["seen_by_decoder"]]
    steps = "" if decoder["steps"] is None else f", {decoder['steps']:,} steps"
    rows = {
        "PSNR in dB": f"{result['metrics']['psnr']:.4f}",
        "SSIM": f"{result['metrics']['ssim']:.4f}",
        "images": f"{n:,} {images['set']} images of {size} x {size} pixels{of}, {seen}",
        "encoder": ", ".join(f"{name} {value}" for name, value in encoder.items()),
        "decoder": f"sha256 {decoder['digest']}{steps}",
        "encoder digest": f"sha256 {digest}",
        "detector weights": f"sha256 {result['detector']['digest']}",
        "listing digest": f"sha256 {images['listing_digest']}",
        "configuration": f"digest {result['configuration_digest']}",
        "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    }
    lines = [f"{result['measure']}: {result['frechet_distance']:.4f}", f"detector: {result['detector']['name']}"]
    lines += [f"WARNING: {warning}" for warning in result["warnings"]]
    width = max(map(len, rows)) + 2
    return "\n".join([*lines, "", *(f"{name:<{width}}{value}" for name, value in rows.items())]) + "\n"
