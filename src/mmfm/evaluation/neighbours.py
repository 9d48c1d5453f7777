"""Distances between the rows of two feature banks, a block at a time.

A bank of 50,000 rows of 2048 features takes 410 MB, all its distances to another 10 GB. Blocks of 4096 x 4096 distances
take 67 MB.

Squared distances are |a|^2 + |b|^2 - 2 a.b in float32, of rows less the second bank's mean. A large common mean, as
rectified features have, would cancel; what remains is an error of about 1e-7 of the squared norms, which a distance
between neighbours in many dimensions is not far below. :func:`nearest` computes the distances that it returns anew.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmfm.data import ranges
from mmfm.infra.precision import exact_float32

BLOCK = 4096
"""Rows and columns of a block of distances."""


class Stored(Protocol):
    """Features (n, D) float32 in a file, read by consecutive rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, D)."""

    @property
    def ndim(self) -> int:
        """2."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> np.ndarray: ...


Bank = np.ndarray | Tensor
"""Features (n, D) float32 on the CPU, possibly memory-mapped."""


def check(bank: Bank | Stored, name: str, at_least: int) -> None:
    """Raise ValueError unless a bank is a matrix of finite numbers with ``at_least`` rows that are not all equal."""
    if bank.ndim != 2 or len(bank) < at_least:
        raise ValueError(f"{name} are {tuple(bank.shape)}, but at least {at_least} rows of features are needed")
    varied = False
    for rows in ranges(0, len(bank), BLOCK):
        part = _rows(bank, rows, torch.device("cpu"))
        if not part.isfinite().all():
            raise ValueError(f"{name} contain NaN or Inf; check the images and the detector's weights")
        varied = varied or bool((part != _rows(bank, range(1), torch.device("cpu"))).any())
    if not varied:
        raise ValueError(f"{name} are all equal: the images are constant, or the detector's weights are not its own")


def squared_distances(
    a: Bank, b: Bank, device: torch.device, block: int = BLOCK
) -> Iterator[tuple[range, range, Tensor]]:
    """Yield (rows of a, rows of b, squared distances between them, float32 on ``device``), row by row of blocks.

    Distances of a row to itself (``a is b``) are exactly 0.
    """
    centre = _mean(b, device)
    for rows in ranges(0, len(a), block):
        left = _rows(a, rows, device) - centre
        for columns in ranges(0, len(b), block):
            right = _rows(b, columns, device) - centre
            right_norms = right.double().square().sum(1).float()
            squares = _squares(left, right, right_norms)
            if a is b and rows == columns:
                squares.fill_diagonal_(0)
            yield rows, columns, squares


def kth_nearest(bank: Bank, k: int, device: torch.device, block: int = BLOCK) -> Tensor:
    """Return every row's squared distances to its 1st, ..., k-th nearest other rows: (n, k) float32 on ``device``.

    Raises:
        ValueError: fewer than k + 1 rows.
    """
    if len(bank) <= k:
        raise ValueError(f"{len(bank)} images have no {k} neighbours each; give at least {k + 1} images")
    found = torch.full((len(bank), k + 1), torch.inf, device=device)  # the first is the row itself
    for rows, _, squares in squared_distances(bank, bank, device, block):
        best = squares.topk(min(k + 1, squares.shape[1]), 1, largest=False).values
        both = torch.cat([found[rows.start : rows.stop], best], 1)
        found[rows.start : rows.stop] = both.topk(k + 1, 1, largest=False).values
    return found[:, 1:]


def nearest(
    queries: Bank,
    bank: Bank | Stored,
    device: torch.device,
    block: int = BLOCK,
    advance: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the distance (n,) float64 of every query from its nearest row of the bank, and the row's index (n,) int64.

    The distances are computed from the rows themselves, so that they are 0 for equal rows; ties go to the first row.
    The bank is read three times, a block at a time; the queries are in memory.

    Args:
        advance: called with the number of pairs compared.
    """
    squares, indices = torch.full((len(queries),), torch.inf), torch.zeros(len(queries), dtype=torch.int64)
    centre = _mean(bank, device)
    for columns in ranges(0, len(bank), block):
        right = _rows(bank, columns, device) - centre
        right_norms = right.double().square().sum(1).float()
        for rows in ranges(0, len(queries), block):
            left = _rows(queries, rows, device) - centre
            smallest = _squares(left, right, right_norms).min(1)
            part = slice(rows.start, rows.stop)
            closer = smallest.values.cpu() < squares[part]
            squares[part] = torch.where(closer, smallest.values.cpu(), squares[part])
            indices[part] = torch.where(closer, smallest.indices.cpu() + columns.start, indices[part])
            if advance is not None:
                advance(len(rows) * len(columns))
    distances, host = torch.empty(len(queries), dtype=torch.float64), torch.device("cpu")
    for columns in ranges(0, len(bank), block):
        inside = ((indices >= columns.start) & (indices < columns.stop)).nonzero().squeeze(1)
        if len(inside):
            others = _rows(bank, columns, host)
            for some in inside.split(block):
                ours = torch.as_tensor(np.asarray(queries[some.numpy()])).double()
                distances[some] = (ours - others[indices[some] - columns.start].double()).norm(dim=1)
    return distances, indices


def _squares(left: Tensor, right: Tensor, right_norms: Tensor) -> Tensor:
    """Return the squared distances (a, b) float32 of centred rows (a, D) and (b, D), given the norms of the latter."""
    left_norms = left.double().square().sum(1).float()
    with exact_float32(left.device.type):
        squares = torch.addmm(right_norms[None], left, right.T, alpha=-2)
    return squares.add_(left_norms[:, None]).clamp_(min=0)


def _rows(bank: Bank | Stored, rows: range, device: torch.device) -> Tensor:
    part = bank[rows.start : rows.stop]
    return (part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))).to(device, torch.float32)


def _mean(bank: Bank | Stored, device: torch.device) -> Tensor:
    total = torch.zeros(bank.shape[1], dtype=torch.float64, device=device)
    for rows in ranges(0, len(bank), BLOCK):
        total += _rows(bank, rows, device).double().sum(0)
    return (total / len(bank)).float()
