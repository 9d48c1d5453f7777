"""Import of mixtures: of the global tokens, and over latents, in the published layout or in this project's own."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from mmfm.autoencoder.rae import load_statistics
from mmfm.infra import disk, store
from mmfm.infra.progress import Progress
from mmfm.mixture.gaussian import Mixture
from mmfm.mixture.spatial import SpatialMixture
from mmfm.published import pickles
from mmfm.published.arrays import StoredArray
from mmfm.published.pickles import Estimator

_BLOCK_BYTES = 16 << 20
_VARIANCE = (0.5, 2.0)
_CENTRE = 0.1


def _estimator(content: Any, path: Path) -> dict[str, Any]:
    """Return the attributes of the mixture in a pickle: under ``model``, or bare."""
    found = content.get("model") if isinstance(content, dict) else content
    if not isinstance(found, Estimator):
        raise ValueError(f"'{path}' holds no mixture of scikit-learn (under `model`, or bare); give another file")
    missing = [name for name in ("weights_", "means_", "covariances_") if name not in found.attributes]
    if missing:
        raise ValueError(f"the mixture in '{path}' was never fitted: it lacks {missing[0]}; give another file")
    return found.attributes


def _array(attributes: dict[str, Any], name: str, path: Path) -> StoredArray:
    array = attributes[name]
    if not isinstance(array, StoredArray) or array.dtype.kind != "f":
        raise ValueError(f"{name} of the mixture in '{path}' is not an array of numbers; give another file")
    return array


def read_mixture(path: Path) -> Mixture:
    """Read a mixture of the global tokens; the labels beside it, in the order of other images, are not used.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or no mixture.
    """
    if path.suffix == ".safetensors":
        return Mixture.load(path)
    attributes = _estimator(pickles.load(path), path)
    weights, means, covariances = (_array(attributes, n, path).load() for n in ("weights_", "means_", "covariances_"))
    weights = weights.astype(np.float64)
    kind = attributes.get("covariance_type")
    if not isinstance(kind, str):
        raise ValueError(f"the mixture in '{path}' does not say of which kind its covariances are; give another file")
    try:
        # Weights in float32 need not sum to 1 in float64.
        return Mixture(weights / weights.sum(), means, covariances, kind)
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from None


def import_mixture(source: Path, out: Path, stats: Path, modes: int) -> str:
    """Write a mixture of the global tokens as ``gmm.safetensors``, and return its digest.

    Args:
        stats: latent statistics; tokens have as many dimensions as latents have channels.
        modes: number of modes K that it must have.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is damaged, no mixture, or one of other modes or tokens.
    """
    mixture, dimension = read_mixture(source), load_statistics(stats)[1].shape[0]
    _require(source, mixture.n_components, modes)
    if mixture.dimension != dimension:
        raise ValueError(
            f"'{source}' is a mixture in {mixture.dimension} dimensions, but the latents of the statistics have "
            f"{dimension} channels; give the mixture of this encoder"
        )
    return mixture.save(out, {"source": {"file": source.name, "sha256": store.file_digest(source)}})


def _require(source: Path, found: int, modes: int) -> None:
    if found != modes:
        raise ValueError(
            f"'{source}' has {found:,} modes, but {modes:,} are wanted; set 'gmm.n_components' to {found}, or give "
            "another mixture"
        )


def import_spatial(source: Path, out: Path, stats: Path, gmm: Path) -> dict[str, float]:
    """Write a spatial mixture as ``spatial_gmm.zarr``, one block of modes in memory at a time.

    Latents divided by the right statistics have variance 1 on average, and mean 0 if the statistics have a mean. The
    mixture must agree, since a file of the published layout does not say which statistics it was made with.

    Args:
        source: a pickle of the published layout, or a store of this project.
        out: the store; it appears when it is complete. A killed import begins anew.
        stats: the latent statistics; they and the mixture of the global tokens are recorded in the store.
        gmm: the mixture of the global tokens, which has the same modes and weights.

    Returns:
        ``variance``, the average over positions of the variance of all modes together, and ``centre``, the mean square
        of their mean.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is damaged, no spatial mixture, of other modes or latents, or made with other statistics.
    """
    tokens = Mixture.load(gmm)
    mean, var = load_statistics(stats)
    digests = {"stats": store.file_digest(stats), "gmm": tokens.metadata["digest"]}
    if source.is_dir():
        return _copy(source, out, tuple(var.shape), tokens, digests)
    content = pickles.load(source)
    means, variances, weights = _checked(content, source, var.numel(), tokens, gmm)
    counts = _counts(content, len(weights))
    disk.require(out.parent / "import", "import", 4 * math.prod(means.shape), written=0)
    partial = out.with_name(f".{out.name}.partial")
    try:
        group = zarr.open_group(partial, mode="w")
        found, row_digests = _write_means(group, means, source, weights, tuple(var.shape))
        found["variance"] += float(weights @ variances)
        _check_statistics(source, found, centred=bool(mean.any()))
    except ValueError:
        shutil.rmtree(partial)
        raise
    for name, values in {"weights": weights, "counts": counts, "variances": variances}.items():
        group.create_array(name, data=values, chunks=values.shape)
    joined = np.frombuffer("".join(row_digests).encode(), np.uint8)
    recorded = {f"{name}_digest": value for name, value in digests.items()}
    recorded["digest"] = store.array_digest(joined, variances, weights, counts)
    group.attrs.update({**recorded, "source": {"file": source.name, "sha256": store.file_digest(source)}})
    store.publish_directory(partial, out)
    return found


def _checked(
    content: Any, source: Path, size: int, tokens: Mixture, gmm: Path
) -> tuple[StoredArray, np.ndarray, np.ndarray]:
    """Return means (K, C H W), variances (K,) and weights (K,), after checking all but the means' values.

    Args:
        size: C H W.
    """
    attributes = _estimator(content, source)
    means, covariances = _array(attributes, "means_", source), _array(attributes, "covariances_", source)
    weights = _array(attributes, "weights_", source).load().astype(np.float64)
    if weights.ndim != 1:
        raise ValueError(f"the weights of the mixture in '{source}' are no list of numbers; give another file")
    k = len(weights)
    _require(source, k, tokens.n_components)
    kind = attributes.get("covariance_type")
    if kind != "spherical":
        raise ValueError(
            f"'{source}' has {kind} covariances, but spatial mixtures have spherical ones; give another file"
        )
    if covariances.shape != (k,) or means.shape != (k, size):
        raise ValueError(
            f"'{source}' is not a spatial mixture of these latents: it has means {list(means.shape)} and covariances "
            f"{list(covariances.shape)}, not {[k, size]} and {[k]}; give the one of this encoder"
        )
    if not np.allclose(weights / weights.sum(), tokens.weights.numpy(), rtol=1e-3, atol=1e-7):
        raise ValueError(f"'{source}' has other weights than '{gmm}', so it is of another fit; give files of one fit")
    # The published sampler takes its deviations from variances in float32.
    variances = covariances.load().astype(np.float32).astype(np.float64)
    if bad := np.flatnonzero(~(np.isfinite(variances) & (variances > 0))).tolist():
        raise ValueError(f"mode {bad[0]} in '{source}' has the variance {variances[bad[0]]:g}; fetch it again")
    return means, variances, weights


def _write_means(
    group: Any, means: StoredArray, source: Path, weights: np.ndarray, shape: tuple[int, ...]
) -> tuple[dict[str, float], list[str]]:
    """Write the means, one chunk per mode; return ``variance`` and ``centre`` of the means, and the rows' digests."""
    rows = group.create_array(
        "means",
        shape=(len(weights), *shape),
        dtype="float32",
        chunks=(1, *shape),
        compressors=None,
        config={"write_empty_chunks": True},  # a mean of zeros must be a file, too
    )
    total, square, row_digests = np.zeros(means.shape[1]), 0.0, []
    for first, block in _blocks(means, source):
        share = weights[first : first + len(block)]
        total += share @ block
        square += float(share @ np.square(block, dtype=np.float64).mean(1))
        for mode, row in enumerate(block.astype(np.float32).reshape(-1, *shape), first):
            rows[mode] = row
            row_digests.append(store.array_digest(row))
    centre = float(np.square(total).mean())
    return {"variance": square - centre, "centre": centre}, row_digests


def _counts(content: Any, k: int) -> np.ndarray:
    """Return the images of each mode, (K,) int64: published counts include the flips; without counts they are 0."""
    stored = content.get("cluster_counts") if isinstance(content, dict) else None
    counted = stored.load() if isinstance(stored, StoredArray) and stored.shape == (k,) else np.zeros(k)
    return (counted // 2).astype(np.int64)


def _blocks(means: StoredArray, source: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number of the first mode and the means, (n, C H W), of one block after the other."""
    k, size = means.shape
    step = max(1, _BLOCK_BYTES // (8 * size))
    with Progress("import", k, "modes") as progress:
        for first in range(0, k, step):
            block = means.rows(first, min(first + step, k))
            if bad := np.flatnonzero(~np.isfinite(block).all(1)).tolist():
                raise ValueError(f"the mean of mode {first + bad[0]} in '{source}' is not finite; fetch it again")
            yield first, block
            progress.advance(len(block))


def _check_statistics(source: Path, found: dict[str, float], centred: bool) -> None:
    """Raise ValueError if latents of a mixture were divided or centred by other statistics."""
    low, high = _VARIANCE
    if not low <= found["variance"] <= high:
        raise ValueError(
            f"'{source}' was made with other latent statistics: its modes together have variance "
            f"{found['variance']:.3g} on average, not 1; give the statistics that it was made with"
        )
    if centred and found["centre"] > _CENTRE:
        raise ValueError(
            f"'{source}' was made with latent statistics without a mean: the mean square of its mean is "
            f"{found['centre']:.3g}, not 0; give those statistics, or set 'latent_stats.mean' to false"
        )


def _copy(
    source: Path, out: Path, shape: tuple[int, ...], tokens: Mixture, digests: dict[str, str]
) -> dict[str, float]:
    """Copy a store of this project, after checking that it fits."""
    spatial = SpatialMixture.open(source)
    _require(source, spatial.n_components, tokens.n_components)
    if tuple(spatial.means.shape[1:]) != shape:
        raise ValueError(f"'{source}' is over latents {list(spatial.means.shape[1:])}, not {list(shape)}; give another")
    for name, digest in digests.items():
        if spatial.attributes.get(f"{name}_digest", digest) != digest:
            raise ValueError(f"'{source}' was made with another file of '{name}'; give files that belong together")
    store.place_linked(source, out)
    return {}
