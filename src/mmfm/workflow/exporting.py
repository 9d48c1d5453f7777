"""Export of a finished target: in the published layout, or as a folder for the hub that :func:`mmfm.open` opens."""

import pickle
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfm.autoencoder.decoder import load_decoder
from mmfm.config import keys_of_kind
from mmfm.config.choices import METRICS
from mmfm.generation.sampler import trained_means
from mmfm.infra import disk, model_folder, store
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.mapped_rows import MappedRows
from mmfm.mixture.spatial import SpatialMixture
from mmfm.models.dit import DiT
from mmfm.models.weights import load_ema, weights_metadata
from mmfm.published.networks import TABLE
from mmfm.workflow import description
from mmfm.workflow.exported import ABOUT, FILES, PUBLISHED
from mmfm.workflow.finished import Finished

LAYOUTS = ("hub", "published")

_CLASSES = 1000
_NO_FLIPS = 2  # published counts include the flips


def export(target: Path, out: Path, layout: str, licence: str) -> list[Path]:
    """Write a finished target into a new folder, and return its files.

    Args:
        target: as for :func:`mmfm.open`.
        layout: ``hub``: safetensors, zarr, configuration, and a model card with a grid of images and the numbers;
            ``published``: a checkpoint, a decoder, statistics and two pickles, as the published code reads them.
        licence: identifier for the model card.

    Raises:
        FileNotFoundError: a file that the target was made from is missing.
        ValueError: the folder exists, the disk is too full, or the target can't be exported in this layout.
    """
    if out.exists():
        raise ValueError(f"'{out}' exists; name a folder that does not")
    found = description.read(target)
    files = found.sample_files()
    parts = {name: path for name, path in asdict(files).items() if path is not None}
    if "spatial_gmm" in parts:
        parts["gmm"] = found.file("gmm")
        if layout == "published" and SpatialMixture.open(parts["spatial_gmm"]).covariance_type != "spherical":
            raise ValueError(
                f"the published layout has one variance per mode, but '{parts['spatial_gmm']}' one per position; "
                "export it with --layout hub"
            )
    disk.require(out / "export", "export", 3 * sum(_size(path) for path in parts.values()), written=0)
    weights = weights_metadata(parts["ema"])
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (_write_hub if layout == "hub" else _write_published)(parts, partial)
    about = {
        "layout": layout,
        "names": {**found.names, "training": "*", "modes": "*"},
        "sample": asdict(found.sample),
        "encoder": keys_of_kind(found.encoder, "identity"),
        "image_size": found.image_size,
        "seed": found.seed,
        "model": weights["model"],
        "guide": weights_metadata(parts["guide"])["model"] if "guide" in parts else None,
        "means_precision": trained_means(weights),
        "modes": Mixture.load(parts["gmm"]).n_components if "gmm" in parts else None,
        "decoder_heads": load_decoder(parts["decoder"]).config.num_heads,
    }
    store.write_json(partial / ABOUT, about)
    processor = files.encoder_weights / "preprocessor_config.json"
    if processor.is_file():
        shutil.copyfile(processor, partial / processor.name)
    else:  # timm's models have it in their config.json
        pixels = model_folder.preprocessing(files.encoder_weights)
        store.write_json(partial / processor.name, {"image_mean": pixels.mean, "image_std": pixels.std})
    result, grid = _result(found), _grid(found)
    if grid is not None:
        shutil.copyfile(grid, partial / "grid.png")
    card = _card(found, weights, result, grid is not None, licence)
    (partial / "README.md").write_text(card)
    store.publish_directory(partial, out)
    return sorted(path for path in out.rglob("*") if path.is_file() and "zarr" not in str(path.relative_to(out)))


def _size(path: Path) -> int:
    return disk.used(path) if path.is_dir() else path.stat().st_size


def _result(found: Finished) -> dict[str, Any] | None:
    """Return the result that was exported; None if the target is not a result."""
    path = found.target.with_suffix(".json")
    return store.read_json(path) if found.target.suffix in (".txt", ".json") and path.is_file() else None


def _grid(found: Finished) -> Path | None:
    """Return the grid of the target's images; None if there is none any more."""
    result = _result(found)
    if result is None:
        beside = found.target / "grid.png"
        return beside if beside.is_file() else None
    wanted = result["samples"]["images_digest"]
    for about in sorted(found.results.glob("sample/*/*/samples.json")):
        if store.read_json(about).get("images_digest") == wanted and about.with_name("grid.png").is_file():
            return about.with_name("grid.png")
    return None


def _write_hub(parts: dict[str, Path], folder: Path) -> None:
    for name, place in FILES.items():
        if name in parts:
            (shutil.copytree if parts[name].is_dir() else shutil.copyfile)(parts[name], folder / place)


def _card(found: Finished, weights: dict[str, Any], result: dict[str, Any] | None, has_grid: bool, licence: str) -> str:
    """Return the model card."""
    head = ["---", f"license: {licence}", "library_name: mmfm", "pipeline_tag: unconditional-image-generation", "tags:"]
    head += ["  - flow-matching", "  - gaussian-mixture", "---", ""]
    title = f"# Flow matching from a Gaussian mixture: {found.names['encoder']}, setting {found.names['setting']}"
    picture = ["![Images generated from one seed, not selected](grid.png)", ""] if has_grid else []
    code = [
        "```python",
        "import mmfm",
        "",
        'model = mmfm.open("this/folder")',
        "images = model.generate(16)",
        "```",
        "",
    ]
    rows = {
        "images": f"{found.image_size} x {found.image_size} pixels",
        "encoder": _encoder(found, weights),
        "step": weights.get("step"),
        "images seen in training": weights.get("images_seen"),
        "weights": f"digest {weights['digest'][:12]}",
    }
    if result is not None:
        rows[result["measure"]] = f"{result['frechet_distance']:.4f}, {result['detector']['name']}"
        rows["images measured"] = f"{result['samples']['n_images']:,}, seed {result['samples']['seed']}"
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value is not None), ""]
    cautions = [f"> {line}\n" for line in _warnings(result)]
    method = "The method: Flow Matching for Multimodal Distributions, Luo et al., CVPR 2026."
    return "\n".join([*head, title, "", *picture, *code, *table, *cautions, method, ""])


def _encoder(found: Finished, weights: dict[str, Any]) -> str:
    """Return the encoder's id on the hub; of a local folder, which means nothing elsewhere, its family and digest."""
    section = found.encoder
    if section.weights.startswith("hf:"):
        return section.weights.removeprefix("hf:")
    digest = weights.get("encoder_digest")
    return f"{section.family}, digest {digest[:12]}" if digest else section.family


def _warnings(result: dict[str, Any] | None) -> list[str]:
    """Return the warnings of a result, without those on other metrics than the distance, which the card lacks."""
    others = tuple(name for name in METRICS if name != "frechet")
    return [line for line in result["warnings"] if not line.startswith(others)] if result else []


def _write_published(parts: dict[str, Path], folder: Path) -> None:
    model = load_ema(parts["ema"])[0]
    modes = Mixture.load(parts["gmm"]).n_components if "gmm" in parts else None
    torch.save({"ema": _with_table(model, modes)}, folder / PUBLISHED["ema"])
    if "guide" in parts:
        torch.save({"ema": _with_table(load_ema(parts["guide"])[0], modes)}, folder / PUBLISHED["guide"])
    torch.save(load_decoder(parts["decoder"]).state_dict(), folder / PUBLISHED["decoder"])
    shutil.copyfile(parts["stats"], folder / PUBLISHED["stats"])
    if modes is None:
        return
    gmm, spatial = Mixture.load(parts["gmm"]), SpatialMixture.open(parts["spatial_gmm"])
    kind = gmm.covariance_type
    settings = {"n_components": gmm.n_components, "covariance_type": kind, "init_params": "k-means++"}
    content = {"model": gmm.to_sklearn(), "labels": np.empty(0, np.int64), "config": settings}
    _pickle({**content, "metrics": {}, "metadata": {}}, folder / PUBLISHED["gmm"])
    _pickle_spatial(spatial, settings, folder / PUBLISHED["spatial_gmm"])


def _with_table(model: DiT, modes: int | None) -> dict[str, torch.Tensor]:
    """Return a state dict with a label table, which the published code loads strictly even where it is not used."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if TABLE not in state:
        width = model.config.hidden_size[0]
        table = torch.randn(modes or _CLASSES, width, generator=torch.Generator().manual_seed(0))
        state[TABLE] = 0.02 * table
    return state


def _pickle(content: Any, path: Path) -> None:
    # In protocol 5, arrays are written without a copy: one of 6 GB needs no other 6 GB.
    with path.open("wb") as file:
        pickle.dump(content, file, protocol=5)


def _pickle_spatial(spatial: SpatialMixture, settings: dict[str, Any], path: Path) -> None:
    """Write a spatial mixture, its means through a temporary file, since they take 6.4 GB at full size."""
    from sklearn.mixture import GaussianMixture

    k, shape = spatial.n_components, tuple(spatial.means.shape[1:])
    scratch = path.with_suffix(".means")
    means = np.memmap(scratch, np.float32, "w+", shape=(k, int(np.prod(shape))))
    MappedRows(spatial.means).copy_to(torch.from_numpy(means).view(k, *shape))
    model = GaussianMixture(k, covariance_type="spherical")
    model.weights_, model.means_ = np.asarray(spatial.weights), np.ndarray(means.shape, means.dtype, buffer=means)
    model.covariances_ = np.asarray(spatial.variances)
    model.precisions_cholesky_ = 1 / np.sqrt(model.covariances_ + 1e-8)
    model.converged_, model.n_iter_, model.lower_bound_ = True, 0, -np.inf
    content = {
        "model": model,
        "means": model.means_,
        "variances": model.covariances_,
        "weights": model.weights_,
        "cluster_counts": _NO_FLIPS * np.asarray(spatial.counts, np.int64),
        "config": {**settings, "covariance_type": "spherical", "flip_augmentation": True},
        "metadata": {"spatial_dim": list(shape)},
    }
    _pickle(content, path)
    scratch.unlink()
