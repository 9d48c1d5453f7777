"""``mmfm fid_reference``: compute the feature moments of real images."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mmfm.cli.parser import StageParser
from mmfm.config import StageConfig
from mmfm.config.choices import DETECTORS

if TYPE_CHECKING:
    from mmfm.infra.distributed import Ranks

DESCRIPTION = """\
Compute what generated images are compared with: mean and covariance of the detector's features, either of the training
images, or imported from an .npz file (fid.reference) such as ADM's VIRTUAL_imagenet256_labeled.npz. If images are held
out, also record the floor, which is their own distance from the reference: no sampler is expected to beat it by much.

  mmfm fid_reference --config config/config.yaml --train-listing listing.train.safetensors \\
      --heldout-listing listing.heldout.safetensors \\
      --detector-weights resources/demo/detector/detector.safetensors --out reference.safetensors

After an interruption, the same command resumes at the first unfinished shard of images. To share the shards among N
processes, use torchrun or `python -m mmfm.infra.launch --gpus N -- fid_reference ...`; the result does not depend on N.

Detectors (fid.detector), and how to get their weights (fid.weights; Snakemake gets Inception's if that is `fetch`):
""" + "\n".join(f"  {name:<10} {kind.remedy}" for name, kind in DETECTORS.items())


def main(arguments: list[str]) -> int:
    """Parse the arguments and run the stage."""
    parser = StageParser("fid_reference", DESCRIPTION)
    parser.add_argument(
        "--train-listing", type=Path, nargs="?", help="listing of the training images (if fid.reference=train)"
    )
    parser.add_argument("--heldout-listing", type=Path, nargs="?", help="listing of the held-out images, for the floor")
    parser.add_argument("--detector-weights", type=Path, help="weights file of the detector (default: fid.weights)")
    parser.add_argument("--reference", help="file with mu and sigma (default: fid.reference)")
    parser.add_argument("--out", type=Path, required=True, help="reference (output)")
    options, config = parser.parse(arguments)
    if options.reference:
        config = config.with_keys(fid={"reference": options.reference})
    from mmfm.evaluation.detector import load_detector
    from mmfm.evaluation.reference import Reference
    from mmfm.infra.distributed import process_group
    from mmfm.stages.fid_reference import fid_reference

    with process_group() as ranks:
        detector = load_detector(config.fid.detector, options.detector_weights or config.fid.weights, ranks.device)
        if ranks.is_main and options.train_listing and (note := _duration(config, options.train_listing, ranks)):
            print(f"fid_reference: {note}", file=sys.stderr)
        fid_reference(config, detector, options.train_listing, options.heldout_listing, options.out, ranks)
        if ranks.is_main:
            about = Reference.open(options.out).about
            floor = "" if about["floor"] is None else f"; distance of the held-out images: {about['floor']:.2f}"
            print(f"fid_reference: {about['source']}, {about['detector']}{floor}")
    return 0


def _duration(config: StageConfig, listing: Path, ranks: "Ranks") -> str:
    """Say how long a slow detector will take on a CPU; empty if it is fast."""
    import torch

    from mmfm.data import Listing

    rate = DETECTORS[config.fid.detector].cpu_rate * torch.get_num_threads() * ranks.world
    if not rate or ranks.device.type != "cpu" or config.fid.reference != "train":
        return ""
    n = len(Listing.open(listing))
    return f"{n:,} images at about {rate:.1f} per second on this CPU: {n / rate / 60:,.0f} minutes"
