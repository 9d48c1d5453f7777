"""``mmfm fid``: Frechet distance of generated images."""

from pathlib import Path

from mmfm.cli.parser import StageParser

DESCRIPTION = """\
Measure generated images: mean and covariance of the detector's features over images.npz, and their Frechet distance
from the reference. The text names detector, reference, sampler, guidance, seed, number of images and weights; a number
of the demo's detector says in its first lines that it is no ImageNet FID. The JSON says the same for machines.

  mmfm fid --config config/config.yaml --images images.npz --samples samples.json --reference reference.safetensors \\
      --detector-weights resources/demo/detector/detector.safetensors --out-txt fid.txt --out-json fid.json

The images are memory-mapped, whatever their number. There is nothing to resume: a killed run starts again. Torchrun
shares the images among processes."""


def main(arguments: list[str]) -> int:
    """Parse, measure, write and print the result."""
    parser = StageParser("fid", DESCRIPTION)
    parser.add_argument("--images", type=Path, required=True, help="images.npz from sample")
    parser.add_argument("--samples", type=Path, required=True, help="samples.json from sample")
    parser.add_argument("--reference", type=Path, required=True, help="reference from fid_reference")
    parser.add_argument("--detector-weights", type=Path, help="weights of the detector (default: fid.weights)")
    parser.add_argument("--out-txt", type=Path, required=True, help="result for people (output)")
    parser.add_argument("--out-json", type=Path, required=True, help="result for machines (output)")
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
