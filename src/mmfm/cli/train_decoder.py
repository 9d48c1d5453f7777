"""``mmfm train_decoder``: train the decoder from latents to images."""

from pathlib import Path

from mmfm.cli.parser import StageParser

DESCRIPTION = """\
Train a ViT decoder that turns the frozen encoder's latents back into images: noise of a random strength is added to the
latent tokens, and the mean absolute error of the decoded image is lowered (AdamW, cosine learning rate).

  mmfm train_decoder --config config/config.yaml --listing listing.train.safetensors \\
      --encoder-weights resources/demo/encoder --out-dir decoder/

Writes to --out-dir: decoder.safetensors (with settings and provenance inside), history.jsonl, curve.png, and
reconstruction.png (images above their reconstructions).

Killed at any instant, the same command goes on from the newest checkpoint in state-.../ beside the outputs and ends
with the same weights. More decoder.steps continue a finished run; decoder.horizon, where the learning rate reaches 0,
stays as it is. Start it with torchrun, or `python -m mmfm.infra.launch --gpus N -- train_decoder ...`, to share every
batch among processes."""


def main(arguments: list[str]) -> int:
    """Parse, train."""
    parser = StageParser("train_decoder", DESCRIPTION)
    parser.add_argument("--listing", type=Path, required=True, help="listing of the training images")
    parser.add_argument("--encoder-weights", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder of the outputs")
    options, config = parser.parse(arguments)
    from mmfm.infra.distributed import process_group
    from mmfm.stages.train_decoder import train_decoder

    with process_group() as ranks:
        train_decoder(config, options.listing, options.encoder_weights, options.out_dir, ranks)
    return 0
