"""``mmfm extract``: encode all training images once."""

from pathlib import Path

from mmfm.cli.common import StageParser

DESCRIPTION = """\
Encode every training image once: crop, encoder, and from its output the global token of each image (one row of a zarr
store) and the exact moments of the latents per position.

  mmfm extract --config config/config.yaml --listing listing.train.safetensors \\
      --encoder-weights resources/demo/encoder --out-tokens cls_tokens.zarr --out-moments latent_moments.safetensors

Resumes by shard (extract.shard_size images): killed at any instant, the same command goes on with the first unfinished
shard. Start it with torchrun, or `python -m mmfm.infra.launch --gpus N -- extract ...`, to share the shards among
processes; the result does not depend on their number."""


def main(arguments: list[str]) -> int:
    """Parse, load the encoder, extract."""
    parser = StageParser("extract", DESCRIPTION)
    parser.add_argument("--listing", type=Path, required=True, help="listing of the training images")
    parser.add_argument("--encoder-weights", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--out-tokens", type=Path, required=True, help="token store (output, zarr)")
    parser.add_argument("--out-moments", type=Path, required=True, help="latent moments (output)")
    options, sections = parser.parse(arguments)
    from mmfm.encoders import load_encoder
    from mmfm.extraction import extract
    from mmfm.infra import store
    from mmfm.infra.distributed import process_group

    settings = sections["encoder"]
    digest = store.folder_digest(options.encoder_weights)
    with process_group() as ranks:
        encoder = load_encoder(settings.family, options.encoder_weights, settings.input_size, ranks.device)
        extract(
            options.listing,
            encoder,
            (encoder.hidden_size, *encoder.grid),
            options.out_tokens,
            options.out_moments,
            sections,
            digest,
            ranks,
        )
    return 0
