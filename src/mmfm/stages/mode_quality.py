"""``mode_quality``: find the modes whose generated images don't look like images of the mode, and show them.

Every generated image started from noise of a mode k. The encoder that the mixture was fitted to looks at it as at a
training image, and its token lies in k or elsewhere. As many real images, encoded and decoded, say what to expect.
:mod:`mmfm.evaluation.mode_quality` says how modes are judged.

Reads: ``images.npz`` (memory-mapped) and ``samples.json``, the encoder, the latent statistics and the decoder, the
    mixture of the global tokens, the spatial mixture (its weights, from which the modes are drawn again as ``sample``
    drew them), the real images: held-out ones, or training images if there are none; for the picture some training
    images, chosen by tokens and assignment.
Writes: the numbers of all modes (``.json``), a summary (``.txt``), and the worst modes' images (``.png``).
Unit of work: none; there is nothing to resume. The images pass through the encoder once, real ones twice and through
    the decoder; that takes a fraction of the time in which ``sample`` made them.
After a kill: no output, or some of the three, each whole.

Processes take batches in turn, the same ones whatever their number, so the numbers don't depend on it. In memory are
encoder and decoder with a batch of ``extract.batch_size``, the mixture (400 MB at K = 8192 and 768 dimensions), the
batch's posteriors, and on the main process 64 bytes an image (50,000 images: 3 MB) and the sums of each batch's
posteriors (50,000 images in batches of 64, K = 8192: 51 MB).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmfm import data
from mmfm.autoencoder.decoder import load_decoder
from mmfm.autoencoder.encoders import configured_encoder
from mmfm.autoencoder.rae import RAE, load_statistics, to_uint8
from mmfm.config import STAGES, StageConfig
from mmfm.data.tokens import TokenStore
from mmfm.evaluation import contact_sheet, mode_sheet
from mmfm.evaluation.mode_quality import CONFIDENCE, MIN_IMAGES, ModeQuality, Placed, Real, log_joint, place, place_real
from mmfm.generation import conditioning
from mmfm.infra import fonts, store, versions
from mmfm.infra.distributed import Ranks
from mmfm.infra.progress import Progress
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.spatial import SpatialMixture
from mmfm.stages import provenance
from mmfm.stages.cached_latents import crop_size

_BLOCK = 4096  # tokens read at a time for the picture

_LISTED = 20
"""Modes in the text."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class ModeQualityFiles:
    """The files that the stage reads; a held-out listing without images counts as none."""

    images: Path
    samples: Path
    encoder_weights: Path
    stats: Path
    decoder: Path
    gmm: Path
    assignment: Path
    spatial_gmm: Path
    listing: Path
    tokens: Path
    heldout: Path | None = None


def mode_quality(
    config: StageConfig, files: ModeQualityFiles, out_json: Path, out_txt: Path, out_png: Path, ranks: Ranks
) -> dict[str, Any]:
    """Judge the modes of generated images, write the results, and return what the JSON holds; on every process.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the images have no modes, the files don't belong together, or one is damaged.
    """
    images, samples = provenance.generated(files.images, files.samples)
    inputs = ranks.from_main(lambda: _belonging(files, samples))
    modes = conditioning.drawn_modes(samples, torch.as_tensor(SpatialMixture.open(files.spatial_gmm).weights))
    ranks.from_main(lambda: provenance.described(images, files.images, samples, files.samples))
    judge = _Judge(config, files, ranks)
    generated = judge.generated(images, modes)
    listing, kind = _real_images(files)
    found = judge.real(listing, min(len(images), len(data.Listing.open(listing))), kind)

    def publish() -> dict[str, Any]:
        """Judge the modes and write everything on the main process."""
        assert generated is not None and found is not None  # on the main process
        (real, posteriors), drawn = found, modes.numpy()
        quality = ModeQuality.of(judge.mixture.weights.cpu().numpy(), drawn, generated, real, posteriors)
        result = {
            "stage": "mode_quality",
            "version": STAGES["mode_quality"].version,
            "n_images": len(images),
            "n_modes": judge.mixture.n_components,
            "min_images": MIN_IMAGES,
            "confidence": CONFIDENCE,
            **quality.summary(),
            "real": {
                "images": kind,
                "n_images": len(real.kept),
                "distance": float(real.original.distance.mean()),
                "decoded_distance": float(real.decoded.distance.mean()),
            },
            "ranking": quality.ranking().tolist(),
            "modes": quality.columns(),
            "samples": samples,
            "inputs": inputs.digests,
            "versions": versions.installed(),
        }
        _draw(out_png, quality, files, judge.mixture, images, drawn, generated)
        with store.whole_file(out_txt) as partial:
            partial.write_text(render(result), encoding="utf-8")
        store.write_json(out_json, result)
        return result

    return ranks.from_main(publish)


def _belonging(files: ModeQualityFiles, samples: dict[str, Any]) -> provenance.Inputs:
    """Return the digests of the files, after checking that they belong together."""
    if not samples.get("n_modes"):
        raise ValueError(
            f"the images of '{files.samples}' are of the setting '{samples.get('setting')}', whose Gaussian source has "
            "no modes; give images of gmm, mode or class_gmm"
        )
    made_from = {f"{name}_digest": digest for name, digest in samples.get("inputs", {}).items()}
    described = provenance.Input(
        "images", "set of images", files.samples, samples["images_digest"], "run sample", made_from
    )
    return provenance.belong_together(
        described,
        provenance.encoder(files.encoder_weights),
        provenance.statistics(files.stats),
        provenance.decoder(files.decoder),
        provenance.mixture(files.gmm),
        provenance.assignment(files.assignment),
        provenance.spatial_mixture(files.spatial_gmm),
        provenance.tokens(TokenStore.open(files.tokens)),
        provenance.listing(files.listing),
    )


def _real_images(files: ModeQualityFiles) -> tuple[Path, str]:
    """Return the listing of the real images to compare with, and what they are."""
    listing, held_out = provenance.real_images(files.listing, files.heldout)
    return listing, "held-out images" if held_out else "training images"


class _Judge:
    """Encoder, decoder and mixture, and where they place images.

    Results are those of all images, on the main process; None on the others.
    """

    def __init__(self, config: StageConfig, files: ModeQualityFiles, ranks: Ranks) -> None:
        self.ranks, self.section = ranks, config.extract
        self.mixture = Mixture.load(files.gmm, ranks.device)
        encoder = configured_encoder(config.encoder, files.encoder_weights, ranks.device)
        statistics = load_statistics(files.stats, (encoder.hidden_size, *encoder.grid))
        self.rae = RAE(encoder, load_decoder(files.decoder).to(ranks.device), *statistics)
        self.rae.require_image_size(config.image.size, files.decoder)
        self.side = crop_size(config, config.extract.crop)

    def generated(self, images: np.ndarray, modes: Tensor) -> Placed | None:
        """Place generated images (n, S, S, 3) uint8, drawn from modes (n,)."""
        batches = data.ranges(0, len(images), self.section.batch_size)
        made = []
        with self.progress(len(images), "generated images") as progress:
            for batch in self.own(batches):
                joint = self.joint(images[batch.start : batch.stop])
                made.append(place(self.mixture, joint, modes[batch.start : batch.stop]))
                self.advance(progress, len(batch))
            parts = self.in_order(made, len(batches))
            progress.advance(len(images) - progress.done)
        return None if parts is None else _joined(parts)

    @torch.no_grad()
    def real(self, listing: Path, n: int, kind: str) -> tuple[Real, np.ndarray] | None:
        """Place ``n`` evenly spaced images of a listing; also return the sums of their posteriors, (K,)."""
        images = data.evenly(len(data.Listing.open(listing)), n).tolist()
        batches = [images[batch.start : batch.stop] for batch in data.ranges(0, n, self.section.batch_size)]
        pin, workers, made = self.ranks.device.type == "cuda", self.section.workers, []
        with self.progress(n, kind) as progress:
            for _, pixels in data.image_batches(listing, self.side, self.own(batches), workers, pin=pin):
                latent, token = self.rae.encode(data.to_float(pixels, self.ranks.device))
                decoded = to_uint8(self.rae.decode(latent)).permute(0, 2, 3, 1).cpu().numpy()
                made.append(place_real(self.mixture, log_joint(self.mixture, token), self.joint(decoded)))
                self.advance(progress, len(pixels))
            parts = self.in_order(made, len(batches))
            progress.advance(n - progress.done)
        if parts is None:
            return None
        before, after, kept = zip(*(real for real, _ in parts), strict=True)
        real = Real(_joined(before), _joined(after), np.concatenate(kept))
        return real, np.sum([sums for _, sums in parts], axis=0)

    @torch.no_grad()
    def joint(self, images: np.ndarray) -> Tensor:
        """Return the log-joints (B, K) of images (B, S, S, 3) uint8, which are cropped as ``extract`` crops files."""
        pixels = torch.from_numpy(np.array(data.crop_generated(images, self.side))).permute(0, 3, 1, 2)
        token = self.rae.encoder(data.to_float(pixels, self.ranks.device)).global_token
        if not token.isfinite().all():
            raise ValueError("the encoder gives NaN or Inf for a generated image; check its weights")
        return log_joint(self.mixture, token)

    def own(self, batches: Sequence[Result]) -> Sequence[Result]:
        """Return the batches of this process."""
        return batches[self.ranks.rank :: self.ranks.world]

    def in_order(self, made: list[Result], number: int) -> list[Result] | None:
        """Return what was made of every batch, in order."""
        parts = self.ranks.gather_to_main(made)
        if parts is None:
            return None
        return [parts[batch % self.ranks.world][batch // self.ranks.world] for batch in range(number)]

    def progress(self, n: int, counted: str) -> Progress:
        return Progress("mode_quality", n, counted, enabled=self.ranks.is_main)

    def advance(self, progress: Progress, n: int) -> None:
        """Count images; the other processes are assumed to be equally fast."""
        progress.advance(min(n * self.ranks.world, progress.total - progress.done))


def _joined(parts: Sequence[Placed]) -> Placed:
    return Placed(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _draw(
    path: Path,
    quality: ModeQuality,
    files: ModeQualityFiles,
    mixture: Mixture,
    images: np.ndarray,
    modes: np.ndarray,
    generated: Placed,
) -> None:
    """Write the picture of the worst modes."""
    shown = [mode for group in mode_sheet.chosen(quality).values() for mode in group]
    training, labels = data.Listing.open(files.listing), provenance.labels(files.assignment)
    read, each = TokenStore.open(files.tokens).read, mode_sheet.COLUMNS
    nearest = contact_sheet.nearest_images(read, labels, mixture, shown, _BLOCK, each) if shown else {}
    common, (names, families) = {}, fonts.drawable(training.classes)
    if len(names) > 1:
        for mode in shown:
            counts = np.bincount(training.labels[labels == mode], minlength=len(names))
            if counts.any():
                common[mode] = f"{counts.max() / counts.sum():.0%} {names[int(counts.argmax())]}"
    mode_sheet.draw(path, quality, training, nearest, common, families, images, modes, generated.nearest == modes)


def render(result: dict[str, Any]) -> str:
    """Return the result as text: all modes together, then the worst one by one."""
    real, samples, (low, high) = result["real"], result["samples"], result["share_limits"]
    rows = {
        "returned": f"{result['returned']:,} of {result['n_images']:,} images lie in the mode that they started from",
        "share": f"{result['share']:.1%} ({low:.1%} to {high:.1%})",
        "expected": f"{result['expected']:.1%} of a perfect flow ({real['n_images']:,} {real['images']}, encoded and "
        "decoded)",
        "chance": f"{result['chance']:.1%}",
        "distance": f"{result['distance']:.3f} generated; {real['images']} {real['distance']:.3f}, encoded and decoded "
        f"{real['decoded_distance']:.3f} (squared, per dimension, from the mode's mean)",
        "poor modes": f"{result['poor_modes']:,} of {result['ranked_modes']:,} with {result['min_images']} images or "
        f"more (if all were as expected: at most {result['poor_by_chance']:.0f})",
        "setting": f"{samples['setting']}, {result['n_modes']:,} modes, {samples['mode_draw']}, seed {samples['seed']}",
        "images digest": f"sha256 {samples['images_digest']}",
    }
    lines = [f"{name:<15}{value}" for name, value in rows.items()]
    if result["ranking"]:
        lines += ["", "The worst modes; 'expected' and 'real' are of the real images of the mode:"]
        lines += [f"{'mode':>7}{'images':>8}{'returned':>10}{'at most':>9}{'expected':>10}{'distance':>10}{'real':>7}"]
    of = result["modes"]
    for mode in result["ranking"][:_LISTED]:
        expected, distance = of["expected"][mode], of["real_distance"][mode]
        lines.append(
            f"{mode:>7}{of['n_images'][mode]:>8,}{of['returned'][mode]:>10,}{of['share_high'][mode]:>9.0%}"
            f"{'-' if expected is None else f'{expected:.0%}':>10}{of['distance'][mode]:>10.2f}"
            f"{'-' if distance is None else f'{distance:.2f}':>7}"
        )
    return "\n".join(lines) + "\n"
