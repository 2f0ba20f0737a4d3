"""Iterations towards a fixed point: Sinkhorn's normalisation and the power method, by count and by tolerance."""

from __future__ import annotations

import torch
from digits import digits
from torch import Tensor


def sinkhorn(scores: Tensor, iterations: int = 500) -> Tensor:
    """A doubly stochastic matrix from scores (..., n, n): rows and columns normalised in turns, so many times."""
    log = scores
    for _ in range(iterations):
        log = log - log.logsumexp(-1, keepdim=True)
        log = log - log.logsumexp(-2, keepdim=True)
    return log.exp()


def sinkhorn_until(scores: Tensor, tolerance: float = 1e-4) -> Tensor:
    """As `sinkhorn`, until every row sums to one within the tolerance."""
    log = scores - scores.logsumexp(-2, keepdim=True)
    error = (log.exp().sum(-1) - 1).abs().max()
    while error > tolerance:
        log = log - log.logsumexp(-1, keepdim=True)
        log = log - log.logsumexp(-2, keepdim=True)
        error = (log.exp().sum(-1) - 1).abs().max()
    return log.exp()


def power_iteration(matrix: Tensor, start: Tensor, iterations: int = 500) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue of a symmetric (n, n) and its eigenvector, by so many products from `start` (n,)."""
    vector = start
    for _ in range(iterations):
        vector = matrix @ vector
        vector = vector / vector.norm()
    return vector @ matrix @ vector, vector


def power_iteration_until(matrix: Tensor, start: Tensor, tolerance: float = 1e-6) -> tuple[Tensor, Tensor]:
    """As `power_iteration`, until a product changes no component by more than the tolerance."""
    vector = start / start.norm()
    change = torch.full((), torch.inf)
    while change > tolerance:
        product = matrix @ vector
        product = product / product.norm()
        change = (product - vector).abs().max()
        vector = product
    return vector @ matrix @ vector, vector


def similarities(count: int = 64) -> Tensor:
    """Scores between `count` digits and the next `count`: minus their squared distances, (count, count)."""
    images = digits(8).flatten(1)
    return -torch.cdist(images[:count], images[count : 2 * count]).square()


def covariance(size: int = 14) -> Tensor:
    """The digits' covariance matrix, (size * size, size * size)."""
    return torch.cov(digits(size).flatten(1).T)


def main() -> None:
    """Run each ordinarily and compiled; print the times."""
    from compare import compare

    scores, matrix = similarities(), covariance()
    start = torch.ones(matrix.shape[0])
    compare("Sinkhorn, 500 iterations, 64 x 64", sinkhorn, scores)
    compare("Sinkhorn until 1e-4", sinkhorn_until, scores)
    compare("power method, 500 iterations, 196 x 196", power_iteration, matrix, start)
    compare("power method until 1e-6", power_iteration_until, matrix, start)


if __name__ == "__main__":
    main()
