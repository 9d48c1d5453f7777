"""``mmfm reconstruction``: measure how closely the decoder reconstructs real images."""

from pathlib import Path

from mmfm.cli.parser import StageParser

DESCRIPTION = """\
Encode real images, decode them again, and compare the two sets. No setting can generate images that are better than
what the decoder makes of real ones, so look at this first if samples are poor.

  mmfm reconstruction --config config/config.yaml --train-listing listing.train.safetensors \\
      --heldout-listing listing.heldout.safetensors --encoder-weights resources/demo/encoder \\
      --decoder decoder.safetensors --detector-weights resources/demo/detector/detector.safetensors \\
      --out-txt dinov2.txt --out-json dinov2.json --out-png dinov2.png

writes  .txt, .json  rFID    Frechet distance of the decoded from the original images (the detector's features)
                     PSNR    error of the pixels, in decibels: 20 is poor, 30 hard to see in a small picture
                     SSIM    similarity of local structure, at most 1
        .png         images above their reconstructions

How to read them: PSNR and SSIM punish a blurred or shifted texture that looks right; rFID asks only whether the set
looks like real images. A poor PSNR with a good rFID means invented details, the opposite means blur.

The images are at most 50,000 of the held-out ones (data.holdout or data.heldout_root), evenly spaced. Without any,
training images are taken, and the text says so: a decoder reconstructs the images that it was trained on better than
others. Published rFIDs are those of the 50,000 validation images of ImageNet.

`snakemake results/reconstruction/dinov2.txt` makes what this needs and runs it. After an interruption, the same command
resumes at the first unfinished shard of images. To share the shards among N processes, use torchrun or
`python -m mmfm.infra.launch --gpus N -- reconstruction ...`; the result does not depend on N."""


def main(arguments: list[str]) -> int:
    """Parse the arguments and run the stage."""
    parser = StageParser("reconstruction", DESCRIPTION)
    parser.add_argument("--train-listing", type=Path, required=True, help="listing of the training images")
    parser.add_argument("--heldout-listing", type=Path, nargs="?", help="listing of the held-out images")
    parser.add_argument("--encoder-weights", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--decoder", type=Path, required=True, help="decoder, from train_decoder or published")
    parser.add_argument("--detector-weights", type=Path, help="weights file of the detector (default: fid.weights)")
    parser.add_argument("--out-txt", type=Path, required=True, help="result as text (output)")
    parser.add_argument("--out-json", type=Path, required=True, help="result as JSON (output)")
    parser.add_argument("--out-png", type=Path, required=True, help="picture of originals and reconstructions (output)")
    options, config = parser.parse(arguments)
    from mmfm.evaluation.detector import load_detector
    from mmfm.infra import memory
    from mmfm.infra.distributed import process_group
    from mmfm.stages.reconstruction import Files, reconstruction

    files = Files(options.train_listing, options.heldout_listing, options.encoder_weights, options.decoder)
    with process_group() as ranks, memory.explained("Lower fid.batch_size, which changes no result"):
        detector = load_detector(config.fid.detector, options.detector_weights or config.fid.weights, ranks.device)
        reconstruction(config, detector, files, options.out_txt, options.out_json, options.out_png, ranks)
        if ranks.is_main:
            print(options.out_txt.read_text(encoding="utf-8"), end="")
    return 0
