"""``mmfm adm_reference``: write real images and their moments for other programs."""

import argparse
import sys
from pathlib import Path

DESCRIPTION = """\
Write the reference of your own images as an .npz in the format of the ADM evaluator (guided-diffusion), which other
programs read, too. `mmfm evaluate --reference` and the key fid.reference take it as well.

  mmfm adm_reference --reference reference.safetensors --listing listing.train.safetensors --out reference.npz

writes  mu, sigma       moments of the detector's features of all training images
        mu_s, sigma_s   those of the spatial features, if sfid was in fid.metrics
        arr_0           uint8 (n, S, S, 3): some of the images, evenly spaced, for precision and recall

pytorch-fid reads mu and sigma, guided-diffusion's evaluator.py all five. Both use Inception features, so their numbers
mean something only if fid.detector is inception.

`snakemake results/fid_reference/reference.npz` makes what this needs and runs it (with fid.detector: encoder,
`results/fid_reference/ENCODER/reference.npz`). The generated images need no conversion: images.npz has arr_0."""


def main(arguments: list[str]) -> int:
    """Write the file, and say on standard error what it lacks."""
    parser = argparse.ArgumentParser(
        prog="mmfm adm_reference", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, required=True, help="reference, from fid_reference")
    parser.add_argument("--listing", type=Path, required=True, help="listing of the training images, from list_images")
    parser.add_argument("--images", type=int, default=10_000, help="number of images (default: 10,000, as ADM's)")
    parser.add_argument("--workers", type=int, default=0, help="image-reading processes (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="the .npz (output)")
    options = parser.parse_args(arguments)
    if options.images < 2:
        raise ValueError(f"--images is {options.images}, but must be at least 2")
    if options.out.suffix != ".npz":
        raise ValueError(f"--out '{options.out}' does not end in .npz, by which other programs know the format")
    from mmfm.stages.adm_reference import adm_reference

    for line in adm_reference(options.reference, options.listing, options.images, options.out, options.workers):
        print(f"adm_reference: {line}", file=sys.stderr)
    return 0
