"""Moments of a detector's features over images that processes share by consecutive parts."""

from mmfm.data.moments import CovarianceMoments
from mmfm.infra.distributed import Ranks


def own_part(n: int, ranks: Ranks) -> range:
    """The numbers of [0, n) that are this process's: consecutive ones, as many as any other's or one more or less."""
    return range(n * ranks.rank // ranks.world, n * (ranks.rank + 1) // ranks.world)


def merged(moments: CovarianceMoments, ranks: Ranks) -> CovarianceMoments:
    """Merge the moments of every process's part in rank order; a collective call, with the result on every process."""
    parts = [CovarianceMoments.from_arrays(arrays) for arrays in ranks.gather(moments.to_arrays())]
    whole = parts[0]
    for part in parts[1:]:
        whole.merge(part)
    return whole
