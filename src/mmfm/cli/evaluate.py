"""``mmfm evaluate``: score the images of any system."""

import argparse
from pathlib import Path

from mmfm.config.choices import DETECTORS
from mmfm.infra import store

DESCRIPTION = """\
Score images of any system against a reference: Frechet distance (FID), sFID, Inception Score, precision, recall,
density, coverage and KID, by the definitions of the ADM evaluator where it has them; and decoded images against their
originals: Frechet distance (rFID), PSNR and SSIM. docs/metrics.md defines them all.

  mmfm evaluate samples.npz --reference VIRTUAL_imagenet256_labeled.npz --detector-weights INCEPTION.pth
  mmfm evaluate pictures/ --reference real-pictures/ --metrics frechet kid coverage --detector-weights INCEPTION.pth
  mmfm evaluate decoded/ --reference originals/ --metrics frechet psnr ssim --detector-weights INCEPTION.pth
  mmfm evaluate decoded/ --reference originals/ --metrics psnr ssim
  mmfm evaluate --self-test

SAMPLES is an .npz with arr_0 (n, H, W, 3) uint8 (ADM's, or images.npz from sample), a folder of such files, or a folder
of PNG or JPEG files. Nothing is resized here but by the detector itself.

REF is an .npz for the ADM evaluator (mu and sigma, mu_s and sigma_s, arr_0), the reference.safetensors of
fid_reference, or images like SAMPLES. Moments in the file are used as they are, as in the ADM evaluator; the rest is
computed from its images.

Memory: the metrics precision, recall, density, coverage and kid keep the features of all images, 410 MB for 50,000 of
2048; the others nothing that grows. torchrun shares the images among processes. --self-test compares the metrics with
closed cases, SciPy and torch-fidelity in seconds, without weights."""


def main(arguments: list[str]) -> int:
    """Parse the arguments, score, print the result and write the files that are asked for."""
    parser = argparse.ArgumentParser(
        prog="mmfm evaluate", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", type=Path, nargs="?", help="the images to score")
    parser.add_argument("--reference", type=Path, metavar="REF", help="what to compare them with")
    parser.add_argument(
        "--metrics", nargs="+", default=[], metavar="NAME",
        help="frechet (or fid), sfid, inception_score, precision, recall, density, coverage, kid, psnr, ssim (default: "
        "the first five, as far as detector and reference can serve them)",
    )  # fmt: skip
    parser.add_argument("--detector", default="inception", choices=DETECTORS, help="feature network")
    parser.add_argument("--detector-weights", type=Path, help="its weights file; psnr and ssim alone need none")
    parser.add_argument("--batch-size", type=int, default=64, help="images per detector call (default: 64)")
    parser.add_argument("--out", type=Path, action="append", default=[], help="a .txt or .json to write; repeatable")
    parser.add_argument("--self-test", action="store_true", help="check the metrics themselves, and do nothing else")
    options = parser.parse_args(arguments)
    if options.self_test:
        return _self_test()
    for name, given in (("SAMPLES", options.samples), ("--reference", options.reference)):
        if given is None:
            parser.error(f"give {name}, or --self-test")
    for path in options.out:
        if path.suffix not in (".txt", ".json"):
            raise ValueError(f"--out '{path}' ends in neither .txt nor .json, which say what to write")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}, but must be at least 1")
    from mmfm.evaluation.detector import load_detector
    from mmfm.evaluation.scoring import evaluate, needs_detector, render
    from mmfm.infra.distributed import process_group

    needed = needs_detector(options.metrics)
    if needed and options.detector_weights is None:
        raise ValueError(f"give --detector-weights, the file of the {options.detector} detector; "
                         f"{DETECTORS[options.detector].remedy}")  # fmt: skip
    with process_group() as ranks:
        detector = load_detector(options.detector, options.detector_weights, ranks.device) if needed else None
        result = evaluate(
            options.samples, options.reference, detector, ranks, options.metrics, options.batch_size
        )  # fmt: skip
        if ranks.is_main:
            text = render(result)
            print(text, end="")
            for path in options.out:
                if path.suffix == ".json":
                    store.write_json(path, result)
                else:
                    with store.whole_file(path) as partial:
                        partial.write_text(text, encoding="utf-8")
    return 0


def _self_test() -> int:
    from mmfm.evaluation.self_test import checks, render

    found = list(checks())
    print(render(found), end="")
    return 0 if all(check.passed for check in found) else 1
