"""``mmfm extract``: encode all training images once."""

from pathlib import Path

from mmfm.cli.parser import StageParser

DESCRIPTION = """\
Run the encoder once over every training image. Keep each image's global token (one row of a zarr store), and the exact
moments of the latents at every position.

  mmfm extract --config config/config.yaml --listing listing.train.safetensors \\
      --encoder-weights resources/demo/encoder --out-tokens cls_tokens.zarr --out-moments latent_moments.safetensors

After an interruption, the same command resumes at the first unfinished shard (extract.shard_size images). To share the
shards among N processes, use torchrun or `python -m mmfm.infra.launch --gpus N -- extract ...`; the result does not
depend on N."""


def main(arguments: list[str]) -> int:
    """Parse the arguments and run the stage."""
    parser = StageParser("extract", DESCRIPTION)
    parser.add_argument("--listing", type=Path, required=True, help="listing of the training images, from list_images")
    parser.add_argument("--encoder-weights", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--out-tokens", type=Path, required=True, help="token store (output, zarr)")
    parser.add_argument("--out-moments", type=Path, required=True, help="latent moments (output)")
    options, config = parser.parse(arguments)
    from mmfm.infra.distributed import process_group
    from mmfm.stages.extract import extract

    with process_group() as ranks:
        extract(config, options.listing, options.encoder_weights, options.out_tokens, options.out_moments, ranks)
    return 0
