"""Covariances and shrinkage of the demo's mixture: held-out likelihood, coupling cost and distance, side by side.

python benchmarks/covariances.py --distances 256

Makes the demo's tokens in results/covariances/, and fits every kind of mixture with every number of modes to them. The
coupling cost is that of the spherical spatial mixture, as in `report.json` of spatial_gmm. --distances N also trains
`gmm` on some of the mixtures with N modes, at the demo's budget, one seed each: two to five minutes of a core for each.
Writes benchmarks/results/covariances.json and .md. An interrupted benchmark keeps its measurements and continues.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from mmfm import data
from mmfm.autoencoder.encoders import load_encoder
from mmfm.autoencoder.rae import RAE, load_statistics
from mmfm.config import StageConfig
from mmfm.data.loader import image_batches, to_float
from mmfm.data.moments import Moments
from mmfm.data.tokens import TokenStore
from mmfm.infra import store
from mmfm.infra.distributed import Ranks
from mmfm.mixture.coupling import CouplingCost
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.spatial import union_with_flips
from mmfm.stages import fit_gmm
from mmfm.stages.heldout import heldout
from runs import RESULTS, ROOT, publish

RUN = "covariances"
FOLDER = ROOT / "results" / RUN
ENCODER = "dinov2"
SHRINKAGE = (0, 4, 16, 64, 256)
OTHERS = ("spherical", "tied", "full")
BATCH = 250


def kinds(shrinkage: list[float]) -> dict[str, dict[str, Any]]:
    """Return the keys of `gmm` for every kind of mixture, by the name of its row."""
    found: dict[str, dict[str, Any]] = {
        f"diag, {rows:g} rows" if rows else "diag": {"covariance_type": "diag", "shrinkage": float(rows)}
        for rows in shrinkage
    }
    return found | {name: {"covariance_type": name, "shrinkage": 0.0} for name in OTHERS}


def snakemake(targets: list[str], keys: dict[str, Any], cores: int) -> None:
    """Make targets of the run."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    overlay = FOLDER / "keys.yaml"
    overlay.write_text(yaml.safe_dump({"run": RUN, **keys}))
    line = [sys.executable, "-m", "snakemake", *targets, "--cores", str(cores), "--quiet", "rules"]
    line += ["--rerun-triggers", "params", "input", "mtime", "--configfile", str(overlay)]
    subprocess.run(line, cwd=ROOT, check=True)


def latents() -> Tensor:
    """Return the normalised latents (N, C, H, W) of the training images."""
    listing = FOLDER / "list_images" / "listing.train.safetensors"
    encoder = load_encoder("dinov2", ROOT / "resources" / "demo" / "encoder", 32, "cpu")
    statistics = load_statistics(FOLDER / "latent_stats" / ENCODER / "stats.pt", (encoder.hidden_size, *encoder.grid))
    rae = RAE(encoder, None, *statistics)
    indices = [list(rows) for rows in data.ranges(0, len(data.Listing.open(listing)), BATCH)]
    batches = image_batches(listing, 32, indices)
    return torch.cat([rae.encode(to_float(images, torch.device("cpu"))).latent for _, images in batches])


def coupling_cost(values: Tensor, labels: np.ndarray, weights: np.ndarray) -> float:
    """Return the cost of the coupling by modes with one variance per mode, see mmfm.mixture.coupling.

    Args:
        values: (N, C, H, W).
        labels: (N,), mode of every image.
        weights: (K,).
    """
    counts = np.bincount(labels, minlength=len(weights))
    cost = CouplingCost(weights, counts)
    for mode in np.flatnonzero(counts):
        moments = Moments.zeros(tuple(values.shape[1:]))
        moments.update(values[labels == mode])
        mean, variance = union_with_flips(moments)
        cost.add(int(mode), mean.numpy(), variance, variance)
    return cost.result()["mode_coupled"]


def fit(keys: dict[str, Any], modes: int, tokens: Path, unseen: Path, values: Tensor) -> dict[str, Any]:
    """Fit one mixture; return its likelihoods, its coupling cost, and what the report says."""
    section = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())["gmm"]
    settings = StageConfig.build("fit_gmm", {"gmm": {**section, "n_components": modes, **keys}})
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "gmm"
        report = fit_gmm.fit(settings, TokenStore.open(tokens), out, Ranks(0, 1, torch.device("cpu")))
        (row,) = heldout([out / "gmm.safetensors"], tokens, unseen)
        mixture, others = Mixture.load(out / "gmm.safetensors"), TokenStore.open(unseen)
        each = mixture.log_prob(torch.from_numpy(others.read(0, len(others)))).tolist()
        labels = store.map_arrays(out / "assignment.safetensors")[0]["labels"]
        weights = store.map_arrays(out / "gmm.safetensors")[0]["weights"]
        cost = coupling_cost(values, labels, np.asarray(weights, np.float64))
    return {
        "train": row["train"]["mean"],
        "heldout": row["heldout"]["mean"],
        "heldout_images": each,
        "standard_error": row["heldout"]["standard_error"],
        "bic": report["bic"] / row["train"]["count"],
        "coupling_cost": cost,
        "iterations": report["n_iter"],
        "empty": report["empty_components"],
    }


def distances(keys: dict[str, Any], modes: int, cores: int) -> dict[str, float]:
    """Train `gmm` on one mixture; return the distances of its images and of the decoded source alone."""
    names = {"flow": f"{ENCODER}_gmm.k{modes}.json", "source": f"{ENCODER}_gmm.k{modes}.t1.json"}
    files = {name: f"results/{RUN}/fid/{file}" for name, file in names.items()}
    snakemake(list(files.values()), {"gmm": keys}, cores)
    return {name: json.loads((ROOT / file).read_text())["frechet_distance"] for name, file in files.items()}


def position(label: str) -> tuple[int, int, float]:
    """Return a row's place in the table: by modes, covariance and shrinkage."""
    modes, name = label.split("/")
    covariance, _, rows = name.partition(", ")
    return int(modes), ("diag", *OTHERS).index(covariance), float(rows.split()[0]) if rows else 0.0


def against(row: dict[str, Any], base: dict[str, Any] | None) -> str:
    """Return the mean difference of the held-out images' log-likelihoods, and its standard error."""
    if base is None or base is row:
        return ""
    difference = np.subtract(row["heldout_images"], base["heldout_images"])
    return f"{difference.mean():+.1f} ({difference.std(ddof=1) / len(difference) ** 0.5:.1f})"


def table(found: dict[str, Any]) -> str:
    """Return the measurements as Markdown."""
    lines = [
        "# Covariances and shrinkage on the demo", "",
        f"{found['train_images']:,} training and {found['heldout_images']:,} held-out images; nats per image.", "",
        "| modes | covariances | training | held-out | less diag (+-) | gap | BIC | coupling cost | source | flow |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for label, row in sorted(found["fits"].items(), key=lambda item: position(item[0])):
        modes, name = label.split("/")
        measured = found["distances"].get(label, {})
        far = [f"{measured[each]:.2f}" if each in measured else "" for each in ("source", "flow")]
        numbers = f"{row['train']:.1f} | {row['heldout']:.1f} | {against(row, found['fits'].get(f'{modes}/diag'))} "
        numbers += f"| {row['train'] - row['heldout']:.1f} | {row['bic']:.1f} | {row['coupling_cost']:.3f}"
        lines.append(f"| {modes} | {name} | {numbers} | {' | '.join(far)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", type=int, nargs="+", default=[64, 256, 512], metavar="K")
    parser.add_argument("--shrinkage", type=float, nargs="+", default=list(SHRINKAGE), metavar="ROWS")
    parser.add_argument("--distances", type=int, default=0, metavar="K", help="also train with K modes; 0: don't")
    parser.add_argument("--trained", nargs="+", metavar="NAME", help="rows to train, as in the table; default: all")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    path = options.out / f"{RUN}.json"
    found = json.loads(path.read_text()) if path.exists() else {"fits": {}, "distances": {}}
    rows = kinds(options.shrinkage)
    tokens, unseen = (FOLDER / "cls_tokens" / ENCODER / part / "cls_tokens.zarr" for part in ("", "heldout"))
    stats = f"results/{RUN}/latent_stats/{ENCODER}/stats.pt"
    snakemake([stats, *(str(each.relative_to(ROOT)) for each in (tokens, unseen))], {}, options.cores)
    found |= {"train_images": len(TokenStore.open(tokens)), "heldout_images": len(TokenStore.open(unseen))}
    wanted = [(modes, name) for modes in options.modes for name in rows if f"{modes}/{name}" not in found["fits"]]
    values = latents() if wanted else torch.empty(0)
    for modes, name in wanted:
        found["fits"][f"{modes}/{name}"] = fit(rows[name], modes, tokens, unseen, values)
        publish(RUN, found, table(found), options.out)
    for name in (options.trained or rows) if options.distances else ():
        label = f"{options.distances}/{name}"
        if label not in found["distances"]:
            found["distances"][label] = distances(rows[name], options.distances, options.cores)
            publish(RUN, found, table(found), options.out)
    publish(RUN, found, table(found), options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
