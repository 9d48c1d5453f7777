"""Every stage's command on a few dozen images, made by the commands before it."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zarr
from safetensors.numpy import load_file

from mmfm.config import STAGES
from support import processes
from support.places import DETECTOR
from support.tiny import SECTIONS, write_images, write_listing

N, HELDOUT = 47, 11

SMALL = {
    **SECTIONS,
    "extract": {**SECTIONS["extract"], "batch_size": 3},
    "gmm": {**SECTIONS["gmm"], "n_components": 5, "init": "kmeans", "tol": 0.0, "max_iter": 6, "chunk_size": 7},
    "spatial_gmm": {**SECTIONS["spatial_gmm"], "batch_size": 3},
    "decoder": {**SECTIONS["decoder"], "global_batch": 6, "steps": 7, "checkpoint_every": 2},
    "train": {**SECTIONS["train"], "global_batch": 6, "epochs": 1, "checkpoint_every": 2},
    "sample": {**SECTIONS["sample"], "n_images": 23, "time_points": 3, "batch_size": 3},
    "fid": {"detector": "fashion", "weights": str(DETECTOR), "reference": "train", "batch_size": 3, "workers": 0},
}  # fmt: skip
"""Sizes that divide neither the number of images nor each other."""


_FOLDER = {"--out-dir": "."}
_OUTPUTS = {
    "extract": {"--out-tokens": "cls_tokens.zarr", "--out-moments": "moments.safetensors"},
    "latent_stats": {"--out": "stats.pt", "--out-json": "stats.json"},
    "fit_gmm": _FOLDER,
    "spatial_gmm": {"--out": "spatial_gmm.zarr"},
    "train_decoder": _FOLDER,
    "train": _FOLDER,
    "sample": _FOLDER,
    "fid_reference": {"--out": "reference.safetensors"},
    "fid": {"--out-txt": "fid.txt", "--out-json": "fid.json"},
    "reconstruction": {"--out-txt": "dinov2.txt", "--out-json": "dinov2.json", "--out-png": "dinov2.png"},
    "mode_quality": {"--out-json": "modes.json", "--out-txt": "modes.txt", "--out-png": "modes.png"},
}
_UNITS = {
    "extract": "shard-", "fit_gmm": "iteration-", "spatial_gmm": "component-", "train_decoder": "step-",
    "train": "step-", "sample": "shard-", "fid_reference": "shard-", "reconstruction": "shard-",
}  # fmt: skip
_CONSTANTS = {
    "fid_reference": {"mmfm.stages.fid_reference._SHARD_IMAGES": 8},
    "reconstruction": {"mmfm.stages.reconstruction._SHARD_IMAGES": 8},
}


@dataclass(frozen=True)
class Stage:
    """A stage's command and where its results lie.

    Attributes:
        inputs: arguments that name the inputs.
        outputs: arguments that name the outputs, by file name in the output folder; ``.`` is the folder itself.
        made: folder of the results of an undisturbed run, whose events were watched.
        units: start of the names of the files or folders that are finished units of work.
        constants: module constants of small sizes, see :func:`processes.start`.
    """

    name: str
    inputs: dict[str, Path | str]
    outputs: dict[str, str]
    made: Path
    units: str = ""
    constants: dict[str, object] = field(default_factory=dict)

    def command(self, out: Path, **changes: dict) -> list[str]:
        """Return the arguments of ``mmfm`` that write into ``out``, with keys of single sections changed."""
        sections = {name: {**SMALL[name], **changes.get(name, {})} for name in STAGES[self.name].sections}
        named = {**self.inputs, **{flag: out / name for flag, name in self.outputs.items()}}
        return [self.name, "--settings", json.dumps(sections), *(str(x) for pair in named.items() for x in pair)]

    def finished_units(self, out: Path) -> dict[str, tuple[int, int]]:
        """Return the finished units in a folder's state, with what changes if one is made again."""
        found = (path for path in out.glob(f"state-*/{self.units}*") if self.units)
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}

    def units_made(self, watch: processes.Watch) -> list[str]:
        """Return the units that a watched command finished, in order."""
        places = [Path(words[-1]) for words in watch.events() if words[0] == "os.rename"]
        return [p.name for p in places if p.parent.name.startswith("state-") and p.name.startswith(self.units)]

    def run(self, out: Path, *, world: int = 1, watch: processes.Watch | None = None, **changes: dict) -> str:
        """Run the command to its good end and return its standard error."""
        return processes.run(
            self.command(out, **changes), errors_file(out), world=world, watch=watch, constants=self.constants
        )

    def history(self, out: Path, column: str) -> dict[int, float]:
        """Return a column of a training stage's history by step."""
        lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
        return {line["step"]: line[column] for line in lines}

    def start(
        self, out: Path, *, world: int = 1, watch: processes.Watch | None = None, **changes: dict
    ) -> processes.Command:
        """Start the command."""
        return processes.start(
            self.command(out, **changes), errors_file(out), world=world, watch=watch, constants=self.constants
        )


def errors_file(out: Path) -> Path:
    """Return the place of a command's standard error, beside its output folder; both are made ready."""
    out.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f"{out.name}.errors")
    path.unlink(missing_ok=True)
    return path


def arrays(out: Path) -> dict[str, np.ndarray]:
    """Read every array of every output in a folder, state apart, and the bytes of a reconstruction's."""
    found = {}
    for path in sorted(out.iterdir()):
        if path.suffix == ".zarr":
            group = zarr.open_group(path, mode="r")
            found |= {f"{path.name}/{name}": array[:] for name, array in group.arrays()}
        elif path.suffix == ".safetensors":
            found |= {f"{path.name}/{name}": array for name, array in load_file(path).items()}
        elif path.suffix == ".npz":
            with np.load(path) as archive:
                found |= {f"{path.name}/{name}": archive[name] for name in archive}
        elif path.suffix == ".pt":
            import torch

            found |= {f"{path.name}/{k}": v.numpy() for k, v in torch.load(path, weights_only=True).items()}
        elif path.stem == "dinov2":
            found[path.name] = np.frombuffer(path.read_bytes(), np.uint8)
    return found


def digests(out: Path) -> dict[str, str]:
    """Return the digest of every array in a folder."""
    return {
        name: hashlib.sha256(f"{a.dtype}{a.shape}".encode() + a.tobytes()).hexdigest()
        for name, a in arrays(out).items()
    }


def describe(root: Path, encoder: Path, listing: Path, heldout: Path) -> dict[str, Stage]:
    """Return every stage, each with the inputs that the stages before it make in ``root/STAGE``."""
    images = {"--listing": listing, "--encoder-weights": encoder}
    stats = {"--stats": root / "latent_stats" / "stats.pt"}
    gmm = {"--gmm": root / "fit_gmm" / "gmm.safetensors"}
    spatial = {"--spatial-gmm": root / "spatial_gmm" / "spatial_gmm.zarr"}
    decoder = {"--decoder": root / "train_decoder" / "decoder.safetensors"}
    detector = {"--detector-weights": DETECTOR}
    sources = {
        "extract": images,
        "latent_stats": {"--moments": root / "extract" / "moments.safetensors"},
        "fit_gmm": {"--tokens": root / "extract" / "cls_tokens.zarr"},
        "spatial_gmm": {**images, **stats, **gmm, "--assignment": root / "fit_gmm" / "assignment.safetensors"},
        "train_decoder": images,
        "train": {"--setting": "mode", **images, **stats, **gmm, **spatial},
        "sample": {
            "--ema": root / "train" / "ema.safetensors", "--encoder-weights": encoder, **decoder, **stats, **spatial,
        },
        "fid_reference": {"--train-listing": listing, "--heldout-listing": heldout, **detector},
        "fid": {
            "--images": root / "sample" / "images.npz", "--samples": root / "sample" / "samples.json",
            "--reference": root / "fid_reference" / "reference.safetensors", **detector,
        },
        # Of the training images, so that there are several units.
        "reconstruction": {"--train-listing": listing, "--encoder-weights": encoder, **decoder, **detector},
        "mode_quality": {
            "--images": root / "sample" / "images.npz", "--samples": root / "sample" / "samples.json",
            "--encoder-weights": encoder, **stats, **decoder, **gmm, **spatial,
            "--assignment": root / "fit_gmm" / "assignment.safetensors",
            "--tokens": root / "extract" / "cls_tokens.zarr",
            "--train-listing": listing, "--heldout-listing": heldout,
        },
    }  # fmt: skip
    return {
        name: Stage(name, source, _OUTPUTS[name], root / name, _UNITS.get(name, ""), _CONSTANTS.get(name, {}))
        for name, source in sources.items()
    }


def make(root: Path, encoder: Path) -> dict[str, Stage]:
    """Run every stage once, watched, each on the results of those before it, into ``root/STAGE``; return the stages."""
    listing = write_listing(root / "listing.train.safetensors", write_images(root / "images", N))
    heldout = write_listing(root / "listing.heldout.safetensors", write_images(root / "other", HELDOUT, seed=5))
    stages = describe(root, encoder, listing, heldout)
    for stage in stages.values():
        stage.run(stage.made, watch=processes.Watch(stage.made))
    return stages
