"""k-means over all processes: seeds from one, Lloyd's iterations from all.

Rows meet the centres near their last one (:mod:`mmfm.mixture.groups`); with as many candidates as centres this is
Lloyd's algorithm, with fewer its approximation by Forster and Lucke (2018). Processes share sums, not rows, so at full
size all processes of a node work, where faiss would have one work and the others wait.
"""

import torch
from torch import Tensor

from mmfm.infra.precision import exact_float32
from mmfm.mixture.groups import lloyd_iteration
from mmfm.mixture.split_merge import redistribute
from mmfm.mixture.streaming import Rows
from mmfm.mixture.truncated import nearest_centres

ROUNDS = 4
"""Redistributions of the clusters, at most."""

SETTLED = 0.02
"""Share of the clusters up to which a redistribution is the last."""

ITERATIONS = 2
"""Of Lloyd's algorithm, before and after every redistribution."""

CANDIDATES = 16


def nearest_centre(rows: Rows, centres: Tensor) -> Tensor:
    """Return the nearest of the centres (K, C) for this process's rows: (n,) int32."""
    centre = centres.mean(0)
    offsets = centres - centre
    half_norms = offsets.square().sum(1).div_(2)
    winners = torch.empty(len(rows.local), dtype=torch.int32, device=centres.device)
    with exact_float32(centres.device.type):
        for chunk, x in rows:
            z = torch.sub(x, centre, out=rows.space.take("features", x.dtype, *x.shape))
            scores = rows.space.take("joint", x.dtype, len(x), len(centres))
            torch.addmm(-half_norms, z, offsets.T, out=scores)
            winners[chunk.start - rows.local.start :][: len(x)] = scores.argmax(1)
    return winners


def lloyd(rows: Rows, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Run Lloyd's algorithm from centres (K, C) float32, moving clusters to where they are missing. A collective call.

    Returns:
        Centres (K, C) float32, and the cluster of this process's rows (n,) int32 before the centres' last update.
    """
    winners = nearest_centre(rows, centres)
    centres = _settled(rows, centres, winners)
    for _ in range(ROUNDS):
        centres, winners, moves = redistribute(rows, centres, winners)
        centres = _settled(rows, centres, winners)
        if moves <= SETTLED * len(centres):
            break
    return centres, winners


def _settled(rows: Rows, centres: Tensor, winners: Tensor) -> Tensor:
    """Give rows to the nearest of their candidates, some times over, and return the clusters' means (K, C) float32.

    Args:
        winners: (n,) cluster of this process's rows; overwritten.
    """
    for _ in range(ITERATIONS):
        centres = lloyd_iteration(rows, centres, nearest_centres(centres - centres.mean(0), CANDIDATES), winners)
    return centres
