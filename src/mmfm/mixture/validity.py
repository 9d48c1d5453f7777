"""How well the components separate the tokens: three indices that ask for no class labels.

All of them compare images by the distances of their tokens under hard assignment, and mean distances follow from
moments: for a cluster with mean m and mean squared distance T from it, the mean squared distance of a point x to the
cluster's points is |x - m|^2 + T. So two passes over the tokens give exact numbers at any N and K in the memory of the
means, where scikit-learn's functions hold all tokens and compare all pairs.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from mmfm.infra import rng
from mmfm.infra.distributed import Ranks
from mmfm.mixture.moments import add_rows

SILHOUETTE_IMAGES = 20_000
"""Images whose silhouette is taken; each is compared with the images of all components."""

_PIECE = 1 << 22  # numbers of tokens in float64 at a time
_ROWS = 512  # rows of a product with all K means at a time


class Clusters:
    """Means and spreads of the components' own images.

    Attributes:
        counts: (K,) int64.
        means: (K, C) float64; of a component without images whatever was given for reference.
        spreads: (K,) float64, mean squared distance of the images from the mean.
    """

    def __init__(self, counts: Tensor, means: Tensor, spreads: Tensor) -> None:
        self.counts, self.means, self.spreads = counts, means, spreads

    @classmethod
    def collect(
        cls, rows: Iterable[tuple[range, Tensor]], labels: np.ndarray, references: Tensor, ranks: Ranks
    ) -> "Clusters":
        """Sum over all tokens; a collective call.

        Args:
            rows: this process's chunks: global indices and tokens (b, C) float32.
            labels: (N,) component of every image.
            references: (K, C) float64, points near the means, from which deviations are taken so that nothing cancels.
        """
        k = len(references)
        counts = torch.as_tensor(np.bincount(labels, minlength=k), device=references.device)
        first, second = torch.zeros_like(references), references.new_zeros(k, 1)
        for component, _, x in _by_component(rows, labels):
            x -= references[component]
            add_rows(first, component, x)
            add_rows(second, component, x.square_().sum(1, keepdim=True))
        for tensor in (first, second):
            ranks.sum(tensor)
        shift = first / counts.clamp(min=1)[:, None]
        spreads = (second.squeeze(1) / counts.clamp(min=1) - shift.square().sum(1)).clamp_min(0)
        return cls(counts, references + shift, spreads)

    @property
    def active(self) -> Tensor:
        """Numbers (A,) of the components with images."""
        return self.counts.nonzero().squeeze(1)


def indices(
    rows: Iterable[tuple[range, Tensor]], labels: np.ndarray, references: Tensor, seed: int, ranks: Ranks
) -> dict[str, float | int | None]:
    """Return the three indices of a hard assignment; a collective call. Arguments as in :meth:`Clusters.collect`.

    * ``silhouette`` (Rousseeuw 1987): mean of (b - a) / max(a, b), a and b an image's mean *squared* Euclidean distance
      to its own and to the nearest other component's images. A component's only image counts 0. It is exact for the
      images it is taken of, a seeded sample of :data:`SILHOUETTE_IMAGES`. (scikit-learn's subsampling would leave most
      of 8192 components with one image or none.)
    * ``calinski_harabasz`` (1974): variance between over variance within the components, by degrees of freedom.
    * ``davies_bouldin`` (1979): mean over the components of the worst (s_i + s_j) / |m_i - m_j|, s the mean distance to
      the component's mean; small is good.

    All are None with fewer than two components with images, where they have no meaning.
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
        add_rows(distances, component, x.square_().sum(1, keepdim=True).sqrt_())
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
    """Yield pieces of chunks sorted by component: component (p,), image (p,) and a copy of its token (p, C) float64."""
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
        # A component is not compared with itself, nor, as in scikit-learn, with one that has the same mean.
        squares[squares <= 1e-12 * norms[part, None]] = torch.inf
        squares[torch.arange(len(squares)), torch.arange(start, start + len(squares))] = torch.inf
        worst.append(((distances[part, None] + distances) / squares.sqrt_()).amax(1))
    return float(torch.cat(worst).mean())
