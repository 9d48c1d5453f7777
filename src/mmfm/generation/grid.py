"""The overview picture of a sample set."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmfm import data
from mmfm.generation.generator import Generator
from mmfm.infra.pictures import image_grid

IMAGES = 32
"""Number of images in the picture."""

_COLUMNS = 4


def draw_grid(generator: Generator, images: np.ndarray, batch_size: int) -> Image.Image:
    """Draw the first images and, in the same arrangement beside them, the decoded source sample of each.

    Args:
        images: (n, S, S, 3) uint8, starting with image number 0.
        batch_size: number of source samples that are decoded at once.
    """
    generated = images[:IMAGES].transpose(0, 3, 1, 2)
    if len(generator.times) == 1:
        return _panels({"Decoded source samples (no flow step)": generated})
    batches = data.ranges(0, len(generated), batch_size)
    source = np.concatenate([generator.source_images(numbers).cpu().numpy() for numbers in batches])
    evaluations = generator.function_evaluations()
    how = generator.solver if evaluations is None else f"{evaluations} evaluations"
    return _panels({f"Generated, {how}": generated, "Their source samples, decoded": source})


def _panels(panels: dict[str, np.ndarray]) -> Image.Image:
    """Place grids of images (n, 3, S, S) uint8 side by side under their titles."""
    grids = {title: image_grid(images, _COLUMNS) for title, images in panels.items()}
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
