"""``mmfm train``: train the flow-matching model of one setting."""

import sys
from pathlib import Path

from mmfm.cli.parser import StageParser
from mmfm.config.choices import DETECTORS, SETTINGS

DESCRIPTION = """\
Train the velocity model, which transports the source to the data in the encoder's latent space. Settings:

  uncond     source: standard normal noise; the model sees no label
  gmm        source: noise of the image's own mode of the mixture; the model sees no label
  mode       source as in gmm; the model sees the mode
  class      source: standard normal noise; the model sees the image's class (its folder)
  class_gmm  source as in gmm; the model sees the class

  mmfm train --config config/config.yaml --setting mode --listing listing.train.safetensors \\
      --encoder-weights resources/demo/encoder --stats stats.pt --gmm gmm.safetensors \\
      --spatial-gmm spatial_gmm.zarr --decoder resources/demo/decoder/decoder.safetensors --out-dir trained/

writes  ema.safetensors  averaged weights (EMA), for `sample`
        history.jsonl    loss, gradient norm, learning rate, speed
        curve.png        the loss, plotted
        preview.png      generated images, with --decoder

With train.preview.fid_every=N, the Frechet distance of the averaged weights is measured every N steps and at the end
(fid.jsonl, curve.png, progress line). This needs --decoder, --detector, --detector-weights and --fid-reference, and
does not affect training. While the reference is missing, training reports that and continues.

After an interruption, the same command resumes at the newest checkpoint (in state-.../ beside the outputs) and ends
with the same weights. SIGTERM, SIGINT and SIGUSR1 save a checkpoint first. A larger train.epochs continues a finished
run; train.seed=1 starts another one. To share every batch among N processes, use torchrun or `python -m
mmfm.infra.launch --gpus N -- train ...`; batches and random draws do not depend on N. Images are encoded
once, unless latents.cache says otherwise."""


def main(arguments: list[str]) -> int:
    """Parse the arguments and run the stage."""
    parser = StageParser("train", DESCRIPTION)
    parser.add_argument("--setting", choices=SETTINGS, required=True, help="source and label, see above")
    parser.add_argument("--listing", type=Path, required=True, help="listing of the training images, from list_images")
    parser.add_argument("--encoder-weights", type=Path, required=True, help="folder of the encoder")
    parser.add_argument(
        "--stats", type=Path, required=True, help="latent statistics (stats.pt, with stats.json beside it)"
    )
    parser.add_argument(
        "--gmm", type=Path, nargs="?", help="mixture of the global tokens (settings gmm, mode and class_gmm)"
    )
    parser.add_argument(
        "--spatial-gmm", type=Path, nargs="?", help="spatial mixture (settings gmm, mode and class_gmm)"
    )
    parser.add_argument("--decoder", type=Path, help="decoder for previews; if the file is missing, there are none")
    parser.add_argument("--detector", choices=DETECTORS, help="feature network, for train.preview.fid_every")
    parser.add_argument("--detector-weights", type=Path, help="weights file of the detector; must exist from the start")
    parser.add_argument(
        "--fid-reference",
        type=Path,
        help="reference, from fid_reference with that detector; may appear during training",
    )
    parser.add_argument("--out-dir", type=Path, required=True, help="folder of the outputs")
    options, config = parser.parse(arguments)
    every = config.train.preview.fid_every
    measured = (options.detector, options.detector_weights, options.fid_reference)
    if every and None in (options.decoder, *measured):
        raise ValueError(
            f"train.preview.fid_every is {every}: give --decoder, --detector, --detector-weights and --fid-reference, "
            "or set it to 0"
        )
    from mmfm.infra.distributed import process_group
    from mmfm.stages.train import DistanceFiles, TrainFiles, train

    with process_group() as ranks:
        # One process checks for all, because the file may appear while they start.
        decoder = ranks.from_main(lambda: _present(options.decoder, bool(every)))
        files = TrainFiles(
            options.listing, options.encoder_weights, options.stats, options.gmm, options.spatial_gmm, decoder
        )
        distances = DistanceFiles(*measured) if every else None
        train(config, files, options.out_dir, ranks, distances)
    return 0


def _present(decoder: Path | None, measured: bool) -> Path | None:
    """Return the decoder if its file exists; otherwise say what will be missing, and return None."""
    if decoder is None or decoder.exists():
        return decoder
    what = "previews or Frechet distances" if measured else "previews"
    print(f"train: no {what}, because there is no decoder at {decoder} yet", file=sys.stderr)
    return None
