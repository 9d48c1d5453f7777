"""``mmfm sample``: generate images."""

import argparse
import sys
from pathlib import Path
from typing import Any

from mmfm.cli.parser import StageParser
from mmfm.config import Sample
from mmfm.config.choices import DETECTORS, SETTINGS

DESCRIPTION = """\
Generate images: draw each one's source (standard noise, or a mode of the spatial mixture and noise around it), follow
the trained flow along the time grid, decode. Image i depends on the seed and i only, never on batch, shard or process.
The setting (uncond, gmm, mode, class, class_gmm) is that of the weights.

  mmfm sample --config config/config.yaml --ema ema.safetensors --decoder decoder.safetensors --stats stats.pt \\
      --encoder-weights resources/demo/encoder --spatial-gmm spatial_gmm.zarr --seed 0 --out-dir samples

Writes images.npz (uint8, n x S x S x 3), grid.png (images beside their decoded sources) and samples.json (what made
them). sample.time_points=1 decodes the sources alone. With --guide the velocity is extrapolated away from a weaker
model's (autoguidance): guide + scale * (model - guide), for instance with sample.guidance.scale=1.5. Without a guide a
scale other than 1 is that of classifier-free guidance, for weights that were trained with label dropout. With
sample.features=true and --detector features.safetensors is written too, which fid then uses.

Resumes by shard (sample.shard_size images): killed at any instant, the same command makes only the missing shards.
Start it with torchrun, or `python -m mmfm.infra.launch --gpus N -- sample ...`, to share the shards among processes."""


def main(arguments: list[str]) -> int:
    """Parse, sample."""
    parser = StageParser("sample", DESCRIPTION)
    parser.add_argument("--ema", type=Path, required=True, help="weights from train")
    parser.add_argument("--decoder", type=Path, required=True, help="decoder from train_decoder, or the published one")
    parser.add_argument("--stats", type=Path, required=True, help="latent statistics")
    parser.add_argument(
        "--encoder-weights",
        type=Path,
        required=True,
        help="folder of the encoder, for its pixel normalisation",
    )
    parser.add_argument(
        "--spatial-gmm", type=Path, nargs="?", help="spatial mixture (settings gmm, mode and class_gmm)"
    )
    parser.add_argument("--seed", type=int, help="seed of noise and modes (default: the training's)")
    parser.add_argument("--guide", type=Path, nargs="?", help="weights of the weaker model for autoguidance")
    parser.add_argument("--setting", choices=SETTINGS, help="refuse weights of another setting")
    parser.add_argument("--detector", choices=DETECTORS, help="write this detector's features")
    parser.add_argument("--detector-weights", type=Path, help="its weights file; without the file no features")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder of the outputs")
    options, config = parser.parse(arguments)
    from mmfm.generation.sampler import SampleFiles
    from mmfm.infra import memory
    from mmfm.infra.distributed import process_group
    from mmfm.stages.sample import sample

    files = SampleFiles(
        options.ema, options.decoder, options.stats, options.encoder_weights, options.spatial_gmm, options.guide
    )
    if options.guide and config.sample.guidance.scale == 1:
        print("sample: a guide with sample.guidance.scale = 1 changes nothing; 1.5 is usual", file=sys.stderr)
    remedy = "Lower sample.batch_size, or set sample.means_device to host; the images stay the same"
    with process_group() as ranks, memory.explained(remedy):
        detector = _detector(options, config.sample, ranks.device)
        sample(config, files, options.seed, options.out_dir, ranks, detector)
    return 0


def _detector(options: argparse.Namespace, settings: Sample, device: Any) -> Any:
    """Load the detector whose features are asked for; None where they are not, or its file is not there yet."""
    if not settings.features:
        return None
    if options.detector is None or options.detector_weights is None:
        raise ValueError("sample.features is true: give --detector and --detector-weights, or set it to false")
    if not options.detector_weights.is_file():
        print(f"sample: no features, as there is no detector at {options.detector_weights} yet", file=sys.stderr)
        return None
    from mmfm.evaluation.detector import load_detector

    return load_detector(options.detector, options.detector_weights, device)
