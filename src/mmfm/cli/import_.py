"""``mmfm import``: bring published files, or files in their layout, into this project's."""

import argparse
import json
from pathlib import Path

DESCRIPTION = """\
Write published files as files of this project. Nothing in them runs: pickles are read by a reader that knows mixtures
and arrays only, PyTorch files as tensors and plain values. Files of this project are checked and copied. Snakemake runs
this for keys with the value `published` or a file (gmm.weights, train.weights, ...).

  mmfm import weights mode-gmm-100k.pt --out ema.safetensors --stats stats.pt --expected JSON
  mmfm import decoder model.pt --out decoder.safetensors --stats stats.pt --heads 16 --image-size 256
  mmfm import mixture gmm.pkl --out gmm.safetensors --stats stats.pt --modes 8192
  mmfm import spatial spatial.pkl --out spatial_gmm.zarr --stats stats.pt --gmm gmm.safetensors
  mmfm import tokens cls_tokens.npz --out cls_tokens.zarr   (for fit_gmm alone: their rows are in no known order)
  mmfm import processor dinov2 --out preprocessor_config.json   (the usual normalisation of an encoder family)

--stats gives the shape of the latents: latent statistics as latent_stats writes them."""

KINDS = ("weights", "decoder", "mixture", "spatial", "tokens", "processor")


def main(arguments: list[str]) -> int:
    """Import one file."""
    parser = argparse.ArgumentParser(
        prog="mmfm import", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS, help="what it is")
    parser.add_argument("source", help="the file (for `processor`, the encoder family)")
    parser.add_argument("--out", type=Path, required=True, help="file or folder to write")
    parser.add_argument("--stats", type=Path, help="latent statistics")
    parser.add_argument("--modes", type=int, help="number of modes that the mixture must have")
    parser.add_argument("--gmm", type=Path, help="for `spatial`: the mixture of the global tokens")
    parser.add_argument("--heads", type=int, help="for `decoder`: attention heads")
    parser.add_argument("--image-size", type=int, help="for `decoder`: side of the images, pixels")
    parser.add_argument("--expected", metavar="JSON", help="for `weights`: setting, model, modes, step, encoder")
    options = parser.parse_args(arguments)
    needed = {
        "weights": ("stats", "expected"),
        "decoder": ("stats", "heads", "image_size"),
        "mixture": ("stats", "modes"),
        "spatial": ("stats", "gmm"),
        "tokens": (),
        "processor": (),
    }
    for name in needed[options.kind]:
        if getattr(options, name) is None:
            parser.error(f"{options.kind} needs --{name.replace('_', '-')}")
    try:
        said = _IMPORTS[options.kind](options)
    except ValueError as error:
        raise ValueError(f"{error}{_which(Path(options.source))}") from error
    print(f"import: {said}")
    return 0


def _which(source: Path) -> str:
    """Say by digests which file was refused, and whether it is still the one that was fetched."""
    from mmfm.infra import store
    from mmfm.published.fetching import RECORD

    if not source.is_file():
        return ""
    digest, record = store.file_digest(source), source.with_name(source.name + RECORD)
    wanted = str(store.read_json(record).get("sha256", digest)) if record.is_file() else digest
    changed = "" if wanted == digest else f", but {wanted[:12]} was fetched: delete it and fetch it again"
    return f" (SHA-256 {digest[:12]}{changed})"


def _weights(options: argparse.Namespace) -> str:
    from mmfm import config
    from mmfm.published.networks import Expected, import_weights

    values = json.loads(options.expected)
    values["model"] = config.build(config.Model, values["model"], "model")
    digest = import_weights(Path(options.source), options.out, options.stats, Expected(**values))
    return f"weights of the setting {values['setting']}, digest {digest[:12]}"


def _decoder(options: argparse.Namespace) -> str:
    from mmfm.published.networks import import_decoder

    extra = import_decoder(Path(options.source), options.out, options.stats, options.heads, options.image_size)
    left = f"; {len(extra)} tensors in the file are not the decoder's: {', '.join(extra)}" if extra else ""
    return f"decoder of images of {options.image_size} pixels{left}"


def _tokens(options: argparse.Namespace) -> str:
    from mmfm.published.tokens import import_tokens

    n, width = import_tokens(Path(options.source), options.out)
    return f"{n:,} tokens of {width} dimensions, for fit_gmm alone: their rows are in no known order"


def _processor(options: argparse.Namespace) -> str:
    from mmfm.config.choices import ENCODER_FAMILIES
    from mmfm.infra import store

    family = ENCODER_FAMILIES[options.source]
    store.write_json(options.out, {"image_mean": list(family.image_mean), "image_std": list(family.image_std)})
    return f"the normalisation of the usual {options.source} weights"


def _mixture(options: argparse.Namespace) -> str:
    from mmfm.published.mixtures import import_mixture

    digest = import_mixture(Path(options.source), options.out, options.stats, options.modes)
    return f"mixture of {options.modes:,} modes, digest {digest[:12]}"


def _spatial(options: argparse.Namespace) -> str:
    from mmfm.published.mixtures import import_spatial

    found = import_spatial(Path(options.source), options.out, options.stats, options.gmm)
    said = f"; all modes together have variance {found['variance']:.3f}" if found else ""
    return f"spatial mixture{said}"


_IMPORTS = {
    "weights": _weights,
    "decoder": _decoder,
    "mixture": _mixture,
    "spatial": _spatial,
    "tokens": _tokens,
    "processor": _processor,
}
