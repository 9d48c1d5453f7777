"""``mmfm train_decoder``: train the decoder that turns latents into images."""

from pathlib import Path

from mmfm.cli.parser import StageParser

DESCRIPTION = """\
Train a ViT decoder that turns the frozen encoder's latents back into images. Noise of a random strength is added to the
latent tokens, and the mean absolute error of the decoded images is minimised (AdamW, cosine learning rate).

  mmfm train_decoder --config config/config.yaml --listing listing.train.safetensors \\
      --encoder-weights resources/demo/encoder --out-dir decoder/

writes  decoder.safetensors  weights, with their configuration and provenance
        history.jsonl        loss, learning rate, speed
        curve.png            the loss, plotted
        reconstruction.png   images above their reconstructions

After an interruption, the same command resumes at the newest checkpoint (in state-.../ beside the outputs) and ends
with the same weights. A larger decoder.steps continues a finished run; the step at which the learning rate reaches 0
stays decoder.horizon. To share every batch among N processes, use torchrun or `python -m mmfm.infra.launch --gpus N --
train_decoder ...`."""


def main(arguments: list[str]) -> int:
    """Parse the arguments and run the stage."""
    parser = StageParser("train_decoder", DESCRIPTION)
    parser.add_argument("--listing", type=Path, required=True, help="listing of the training images, from list_images")
    parser.add_argument("--encoder-weights", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder of the outputs")
    options, config = parser.parse(arguments)
    from mmfm.infra.distributed import process_group
    from mmfm.stages.train_decoder import train_decoder

    with process_group() as ranks:
        train_decoder(config, options.listing, options.encoder_weights, options.out_dir, ranks)
    return 0
