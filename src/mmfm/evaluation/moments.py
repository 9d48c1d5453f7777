"""Feature moments of images that are divided among processes in contiguous parts."""

from mmfm.data.moments import CovarianceMoments
from mmfm.infra.distributed import Ranks


def own_part(n: int, ranks: Ranks) -> range:
    """Return this process's part of range(n): contiguous, and equal in size across processes to within one."""
    return range(n * ranks.rank // ranks.world, n * (ranks.rank + 1) // ranks.world)


def merged(moments: CovarianceMoments, ranks: Ranks) -> CovarianceMoments:
    """Merge the moments of all processes in rank order; a collective call that returns the result on every process."""
    parts = [CovarianceMoments.from_arrays(arrays) for arrays in ranks.gather(moments.to_arrays())]
    whole = parts[0]
    for part in parts[1:]:
        whole.merge(part)
    return whole
