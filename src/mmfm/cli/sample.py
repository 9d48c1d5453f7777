"""``mmfm sample``: generate images."""

import argparse
import sys
from pathlib import Path
from typing import Any

from mmfm.cli.parser import StageParser
from mmfm.config import Sample
from mmfm.config.choices import DETECTORS, SETTINGS

DESCRIPTION = """\
Generate images: draw a source point for each (standard normal noise, or a mode of the spatial mixture plus noise),
integrate the trained flow along the time grid, and decode. Image i depends only on the seed and i, not on batches,
shards or processes. The setting (uncond, gmm, mode, class, class_gmm) is that of the weights.

  mmfm sample --config config/config.yaml --ema ema.safetensors --decoder decoder.safetensors --stats stats.pt \\
      --encoder-weights resources/demo/encoder --spatial-gmm spatial_gmm.zarr --seed 0 --out-dir samples

writes  images.npz            uint8 (n, S, S, 3)
        grid.png              some images beside their decoded sources
        samples.json          everything that determined the images, and how long they took
        features.safetensors  features of the images, which `fid` then uses (with sample.features=true and --detector)

sample.time_points=1 decodes the sources themselves. Guidance: with --guide (autoguidance) the velocity is guide +
scale * (model - guide), with sample.guidance.scale=1.5, say. Without --guide, a scale other than 1 means
classifier-free guidance, for weights trained with label dropout.

After an interruption, the same command generates only the missing shards (sample.shard_size images). To share the
shards among N processes, use torchrun or `python -m mmfm.infra.launch --gpus N -- sample ...`."""


def main(arguments: list[str]) -> int:
    """Parse the arguments and run the stage."""
    parser = StageParser("sample", DESCRIPTION)
    parser.add_argument("--ema", type=Path, required=True, help="weights, from train")
    parser.add_argument("--decoder", type=Path, required=True, help="decoder, from train_decoder or published")
    parser.add_argument("--stats", type=Path, required=True, help="latent statistics, from latent_stats")
    parser.add_argument(
        "--encoder-weights", type=Path, required=True, help="folder of the encoder, for its pixel normalisation"
    )
    parser.add_argument(
        "--spatial-gmm", type=Path, nargs="?", help="spatial mixture (settings gmm, mode and class_gmm)"
    )
    parser.add_argument("--seed", type=int, help="seed of noise and modes (default: seed of the training)")
    parser.add_argument("--guide", type=Path, nargs="?", help="weights of the weaker model for autoguidance")
    parser.add_argument("--setting", choices=SETTINGS, help="expected setting; weights of another one are refused")
    parser.add_argument("--detector", choices=DETECTORS, help="detector whose features are written")
    parser.add_argument(
        "--detector-weights", type=Path, help="weights file of the detector; if it is missing, no features are written"
    )
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
        print("sample: with sample.guidance.scale = 1 the guide has no effect; 1.5 is a usual value", file=sys.stderr)
    remedy = "Lower sample.batch_size, or set sample.means_device to host; the images stay the same"
    with process_group() as ranks, memory.explained(remedy):
        detector = _detector(options, config.sample, ranks.device)
        sample(config, files, options.seed, options.out_dir, ranks, detector)
    return 0


def _detector(options: argparse.Namespace, section: Sample, device: Any) -> Any:
    """Load the detector whose features are wanted; None if they are not, or if its file is missing."""
    if not section.features:
        return None
    if options.detector is None or options.detector_weights is None:
        raise ValueError("sample.features is true: give --detector and --detector-weights, or set it to false")
    if not options.detector_weights.is_file():
        print(f"sample: no features, because there is no detector at {options.detector_weights} yet", file=sys.stderr)
        return None
    from mmfm.evaluation.detector import load_detector

    return load_detector(options.detector, options.detector_weights, device)
