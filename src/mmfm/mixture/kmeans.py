"""Distributed k-means, starting from given centres.

Rows are compared with the centres near their last one (:mod:`mmfm.mixture.groups`). With as many candidates as centres
this is Lloyd's algorithm; with fewer, it is the approximation of Forster and Lücke (2018). Processes exchange sums
instead of rows, so all of them take part, whereas faiss would occupy only one.
"""

import torch
from torch import Tensor

from mmfm.infra.precision import exact_float32
from mmfm.mixture.groups import lloyd_iteration
from mmfm.mixture.split_merge import redistribute
from mmfm.mixture.streaming import Rows
from mmfm.mixture.truncated import nearest_centres

ROUNDS = 4
"""Most redistributions of the clusters."""

SETTLED = 0.02
"""Share of clusters moved at or below which a redistribution is the last."""

ITERATIONS = 2
"""Lloyd iterations before and after every redistribution."""

CANDIDATES = 16
"""Centres that a row is compared with in a Lloyd iteration."""


def nearest_centre(rows: Rows, centres: Tensor) -> Tensor:
    """Return the nearest of the centres (K, C) to each of this process's rows, (n,) int32."""
    centre = centres.mean(0)
    offsets = centres - centre
    half_norms = offsets.square().sum(1).div_(2)
    winners = torch.empty(len(rows.local), dtype=torch.int32, device=centres.device)
    with exact_float32(centres.device.type):
        for chunk, x in rows:
            z = torch.sub(x, centre, out=rows.workspace.empty("features", x.dtype, *x.shape))
            scores = rows.workspace.empty("joint", x.dtype, len(x), len(centres))
            torch.addmm(-half_norms, z, offsets.T, out=scores)
            winners[rows.position(chunk)] = scores.argmax(1)
    return winners


def lloyd(rows: Rows, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Run Lloyd's algorithm with split-and-merge moves from centres (K, C) float32. A collective call.

    Returns:
        Centres (K, C) float32, and the cluster of each of this process's rows (n,) int32 before the last update of the
        centres.
    """
    winners = nearest_centre(rows, centres)
    centres = _iterate(rows, centres, winners)
    for _ in range(ROUNDS):
        centres, winners, moves = redistribute(rows, centres, winners)
        centres = _iterate(rows, centres, winners)
        if moves <= SETTLED * len(centres):
            break
    return centres, winners


def _iterate(rows: Rows, centres: Tensor, winners: Tensor) -> Tensor:
    """Run :data:`ITERATIONS` Lloyd iterations and return the centres; ``winners`` (n,) is updated in place."""
    for _ in range(ITERATIONS):
        centres = lloyd_iteration(rows, centres, nearest_centres(centres - centres.mean(0), CANDIDATES), winners)
    return centres
