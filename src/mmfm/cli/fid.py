"""``mmfm fid``: compute the Frechet distance of generated images."""

from pathlib import Path

from mmfm.cli.parser import StageParser

DESCRIPTION = """\
Compute mean and covariance of the detector's features of the generated images, and their Frechet distance from the
reference. The text result names detector, reference, sampler, guidance, seed, number of images and weights, and says so
if the number is from the demo's detector and therefore not an ImageNet FID. The JSON result has the same content.

  mmfm fid --config config/config.yaml --images images.npz --samples samples.json --reference reference.safetensors \\
      --detector-weights resources/demo/detector/detector.safetensors --out-txt fid.txt --out-json fid.json

The images are memory-mapped, so their number is not limited by memory. There is nothing to resume: after an
interruption, start again. torchrun shares the images among processes."""


def main(arguments: list[str]) -> int:
    """Parse the arguments, run the stage, and print the result."""
    parser = StageParser("fid", DESCRIPTION)
    parser.add_argument("--images", type=Path, required=True, help="images.npz, from sample")
    parser.add_argument("--samples", type=Path, required=True, help="samples.json, from sample")
    parser.add_argument("--reference", type=Path, required=True, help="reference, from fid_reference")
    parser.add_argument("--detector-weights", type=Path, help="weights file of the detector (default: fid.weights)")
    parser.add_argument("--out-txt", type=Path, required=True, help="result as text (output)")
    parser.add_argument("--out-json", type=Path, required=True, help="result as JSON (output)")
    options, config = parser.parse(arguments)
    from mmfm.evaluation.detector import load_detector
    from mmfm.infra.distributed import process_group
    from mmfm.stages.fid import fid, render

    with process_group() as ranks:
        detector = load_detector(config.fid.detector, options.detector_weights or config.fid.weights, ranks.device)
        result = fid(
            config, detector, options.images, options.samples, options.reference, options.out_txt, options.out_json,
            ranks,
        )  # fmt: skip
        if ranks.is_main:
            print(render(result), end="")
    return 0
