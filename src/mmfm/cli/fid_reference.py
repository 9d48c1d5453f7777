"""``mmfm fid_reference``: feature moments of the real images."""

from pathlib import Path

from mmfm.cli.parser import StageParser

DESCRIPTION = """\
Compute what generated images are compared with: mean and covariance of the detector's features over the training
images, or those in an .npz (fid.reference), such as ADM's VIRTUAL_imagenet256_labeled.npz. With held-out images it also
records the floor: their own distance from the reference, which no sampler is expected to beat by much.

  mmfm fid_reference --config config/config.yaml --train-listing listing.train.safetensors \\
      --heldout-listing listing.heldout.safetensors \\
      --detector-weights resources/demo/detector/detector.safetensors --out reference.safetensors

Resumes by shard of images: killed at any instant, the same command goes on with the first unfinished shard. Start it
with torchrun, or `python -m mmfm.infra.launch --gpus N -- fid_reference ...`, to share the shards among processes; the
result does not depend on their number."""


def main(arguments: list[str]) -> int:
    """Parse, load the detector, compute or import the reference."""
    parser = StageParser("fid_reference", DESCRIPTION)
    parser.add_argument("--train-listing", type=Path, help="listing of the training images (for fid.reference=train)")
    parser.add_argument("--heldout-listing", type=Path, help="listing of the held-out images, for the floor")
    parser.add_argument("--detector-weights", type=Path, help="weights of the detector (default: fid.weights)")
    parser.add_argument("--out", type=Path, required=True, help="reference (output)")
    options, config = parser.parse(arguments)
    from mmfm.evaluation.detector import load_detector
    from mmfm.evaluation.reference import Reference
    from mmfm.infra.distributed import process_group
    from mmfm.stages.fid_reference import fid_reference

    with process_group() as ranks:
        detector = load_detector(config.fid.detector, options.detector_weights or config.fid.weights, ranks.device)
        fid_reference(config, detector, options.train_listing, options.heldout_listing, options.out, ranks)
        if ranks.is_main:
            about = Reference.open(options.out).about
            floor = "" if about["floor"] is None else f"; held-out images are at {about['floor']:.2f}"
            print(f"fid_reference: {about['source']}, {about['detector']}{floor}")
    return 0
