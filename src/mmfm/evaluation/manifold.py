"""Precision, recall, density and coverage: how far generated images lie among real ones, and real among generated."""

from dataclasses import dataclass

import torch

from mmfm.evaluation.neighbours import BLOCK, Bank, check, kth_nearest, squared_distances

NEIGHBOURS = 3
"""k of precision and recall, in Kynkäänniemi et al. and the ADM evaluator."""

DENSITY_NEIGHBOURS = 5
"""k of density and coverage, in Naeem et al."""


@dataclass(frozen=True)
class Manifold:
    """How two sets of images overlap in feature space.

    Attributes:
        precision: share of generated images within the ball of a real one; a ball reaches to its centre's k-th nearest
            neighbour in its own set.
        recall: share of real images within the ball of a generated one.
        density: mean number of real balls around a generated image, by k; about 1 for equal distributions, and not
            bounded by it.
        coverage: share of real balls with a generated image in them.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(
    generated: Bank,
    real: Bank,
    neighbours: int = NEIGHBOURS,
    density_neighbours: int = DENSITY_NEIGHBOURS,
    device: torch.device | str = "cpu",
    block: int = BLOCK,
) -> Manifold:
    """Compare features of generated images (n, D) with those of real ones (m, D), in blocks.

    The ADM evaluator does the same with its 10,000 reference images as the real ones and 50,000 generated ones, but
    rounds the squared distances to float16, that is, to a thousandth. torch-fidelity's distances are float32 too, but
    it holds thousands of whole rows of them (``prc_batch_size``: 2 GB), and has neither density nor coverage.

    Balls are closed for precision and recall, and open for density and coverage, as in the authors' code.

    Args:
        neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.
        device: where to compute; the banks stay where they are.
        block: rows and columns of a block of distances.

    Raises:
        ValueError: features of another shape, NaN, all equal, or too few images for k neighbours.

    Source: Kynkäänniemi et al. 2019, "Improved precision and recall metric for assessing generative models", equations
    1 and 2; Naeem et al. 2020, "Reliable fidelity and diversity metrics for generative models", equations 2 and 3.
    """
    device, most = torch.device(device), max(neighbours, density_neighbours)
    check(generated, "features of the generated images", neighbours + 1)
    check(real, "features of the real images", most + 1)
    if generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"generated images have {generated.shape[1]} features and real ones {real.shape[1]}; use one detector"
        )
    real_radii = kth_nearest(real, most, device, block)
    closed, open_ = real_radii[:, neighbours - 1], real_radii[:, density_neighbours - 1]
    generated_radii = kth_nearest(generated, neighbours, device, block)[:, -1]
    inside = torch.zeros(len(generated), dtype=torch.bool, device=device)
    reached = torch.zeros(len(real), dtype=torch.bool, device=device)
    covered = torch.zeros_like(reached)
    balls = 0
    for rows, columns, squares in squared_distances(generated, real, device, block):
        of_generated, of_real = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
        inside[of_generated] |= (squares <= closed[of_real]).any(1)
        reached[of_real] |= (squares <= generated_radii[of_generated, None]).any(0)
        within = squares < open_[of_real]
        covered[of_real] |= within.any(0)
        balls += int(within.sum())
    return Manifold(
        precision=inside.double().mean().item(),
        recall=reached.double().mean().item(),
        density=balls / (density_neighbours * len(generated)),
        coverage=covered.double().mean().item(),
    )
