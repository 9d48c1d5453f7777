"""``mode_quality``: find the modes whose generated images don't look like the mode's training images, and show them.

Every generated image started from noise of a mode k. The encoder that the mixture was fitted to looks at it as at a
training image, and its token lies in k or elsewhere. :mod:`mmfm.evaluation.mode_quality` says how modes are judged.

Reads: ``images.npz`` (memory-mapped) and ``samples.json``, the encoder, the mixture of the global tokens, the spatial
    mixture (its weights, from which the modes are drawn again as ``sample`` drew them), the training images' tokens,
    and some of these images for the picture; if there are held-out images, their tokens.
Writes: the numbers of all modes (``.json``), a summary (``.txt``), and the worst modes' images (``.png``).
Unit of work: none; there is nothing to resume. The generated images pass through the encoder once, which takes a
    fraction of the time in which ``sample`` made them.
After a kill: no output, or some of the three, each whole.

Processes take batches and blocks of tokens in turn, the same ones whatever their number, so the numbers don't depend on
it. In memory are the mixture (at K = 8192 and 768 dimensions 300 MB), the posteriors of 1,024 tokens (200 MB), the
encoder with a batch, and on the main process 24 bytes an image, 40 MB with ImageNet's training images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmfm import data
from mmfm.autoencoder.encoders import Encoder, load_encoder
from mmfm.config import STAGES, StageConfig
from mmfm.data.tokens import TokenStore
from mmfm.evaluation import contact_sheet, mode_sheet
from mmfm.evaluation.mode_quality import CONFIDENCE, MIN_IMAGES, ModeQuality, Placed, place
from mmfm.generation import conditioning
from mmfm.infra import npz, store, versions
from mmfm.infra.distributed import Ranks
from mmfm.infra.progress import Progress
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.spatial import SpatialMixture
from mmfm.stages import provenance
from mmfm.stages.cached_latents import crop_size

_BLOCK, _ROWS = 4096, 1024  # tokens that a process takes at a time, and in memory with their posteriors

_LISTED = 20
"""Modes in the text."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class ModeQualityFiles:
    """The files that the stage reads: ``heldout`` holds tokens, and is None without held-out images."""

    images: Path
    samples: Path
    encoder_weights: Path
    gmm: Path
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
    samples, inputs = ranks.from_main(lambda: _belonging(files))
    images, mixture = npz.map_array(files.images), Mixture.load(files.gmm, ranks.device)
    modes = conditioning.drawn_modes(samples, torch.as_tensor(SpatialMixture.open(files.spatial_gmm).weights))
    ranks.from_main(lambda: _check_images(images, samples, files))
    generated = _place_images(config, files.encoder_weights, images, mixture, modes, ranks)
    tokens = TokenStore.open(files.tokens)
    training, posteriors = _place_tokens(tokens, mixture, ranks, "training images")
    heldout = None
    if files.heldout is not None:
        heldout, _ = _place_tokens(TokenStore.open(files.heldout), mixture, ranks, "held-out images")

    def publish() -> dict[str, Any]:
        assert generated is not None and training is not None and posteriors is not None  # on the main process
        drawn = modes.numpy()
        quality = ModeQuality.of(mixture.weights.cpu().numpy(), drawn, generated, training, posteriors)
        result = {
            "stage": "mode_quality",
            "version": STAGES["mode_quality"].version,
            "n_images": len(images),
            "n_modes": mixture.n_components,
            "min_images": MIN_IMAGES,
            "confidence": CONFIDENCE,
            **quality.summary(),
            "training": _described(training),
            "heldout": None if heldout is None else _described(heldout),
            "ranking": quality.ranking().tolist(),
            "modes": quality.columns(),
            "samples": samples,
            "inputs": inputs.digests,
            "versions": versions.installed(),
        }
        _draw(out_png, quality, files.listing, tokens, training.nearest, mixture, images, drawn, generated)
        with store.whole_file(out_txt) as partial:
            partial.write_text(render(result), encoding="utf-8")
        store.write_json(out_json, result)
        return result

    return ranks.from_main(publish)


def _belonging(files: ModeQualityFiles) -> tuple[dict[str, Any], provenance.Inputs]:
    """Return ``samples.json`` and the digests of the files, after checking that they belong together."""
    samples = store.read_json(files.samples)
    if not isinstance(samples, dict) or "images_digest" not in samples:
        raise ValueError(f"'{files.samples}' does not describe images; give the samples.json that sample wrote")
    if not samples.get("n_modes"):
        raise ValueError(
            f"the images of '{files.samples}' are of the setting '{samples.get('setting')}', whose Gaussian source has "
            "no modes; give images of gmm, mode or class_gmm"
        )
    made_from = {f"{name}_digest": digest for name, digest in samples.get("inputs", {}).items()}
    described = provenance.Input(
        "images", "set of images", files.samples, samples["images_digest"], "run sample", made_from
    )
    tokens, encoder = provenance.tokens(TokenStore.open(files.tokens)), provenance.encoder(files.encoder_weights)
    inputs = provenance.belong_together(
        described,
        encoder,
        provenance.mixture(files.gmm),
        provenance.spatial_mixture(files.spatial_gmm),
        tokens,
        provenance.listing(files.listing),
    )
    if files.heldout is not None:
        # The mixture was not fitted to them, and their listing is another one.
        heldout = provenance.tokens(TokenStore.open(files.heldout))
        provenance.belong_together(replace(heldout, name="heldout", noun="set of held-out tokens"), encoder)
    return samples, inputs


def _check_images(images: np.ndarray, samples: dict[str, Any], files: ModeQualityFiles) -> None:
    """Raise ValueError unless these are the images that ``samples.json`` describes."""
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(f"'{files.images}' holds {images.dtype} {images.shape}, but images are uint8 (n, S, S, 3)")
    if store.array_digest(images) != samples["images_digest"]:
        raise ValueError(f"'{files.samples}' does not describe the images in '{files.images}'; run sample again")


def _in_blocks(blocks: Sequence[range], ranks: Ranks, make: Callable[[range], Result]) -> list[Result] | None:
    """Make something of every block, shared by the processes; return all in order, on the main process only."""
    parts = ranks.gather_to_main([make(block) for block in blocks[ranks.rank :: ranks.world]])
    if parts is None:
        return None
    return [parts[number % ranks.world][number // ranks.world] for number in range(len(blocks))]


def _joined(parts: Sequence[Placed]) -> Placed:
    return Placed(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _place_images(
    config: StageConfig, encoder_weights: Path, images: np.ndarray, mixture: Mixture, modes: Tensor, ranks: Ranks
) -> Placed | None:
    """Encode the generated images as ``extract`` encodes training images, and find where they lie."""
    section, side = config.encoder, crop_size(config, config.extract.crop)
    encoder = load_encoder(
        section.family, encoder_weights, section.input_size, ranks.device, section.precision, section.norm_affine
    )
    with Progress("mode_quality", len(images), "generated images", enabled=ranks.is_main) as progress:

        def make(batch: range) -> Placed:
            tokens = _encoded(encoder, images[batch.start : batch.stop], side, ranks.device)
            if not tokens.isfinite().all():
                raise ValueError(f"the encoder gives NaN or Inf for an image of {batch}; check its weights")
            placed, _ = place(mixture, tokens, modes[batch.start : batch.stop])
            progress.advance(min(len(batch) * ranks.world, len(images) - progress.done))
            return placed

        parts = _in_blocks(data.ranges(0, len(images), config.extract.batch_size), ranks, make)
        progress.advance(len(images) - progress.done)
    return None if parts is None else _joined(parts)


def _encoded(encoder: Encoder, images: np.ndarray, side: int, device: torch.device) -> Tensor:
    """Return the global tokens (B, C) of images (B, S, S, 3) uint8, cropped to ``side`` as files are."""
    if images.shape[1] != side:
        images = np.stack([np.asarray(data.center_crop(Image.fromarray(image), side)) for image in images])
    return encoder(data.to_float(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2), device)).global_token


def _place_tokens(
    tokens: TokenStore, mixture: Mixture, ranks: Ranks, counted: str
) -> tuple[Placed | None, np.ndarray | None]:
    """Find where real images lie; also return the sums of their posteriors, (K,). None but on the main process."""
    with Progress("mode_quality", len(tokens), counted, enabled=ranks.is_main) as progress:

        def make(block: range) -> tuple[Placed, np.ndarray]:
            parts, posteriors = [], np.zeros(mixture.n_components)
            for rows in torch.from_numpy(tokens.read(block.start, block.stop)).split(_ROWS):
                placed, sums = place(mixture, rows)
                parts.append(placed)
                posteriors += sums
            progress.advance(min(len(block) * ranks.world, len(tokens) - progress.done))
            return _joined(parts), posteriors

        made = _in_blocks(data.ranges(0, len(tokens), _BLOCK), ranks, make)
        progress.advance(len(tokens) - progress.done)
    if made is None:
        return None, None
    return _joined([placed for placed, _ in made]), np.sum([sums for _, sums in made], axis=0)


def _described(placed: Placed) -> dict[str, Any]:
    """Return the means over real images as JSON values."""
    return {
        "n_images": len(placed.nearest),
        "distance": float(placed.distance.mean()),
        "largest_posterior": float(placed.posterior.mean()),
    }


def _draw(
    path: Path,
    quality: ModeQuality,
    listing: Path,
    tokens: TokenStore,
    labels: np.ndarray,
    mixture: Mixture,
    images: np.ndarray,
    modes: np.ndarray,
    generated: Placed,
) -> None:
    """Write the picture of the worst modes."""
    shown, training = [k for group in mode_sheet.chosen(quality).values() for k in group], data.Listing.open(listing)
    each = mode_sheet.COLUMNS
    nearest = contact_sheet.nearest_images(tokens.read, labels, mixture, shown, _BLOCK, each) if shown else {}
    common = {}
    if len(training.classes) > 1:
        for mode in shown:
            counts = np.bincount(training.labels[labels == mode], minlength=len(training.classes))
            common[mode] = f"{counts.max() / counts.sum():.0%} {training.classes[int(counts.argmax())]}"
    mode_sheet.draw(path, quality, training, nearest, common, images, modes, generated.nearest == modes)


def render(result: dict[str, Any]) -> str:
    """Return the result as text: all modes together, then the worst one by one."""
    training, heldout, samples = result["training"], result["heldout"], result["samples"]
    low, high = result["share_limits"]
    distances = f"{result['distance']:.3f} generated, {training['distance']:.3f} training"
    expected = "unknown" if result["expected"] is None else f"{result['expected']:.1%}"
    if heldout is not None:
        distances += f", {heldout['distance']:.3f} held-out"
        expected += f" (held-out images alone say {heldout['largest_posterior']:.1%})"
    rows = {
        "returned": f"{result['returned']:,} of {result['n_images']:,} images lie in the mode that they started from",
        "share": f"{result['share']:.1%} ({low:.1%} to {high:.1%})",
        "perfect flow": expected,
        "chance": f"{result['chance']:.1%}",
        "distance": f"{distances} images (squared, per dimension, from the mode's mean)",
        "poor modes": f"{result['poor_modes']:,} of {result['ranked_modes']:,} with {result['min_images']} images or "
        f"more (a perfect flow: at most {result['poor_by_chance']:.0f})",
        "setting": f"{samples['setting']}, {result['n_modes']:,} modes, {samples['mode_draw']}, seed {samples['seed']}",
        "images digest": f"sha256 {samples['images_digest']}",
    }
    lines = [f"{name:<15}{value}" for name, value in rows.items()]
    if result["ranking"]:
        lines += ["", "the worst modes (see docs/metrics.md#modes)", f"{'mode':>7}{'images':>8}{'returned':>10}"]
        lines[-1] += f"{'share':>8}{'at most':>9}{'expected':>10}{'distance':>10}{'training':>10}"
    of = result["modes"]
    for mode in result["ranking"][:_LISTED]:
        lines.append(
            f"{mode:>7}{of['n_images'][mode]:>8,}{of['returned'][mode]:>10,}{of['share'][mode]:>8.0%}"
            f"{of['share_high'][mode]:>9.0%}{of['expected'][mode]:>10.0%}{of['distance'][mode]:>10.2f}"
            f"{of['training_distance'][mode]:>10.2f}"
        )
    return "\n".join(lines) + "\n"
