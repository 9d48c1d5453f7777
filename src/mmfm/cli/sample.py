"""``mmfm sample``: generate images."""

from pathlib import Path

from mmfm.cli.common import StageParser

DESCRIPTION = """\
Generate images: draw each one's source (standard noise, or a mode of the spatial mixture and noise around it), follow
the trained flow along the time grid, decode. Image i depends on the seed and i only, never on batch, shard or process.
The setting (uncond, gmm, mode) is that of the weights.

  mmfm sample --config config/config.yaml --ema ema.safetensors --decoder decoder.safetensors --stats stats.pt \\
      --encoder-weights resources/demo/encoder --spatial-gmm spatial_gmm.zarr --seed 0 --out-dir samples

Writes images.npz (uint8, n x S x S x 3), grid.png (images beside their decoded sources) and samples.json (what made
them). sample.time_points=1 decodes the sources alone. With --guide the velocity is extrapolated away from a weaker
model's: guide + scale * (model - guide).

Resumes by shard (sample.shard_size images): killed at any instant, the same command makes only the missing shards.
Start it with torchrun, or `python -m mmfm.infra.launch --gpus N -- sample ...`, to share the shards among processes."""


def main(arguments: list[str]) -> int:
    """Parse, load, sample."""
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
    parser.add_argument("--spatial-gmm", type=Path, nargs="?", help="spatial mixture (settings gmm and mode)")
    parser.add_argument("--seed", type=int, help="seed of noise and modes (default: the training's)")
    parser.add_argument("--guide", type=Path, help="weights of the weaker model for autoguidance")
    parser.add_argument("--guidance-scale", type=float, help="default 1.5 with --guide; 1 means no guidance")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder of the outputs")
    options, sections = parser.parse(arguments)
    from mmfm.infra.distributed import process_group
    from mmfm.sampler import SampleFiles, Sampler
    from mmfm.sampling import sample

    files = SampleFiles(
        options.ema, options.decoder, options.stats, options.encoder_weights, options.spatial_gmm, options.guide
    )
    scale = options.guidance_scale if options.guidance_scale is not None else (1.5 if options.guide else 1.0)
    with process_group() as ranks:
        sampler = Sampler(files, sections, options.seed, scale, ranks.device)
        sample(sampler, options.out_dir, sections, ranks)
    return 0
