"""``mmfm list_images``: list the images in a fixed order, which numbers them for all later stages."""

from pathlib import Path

from mmfm.cli.parser import StageParser

DESCRIPTION = """\
List an image folder (one subfolder per class; a folder without subfolders is one class), hold some images out of
training (data.holdout of them, or all of another folder, data.heldout_root), and write two listings. Row i of a listing
is image number i for all later stages. Only names and sizes are read, so a damaged image is found later and stops the
stage that reads it.

  mmfm list_images --config config/config.yaml --config mine.yaml --train listing.train.safetensors \\
      --heldout listing.heldout.safetensors

Files that are not images by their extension are ignored and counted. With data.unreadable=skip, every image is decoded
here; damaged ones and dangling links are reported and left out of the listings. This reads the whole folder (ImageNet:
140 GB) and takes about 1.1 ms of one core per JPEG of 110 KB: 25 minutes for 1.28 million images, divided by
data.workers.

Snakemake does not watch the folder. After a change, run: snakemake TARGET --cores all -R list_images
If the listing changed, all later stages run again."""


def main(arguments: list[str]) -> int:
    """Parse the arguments and run the stage."""
    parser = StageParser("list_images", DESCRIPTION)
    parser.add_argument("--root", nargs="?", help="image folder (default: data.root)")
    parser.add_argument("--train", type=Path, required=True, help="listing of the training images (output)")
    parser.add_argument("--heldout", type=Path, required=True, help="listing of the held-out images (output)")
    options, config = parser.parse(arguments)
    from mmfm.stages.list_images import list_images

    list_images(config, Path(options.root or config.data.root), options.train, options.heldout)
    return 0
