"""The stage ``sample``: image sets from trained weights."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmfm import config, data
from mmfm.infra import npz, space, store
from mmfm.infra.distributed import Ranks
from mmfm.infra.progress import Progress
from mmfm.pictures import image_grid, save_picture
from mmfm.sampler import Sampler

VERSION = config.VERSIONS["sample"]

_GRID_IMAGES = 32
_GRID_COLUMNS = 4


def sample(sampler: Sampler, out_dir: str | Path, sections: dict[str, Any], ranks: Ranks) -> None:
    """Generate the images and write ``images.npz``, ``grid.png`` and ``samples.json``; contract in docs/stages.md.

    Shards of consecutive numbers are dealt to the processes in turn, each is one file, and a restarted run makes only
    those that are missing or damaged. An image is a function of its number, so none is made twice or left out.

    Args:
        out_dir: gets the outputs; unfinished shards lie in a state directory inside it.
        sections: built sections ``image``, ``encoder``, ``sample``. One time point is no step of the flow: the images
            are then the decoded sources.
    """
    settings: config.Sample = sections["sample"]
    source_only = settings.time_points == 1
    out_dir = Path(out_dir)
    identity = {
        **config.identity(sections),
        "seed": sampler.seed,
        "guidance_scale": sampler.guidance_scale,
        "precision": sampler.precision,
    }
    state = ranks.from_main(
        lambda: store.state_directory(
            out_dir / "images.npz", "sample", VERSION, identity, sampler.digests, sampler.files
        )
    )
    outputs = {name: out_dir / name for name in ("images.npz", "grid.png", "samples.json")}
    if ranks.from_main(lambda: store.restore(state, outputs)):
        Progress("sample", settings.n_images, "images", done=settings.n_images, enabled=ranks.is_main)
        return
    shards = data.ranges(0, settings.n_images, settings.shard_size)
    shape = _shape(sampler, range(settings.n_images))
    # Every image lies in its shard and, once all are there, in the set.
    ranks.from_main(lambda: space.require(state, "sample", 2 * math.prod(shape)))
    _make_shards(sampler, shards, state, settings, source_only, ranks)
    ranks.from_main(lambda: _publish(sampler, state, outputs, len(shards), source_only))


def _publish(sampler: Sampler, state: Path, outputs: dict[str, Path], n_shards: int, source_only: bool) -> None:
    """Put the shards together, draw the grid, publish both with their description."""
    with store.finishing(state, outputs) as finished:
        images = finished / "images.npz"
        shape = _shape(sampler, range(sampler.settings.n_images))
        digest = npz.write_parts(images, shape, np.uint8, _read_shards(state, n_shards))
        save_picture(draw_grid(sampler, images, source_only), finished / "grid.png")
        store.write_json(finished / "samples.json", describe(sampler, digest, source_only))


def _shape(sampler: Sampler, numbers: range) -> tuple[int, int, int, int]:
    return (len(numbers), sampler.image_size, sampler.image_size, 3)


def _shard_file(state: Path, number: int) -> Path:
    return state / f"shard-{number:05d}.npz"


def _make_shards(
    sampler: Sampler, shards: list[range], state: Path, settings: config.Sample, source_only: bool, ranks: Ranks
) -> None:
    """Write the shards that are missing, each by one process."""

    def is_missing(number: int) -> bool:
        return not npz.is_whole(_shard_file(state, number), _shape(sampler, shards[number]), np.uint8)

    missing = ranks.from_main(lambda: [number for number in range(len(shards)) if is_missing(number)])
    total = settings.n_images
    done = total - sum(len(shards[i]) for i in missing)
    generate = sampler.source_images if source_only else sampler.images
    with Progress("sample", total, "images", done=done, enabled=ranks.is_main) as progress:
        for number in missing[ranks.rank :: ranks.world]:
            block = np.empty(_shape(sampler, shards[number]), np.uint8)
            for batch in data.ranges(shards[number].start, shards[number].stop, settings.batch_size):
                first = batch.start - shards[number].start
                images = generate(batch).permute(0, 2, 3, 1).cpu().numpy()
                block[first : first + len(batch)] = images
                progress.advance(min(len(batch) * ranks.world, total - progress.done))
            npz.write_parts(_shard_file(state, number), block.shape, np.uint8, [block])
    ranks.barrier()


def _read_shards(state: Path, n_shards: int) -> Iterator[np.ndarray]:
    for number in range(n_shards):
        yield npz.map_array(_shard_file(state, number))


def describe(sampler: Sampler, images_digest: str, source_only: bool) -> dict[str, Any]:
    """Return ``samples.json``: everything that determined the images, as JSON values."""
    settings, times = sampler.settings, sampler.times
    return {
        "stage": "sample",
        "version": VERSION,
        "images_digest": images_digest,
        "n_images": settings.n_images,
        "image_size": sampler.image_size,
        "seed": sampler.seed,
        "setting": sampler.weights["setting"],
        "encoder": sampler.weights.get("encoder"),
        "mode_draw": "k ~ mixture weights" if sampler.source.num_modes else None,
        "n_modes": sampler.source.num_modes,
        "source_only": source_only,
        "solver": None if source_only else settings.solver,
        "time_points": settings.time_points,
        "first_time": times[0].item(),
        "last_time": times[0].item() if source_only else times[-1].item(),
        "function_evaluations": 0 if source_only else sampler.function_evaluations(),
        "precision": sampler.precision,
        "device": sampler.device.type,
        "weights": _weights(sampler.weights),
        "guidance": None
        if source_only or sampler.guide_weights is None
        else {"kind": "autoguidance", "scale": sampler.guidance_scale, "guide": _weights(sampler.guide_weights)},
        "inputs": sampler.digests,
    }


def _weights(metadata: dict[str, Any]) -> dict[str, Any]:
    names = ("digest", "step", "epochs", "seed", "images_seen", "model")
    return {name: metadata.get(name) for name in names}


def draw_grid(sampler: Sampler, images: Path, source_only: bool) -> Image.Image:
    """Draw the first images, and beside them what their sources decode to, image for image in the same places."""
    generated = npz.map_array(images)[:_GRID_IMAGES].transpose(0, 3, 1, 2)
    if source_only:
        return _panels({"Decoded source (no step of the flow)": generated})
    source = sampler.source_images(range(len(generated))).cpu().numpy()
    steps = sampler.function_evaluations()
    return _panels({f"Generated, {steps} evaluations": generated, "The source each started from, decoded": source})


def _panels(panels: dict[str, np.ndarray]) -> Image.Image:
    """Lay grids of images (n, 3, S, S) uint8 side by side, each under its title."""
    grids = {title: image_grid(images, _GRID_COLUMNS) for title, images in panels.items()}
    margin, head = 12, 28
    font = ImageFont.load_default(size=15)
    widths = [max(grid.width, int(font.getlength(title))) for title, grid in grids.items()]
    height = head + max(grid.height for grid in grids.values())
    sheet = Image.new("RGB", (sum(widths) + margin * (len(widths) + 1), height + margin), "white")
    pen, left = ImageDraw.Draw(sheet), margin
    for (title, grid), width in zip(grids.items(), widths, strict=True):
        pen.text((left, 5), title, fill="black", font=font)
        sheet.paste(grid, (left, head))
        left += width + margin
    return sheet
