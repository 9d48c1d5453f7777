"""Internal cluster validity indices: how well a hard assignment separates the tokens, without class labels.

The indices are based on mean distances, which follow from moments: if a cluster has mean m and mean squared distance T
from m, the mean squared distance of a point x from the points of the cluster is |x - m|^2 + T. Two passes over the
tokens therefore give exact results in the memory of the means, for any N and K. The functions of scikit-learn hold all
tokens in memory and compare all pairs.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from mmfm.infra import rng
from mmfm.infra.distributed import Ranks
from mmfm.mixture.moments import row_adder

SILHOUETTE_IMAGES = 20_000
"""Number of images whose silhouette is computed; each is compared with the images of all components."""

_PIECE = 1 << 22  # elements of a float64 copy of tokens
_ROWS = 512  # rows multiplied with all K means at a time


class Clusters:
    """Moments of the images assigned to each component.

    Attributes:
        counts: (K,) int64, number of images.
        means: (K, C) float64; the reference point if a component has no images.
        spreads: (K,) float64, mean squared distance of the images from their mean.
    """

    def __init__(self, counts: Tensor, means: Tensor, spreads: Tensor) -> None:
        self.counts, self.means, self.spreads = counts, means, spreads

    @classmethod
    def collect(
        cls, rows: Iterable[tuple[range, Tensor]], labels: np.ndarray, references: Tensor, ranks: Ranks
    ) -> "Clusters":
        """Compute the moments in a pass over all tokens. A collective call.

        Args:
            rows: this process's chunks, each as global indices and tokens (b, C) float32.
            labels: (N,), component of every image.
            references: (K, C) float64, points near the means; deviations are taken from them so that nothing cancels.
        """
        k = len(references)
        counts = torch.as_tensor(np.bincount(labels, minlength=k), device=references.device)
        first, second = torch.zeros_like(references), references.new_zeros(k, 1)
        for component, _, x in _by_component(rows, labels):
            x -= references[component]
            add = row_adder(component)
            add(first, x)
            add(second, x.square_().sum(1, keepdim=True))
        for tensor in (first, second):
            ranks.sum(tensor)
        shift = first / counts.clamp(min=1)[:, None]
        spreads = (second.squeeze(1) / counts.clamp(min=1) - shift.square().sum(1)).clamp_min(0)
        return cls(counts, references + shift, spreads)

    @property
    def active(self) -> Tensor:
        """Indices (A,) of the components that have images."""
        return self.counts.nonzero().squeeze(1)


def indices(
    rows: Iterable[tuple[range, Tensor]], labels: np.ndarray, references: Tensor, seed: int, ranks: Ranks
) -> dict[str, float | int | None]:
    """Return three validity indices of a hard assignment. A collective call.

    * ``silhouette`` (Rousseeuw 1987): the mean of (b - a) / max(a, b), where a is the mean *squared* Euclidean distance
      from an image to the others of its component, and b that to the images of the nearest other component. The
      silhouette of a component's only image is 0. The mean is over a random sample of :data:`SILHOUETTE_IMAGES` images,
      each compared with all images. (scikit-learn compares the sampled images with one another only, which would leave
      most of 8192 components with one image or none.)
    * ``calinski_harabasz`` (Caliński and Harabasz 1974): the ratio of variance between components to variance within
      components, each divided by its degrees of freedom. Higher is better.
    * ``davies_bouldin`` (Davies and Bouldin 1979): the mean over components of the largest (s_i + s_j) / |m_i - m_j|,
      where s is the mean distance of images from their mean m. Lower is better.

    All are None, as they are undefined, unless at least two components, and fewer than N, have images.

    Args:
        rows: see :meth:`Clusters.collect`; iterated twice.
        labels: (N,), component of every image.
        references: (K, C) float64, points near the means.
    """
    n = len(labels)
    clusters = Clusters.collect(rows, labels, references, ranks)
    active = clusters.active
    if not 1 < len(active) < n:
        return {"silhouette": None, "silhouette_images": 0, "calinski_harabasz": None, "davies_bouldin": None}
    sampled = torch.zeros(n, dtype=torch.bool)
    sampled[rng.permutation(seed, "report/silhouette", 0, n)[:SILHOUETTE_IMAGES]] = True
    distances, silhouette = references.new_zeros(len(references), 1), references.new_zeros(())
    for component, image, x in _by_component(rows, labels):
        wanted = sampled[image.cpu()].to(x.device)
        silhouette += _silhouettes(x[wanted], component[wanted], clusters).sum()
        x -= clusters.means[component]
        row_adder(component)(distances, x.square_().sum(1, keepdim=True).sqrt_())
    ranks.sum(distances)
    ranks.sum(silhouette)
    mean_distances = distances.squeeze(1)[active] / clusters.counts[active]
    return {
        "silhouette": float(silhouette) / int(sampled.sum()),
        "silhouette_images": int(sampled.sum()),
        "calinski_harabasz": _calinski_harabasz(clusters, n),
        "davies_bouldin": _davies_bouldin(clusters.means[active], mean_distances),
    }


def _by_component(rows: Iterable[tuple[range, Tensor]], labels: np.ndarray) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Yield parts of chunks, sorted by component: components (p,), images (p,) and copied tokens (p, C) float64."""
    for chunk, x in rows:
        own = torch.as_tensor(labels[chunk.start : chunk.stop], device=x.device).long()
        component, order = own.sort(stable=True)
        step = max(1, _PIECE // x.shape[1])
        for start in range(0, len(x), step):
            part = order[start : start + step]
            yield component[start : start + step], part + chunk.start, x[part].double()


def _silhouettes(x: Tensor, component: Tensor, clusters: Clusters) -> Tensor:
    """Return the silhouettes (p,) of tokens (p, C) float64 of the given components."""
    active = clusters.active
    means, spreads, counts = clusters.means[active], clusters.spreads[active], clusters.counts[active].double()
    centre = means.mean(0)
    means, norms = (means - centre).T.contiguous(), (means - centre).square().sum(1)
    result = []
    for z, own in zip((x - centre).split(_ROWS), torch.searchsorted(active, component).split(_ROWS), strict=True):
        to_means = torch.addmm(norms, z, means, alpha=-2).add_(z.square().sum(1, keepdim=True)).clamp_(min=0)
        to_images = to_means.add_(spreads)
        n = counts[own]
        within = to_images.gather(1, own[:, None]).squeeze(1) * n / (n - 1)
        nearest = to_images.scatter_(1, own[:, None], torch.inf).amin(1)
        value = (nearest - within) / torch.maximum(nearest, within)
        result.append(torch.where(n > 1, value, 0).nan_to_num_(0))
    return torch.cat(result) if result else x.new_zeros(0)


def _calinski_harabasz(clusters: Clusters, n: int) -> float:
    counts, k = clusters.counts.double(), len(clusters.active)
    centre = (counts / n) @ clusters.means
    between = float(counts @ (clusters.means - centre).square().sum(1))
    within = float(counts @ clusters.spreads)
    return between * (n - k) / (within * (k - 1)) if within > 0 else 1.0


def _davies_bouldin(means: Tensor, distances: Tensor) -> float:
    worst, centred = [], means - means.mean(0)
    norms = centred.square().sum(1)
    for start in range(0, len(means), _ROWS):
        part = slice(start, start + _ROWS)
        squares = torch.addmm(norms, centred[part], centred.T, alpha=-2).add_(norms[part, None])
        # A component is not compared with itself or, as in scikit-learn, with one that has the same mean.
        squares[squares <= 1e-12 * norms[part, None]] = torch.inf
        squares[torch.arange(len(squares)), torch.arange(start, start + len(squares))] = torch.inf
        worst.append(((distances[part, None] + distances) / squares.sqrt_()).amax(1))
    return float(torch.cat(worst).mean())
