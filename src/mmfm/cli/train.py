"""``mmfm train``: train the flow-matching model of one setting."""

import sys
from pathlib import Path

from mmfm.cli.parser import StageParser
from mmfm.config.choices import DETECTORS, SETTINGS

DESCRIPTION = """\
Train the velocity model that carries the source to the data in the encoder's latent space. Settings:

  uncond     the source is standard normal noise, the model sees nothing else
  gmm        every image is coupled to noise from its own mode of the mixture; the model does not see the mode
  mode       the same, and the model sees the mode
  class      the source is standard normal noise, the model sees the image's class (its folder)
  class_gmm  the source is that of gmm, the model sees the class

  mmfm train --config config/config.yaml --setting mode --listing listing.train.safetensors \\
      --encoder-weights resources/demo/encoder --stats stats.pt --gmm gmm.safetensors \\
      --spatial-gmm spatial_gmm.zarr --decoder resources/demo/decoder/decoder.safetensors --out-dir trained/

Writes to --out-dir: ema.safetensors (the averaged weights, which `sample` takes), history.jsonl (loss, gradient norm,
learning rate, speed), curve.png, and with --decoder preview.png. Other seeds: train.seed=1.

With train.preview.fid_every=N the average's Frechet distance is measured every N steps and at the end: into fid.jsonl,
curve.png and the progress line. It takes --decoder, --detector, --detector-weights and --fid-reference, changes no
weight, and waits for nothing: while there is no reference, it says so and training goes on.

Killed at any instant, the same command goes on from the newest checkpoint in state-.../ beside the outputs and ends
with the same weights. SIGTERM, SIGINT and SIGUSR1 save a checkpoint first. More train.epochs continue a finished run.
Start it with torchrun, or `python -m mmfm.infra.launch --gpus N -- train ...`, to share every batch among processes;
the batch and all draws stay the same. Latents are encoded once and kept if they fit into train.latent_cache_gb."""


def main(arguments: list[str]) -> int:
    """Parse, train."""
    parser = StageParser("train", DESCRIPTION)
    parser.add_argument("--setting", choices=SETTINGS, required=True, help="source and condition, see above")
    parser.add_argument("--listing", type=Path, required=True, help="listing of the training images")
    parser.add_argument("--encoder-weights", type=Path, required=True, help="folder of the encoder")
    parser.add_argument(
        "--stats", type=Path, required=True, help="latent statistics (stats.pt, with stats.json beside)"
    )
    parser.add_argument(
        "--gmm", type=Path, nargs="?", help="mixture of the global tokens (settings gmm, mode and class_gmm)"
    )
    parser.add_argument(
        "--spatial-gmm", type=Path, nargs="?", help="spatial mixture (settings gmm, mode and class_gmm)"
    )
    parser.add_argument("--decoder", type=Path, help="decoder for previews; without the file there are none")
    parser.add_argument("--detector", choices=DETECTORS, help="feature network of train.preview.fid_every")
    parser.add_argument("--detector-weights", type=Path, help="its weights; they must be there from the start")
    parser.add_argument(
        "--fid-reference", type=Path, help="reference from fid_reference with that detector; may come during training"
    )
    parser.add_argument("--out-dir", type=Path, required=True, help="folder of the outputs")
    options, config = parser.parse(arguments)
    every = config.train.preview.fid_every
    measured = (options.detector, options.detector_weights, options.fid_reference)
    if every and None in (options.decoder, *measured):
        raise ValueError(
            f"train.preview.fid_every is {every}: give --decoder, --detector, --detector-weights and --fid-reference, "
            "by which distances are measured, or set it to 0"
        )
    from mmfm.infra.distributed import process_group
    from mmfm.stages.train import DistanceFiles, TrainFiles, train

    with process_group() as ranks:
        # All processes must draw and measure, or none: the file may appear while they start.
        decoder = ranks.from_main(lambda: _present(options.decoder, bool(every)))
        files = TrainFiles(
            options.listing, options.encoder_weights, options.stats, options.gmm, options.spatial_gmm, decoder
        )
        distances = DistanceFiles(*measured) if every else None
        train(config, files, options.out_dir, ranks, distances)
    return 0


def _present(decoder: Path | None, measured: bool) -> Path | None:
    """Return the decoder if its file is there; say what there will not be if it is missing."""
    if decoder is None or decoder.exists():
        return decoder
    what = "previews or Frechet distances" if measured else "previews"
    print(f"train: no {what}, as there is no decoder at {decoder} yet", file=sys.stderr)
    return None
