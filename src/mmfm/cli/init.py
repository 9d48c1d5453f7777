"""``mmfm init FOLDER``: look at a folder of images and write a configuration for them."""

import argparse
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from mmfm import config
from mmfm.config.choices import ENCODER_FAMILIES
from mmfm.data import survey as surveys
from mmfm.data.survey import Survey
from mmfm.infra import image_files, model_folder, store
from mmfm.infra.pictures import image_grid, save_picture
from mmfm.workflow import checks, costs, suggestion, this_cpu
from mmfm.workflow.suggestion import EncoderChoice, Images, Machine, Suggestion

DESCRIPTION = """\
Look at a folder of images, say what is in it, and write a configuration for it: values that fit the images, the encoder
and this machine, each with its reason, such that the settings uncond, gmm and mode are compared within about an hour.
Nothing is trained or downloaded. Beside it lies a contact sheet, a picture of some of the images.

  mmfm init ~/photos
  mmfm init ~/photos --encoder ~/models/dinov2-small --size 64 --out photos.yaml

The encoder is the one that you name; else a DINOv2 that is found in the Hugging Face cache or in resources/; else
facebook/dinov2-small, which the first run downloads (88 MB); else, without network, the demo's, which is a toy."""

DEFAULTS = Path("config/config.yaml")
TOY = Path("resources/demo/encoder")
USUAL = "facebook/dinov2-small"

_HUB = "https://huggingface.co"
_PREFERRED = ("small", "base", "large", "giant")


def main(arguments: list[str]) -> int:
    """Look, print, write."""
    parser = argparse.ArgumentParser(
        prog="mmfm init", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the images, best with one subfolder per class")
    parser.add_argument("--encoder", help="a folder in the Hugging Face layout, or `hf:` and a model id")
    parser.add_argument("--size", type=int, help="side of the images in pixels (default: by the images)")
    parser.add_argument("--out", type=Path, default=Path("mine.yaml"), help="the file to write (default mine.yaml)")
    parser.add_argument("--force", action="store_true", help="write it even if it is there already")
    options = parser.parse_args(arguments)
    if options.size is not None:
        suggestion.require_size(options.size)
    if options.out.exists() and not options.force:
        raise ValueError(f"'{options.out}' is there already; give --force to replace it, or another --out")
    if not DEFAULTS.is_file():
        raise ValueError(f"there is no '{DEFAULTS}' here; run it in the folder of the Snakefile")
    _require_writable(options.out)
    defaults, encoder = yaml.safe_load(DEFAULTS.read_text()), choose_encoder(options.encoder)
    found = surveys.survey(options.folder.expanduser())
    print("\n".join(summary(found)))
    if refusal := found.refusal():
        raise ValueError(refusal)
    machine = this_machine(found)
    print(f"  encoder  {encoder.weights}: {encoder.reason}")
    suggested = suggestion.suggest(_images(found), encoder, machine, defaults, options.size)
    if suggested.doubt:
        print(f"  WARNING  images of {options.size} pixels as asked for, but {suggested.doubt}")
    run = re.sub(r"[^a-z0-9_-]+", "-", found.root.resolve().name.lower()).strip("-") or "mine"
    with store.whole_file(options.out) as partial:
        partial.write_text(document(suggested, run, machine, options.out))
    config.load([DEFAULTS, options.out])
    sheet = options.out.with_suffix(".png")
    save_picture(image_grid(surveys.pictures(found)), sheet)
    print(f"\n{options.out}: the suggestion, with reasons; {sheet}: some of the images")
    print(f"\n{_estimate(suggested, machine)}\n\n  {command(run, options.out)}")
    return 0


def _require_writable(out: Path) -> None:
    """Raise ValueError if a file can't be made, before anything is looked at that takes time."""
    folder = next(path for path in out.absolute().parents if path.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"nothing can be written to '{folder}'; make it writable, or give another --out")


def _images(found: Survey) -> Images:
    side = int(np.median(found.shorter)) if len(found.sides) else 0
    root, damaged = str(found.root.resolve()), bool(found.broken or found.lost)
    return Images(root, found.count, len(found.classes), side, found.mean_bytes, damaged)


def summary(found: Survey) -> Iterator[str]:
    """Yield what is in a folder, line by line."""
    classes, sizes = found.classes, sorted(found.classes.values())
    many = f"{len(classes):,} classes of {sizes[0]:,} to {sizes[-1]:,}" if len(classes) > 1 else "one class"
    size = found.mean_bytes * len(found.paths)
    taken = f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} kB"
    yield f"{found.root}: {len(found.paths):,} images in {many}, {taken}"
    yield f"  formats  {', '.join(f'{n:,} {extension}' for extension, n in found.extensions.items()) or 'none'}"
    if len(found.sides):
        low, middle, high = (int(q) for q in np.quantile(found.shorter, (0, 0.5, 1)))
        yield f"  size     shorter side {low:,} to {high:,} pixels, median {middle:,}"
        if found.long:
            yield f"           {found.long:,} more than three times as long as wide: the square crop loses most of them"
        modes = ", ".join(f"{n:,} {mode}" for mode, n in found.modes.most_common())
        transparent = any(mode.endswith("A") for mode in found.modes)
        yield f"  colours  {modes}; all are read as RGB{', transparency over white' if transparent else ''}"
    if found.ignored:
        yield f"  ignored  {image_files.spell(found.ignored)}"
    if found.copies:
        yield f"  copies   {found.copies:,} have the name and the size in bytes of another image"
    yield from _named("broken", found.broken)
    yield from _named("lost", found.lost)
    if found.refusal():
        return
    whole = "all" if found.opened == len(found.paths) else f"{found.opened:,} from all over the folder"
    decoded = "all" if found.decoded + len(found.broken) >= len(found.paths) else f"{found.decoded:,}"
    yield f"  looked   at the headers of {whole}; {decoded} decoded"


def _named(title: str, files: tuple[str, ...], most: int = 3) -> Iterator[str]:
    for i, what in enumerate(files[:most]):
        yield f"  {title if i == 0 else '':<8} {what}"
    if len(files) > most:
        yield f"           and {len(files) - most:,} more"


def this_machine(found: Survey) -> Machine:
    """Return what this machine does; its arithmetic is measured for half a second, a GPU's is assumed."""
    decode = 1 / max(found.seconds, 1e-4)
    cores = len(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        name, rates = torch.cuda.get_device_name(), costs.gpu_rates(costs.card_of("auto")[1])
    else:
        name, rates = f"{cores} core{'' if cores == 1 else 's'}", this_cpu.rates()
    return Machine(name, torch.cuda.is_available(), cores, replace(rates, decode=decode))


def choose_encoder(wanted: str | None) -> EncoderChoice:
    """Return the encoder that is wanted, or the best that is at hand.

    Raises:
        ValueError: it is not an encoder that can be read, or its model can't be looked up.
    """
    if wanted is not None:
        if not wanted.startswith("hf:"):
            return _from_folder(Path(wanted).expanduser(), "as asked for")
        return _from_hub(wanted.removeprefix("hf:"), "as asked for; the first run downloads it")
    if folder := next(iter(sorted(local_encoders(), key=_preference)), None):
        return _from_folder(folder, "found on this machine")
    try:
        return _from_hub(USUAL, "a small DINOv2 (88 MB), which the first run downloads")
    except ValueError:
        return _from_folder(TOY, "a TOY, made for the demo: there is no network and no other; see --encoder")


def local_encoders() -> Iterator[Path]:
    """Yield the folders of DINOv2 models in resources/ and in the Hugging Face cache; the demo's is none of them."""
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub"
    places = [
        Path("resources").glob("**/config.json"),
        Path(hub).expanduser().glob("models--*/snapshots/*/config.json"),
    ]
    for path in (path for place in places for path in place):
        if path.parent.resolve() == TOY.resolve() or not all((path.parent / f).is_file() for f in store.MODEL_FILES):
            continue
        try:
            if json.loads(path.read_text()).get("model_type") in ENCODER_FAMILIES["dinov2"].model_types:
                yield path.parent
        except (OSError, ValueError, AttributeError):
            continue  # a damaged file: no choice of ours


def _preference(folder: Path) -> tuple[int, str]:
    sizes = (i for i, size in enumerate(_PREFERRED) if f"dinov2-{size}" in str(folder) or f"-{size}" in str(folder))
    return next(sizes, len(_PREFERRED)), str(folder)


def _from_folder(folder: Path, reason: str) -> EncoderChoice:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"'{folder}' has no config.json; give a folder in the Hugging Face layout, or `hf:` and an id")
    choice = _described(str(folder), store.read_json(path), f"'{folder}'", reason)
    checks.encoder(
        choice.family, config.Encoder(choice.family, str(folder), choice.patch, "float32", norm_affine=False)
    )
    return choice


def _from_hub(name: str, reason: str) -> EncoderChoice:
    return _described(f"hf:{name}", hub_config(name), f"'{name}'", reason)


def hub_config(name: str) -> dict[str, Any]:
    """Return a model's config.json from the Hugging Face hub, and see that its other files are there.

    Raises:
        ValueError: no network, no such model, or not all files.
    """
    repository, _, revision = name.partition("@")
    place = f"{_HUB}/{repository}/resolve/{revision or 'main'}"
    try:
        with urllib.request.urlopen(f"{place}/{store.MODEL_FILES[0]}", timeout=4) as answer:
            values: dict[str, Any] = json.load(answer)
        for file in store.model_files(store.is_timm(values))[1:]:
            urllib.request.urlopen(urllib.request.Request(f"{place}/{file}", method="HEAD"), timeout=4).close()
        return values
    except (OSError, ValueError) as error:
        raise ValueError(
            f"'hf:{name}' can't be looked up ({error}); check the id and the network, or fetch it elsewhere and give "
            "its folder"
        ) from error


def _described(weights: str, values: Any, what: str, reason: str) -> EncoderChoice:
    values = values if isinstance(values, dict) else {}
    about = model_folder.describe(values, Path(weights) / "model.safetensors")
    other = "timm" if about.library == model_folder.TIMM else "hf"
    family = next((name for name, f in ENCODER_FAMILIES.items() if about.kind in f.model_types), other)
    if about.width is None:
        raise ValueError(
            f"{what} is a model of type '{about.kind}', which can't be an encoder; give a vision transformer"
        )
    patch = about.patch_size(what) or ENCODER_FAMILIES[family].patch
    return EncoderChoice(family, weights, reason, about.width, about.depth or 12, patch)


def command(run: str, out: Path) -> str:
    """Return the command that compares the settings."""
    return f"snakemake results/{run}/comparison.txt --configfile {out}"


def _estimate(suggested: Suggestion, machine: Machine) -> str:
    parts = ", ".join(f"{name} {seconds / 60:.0f}" for name, seconds in suggested.seconds.items() if seconds >= 30)
    return f"About {suggested.minutes} minutes on {machine.name}, an estimate ({parts}):"


def document(suggested: Suggestion, run: str, machine: Machine, out: Path) -> str:
    """Return the text of the configuration."""
    return f"""\
# yaml-language-server: $schema=workflow/schemas/config.schema.json
# For the images in {suggested.value("data.root")}, by `mmfm init`; laid over config/config.yaml.
# Every key: config/README.md. What it costs: mmfm scale --configfile {out} --gpus {int(machine.gpu)}

{f"run: {suggestion.scalar(run)}":<34}  # results/{run}/ keeps this configuration's results apart
{suggestion.as_yaml(suggested.lines)}
# {_estimate(suggested, machine)}
#   {command(run, out)}
"""
