"""Contract of `coverage_threshold`: from which weight on the entries of a row hold what they are asked to hold."""

import torch
from torch import Tensor

from loopserve.kernels.dispatch import implementation


def coverage_threshold(weights: Tensor, targets: Tensor) -> Tensor:
    """The largest t of each row such that its entries >= t add up to its target at least; returns float32 [X].

    weights float32 [X, N], finite and not negative; targets float32 [X]. t is one of the row's weights, so entries that tie with it are
    all in; +inf where the target is 0 or less: nothing is needed; 0 where all of them together do not reach it. Sums are float64, in any
    order. Does not wait for the device. Mutates nothing. Source: phase 1 of arXiv 2507.13681 adds lines until they hold alpha; a
    threshold says the same without an order, which would have to be sorted.
    """
    assert weights.dtype == torch.float32 and weights.dim() == 2, "weights are float32 [X, N]"
    assert targets.dtype == torch.float32 and targets.shape == weights.shape[:1], "one float32 target a row"
    threshold: Tensor = implementation("coverage_threshold", weights.device.type)(weights, targets)
    return threshold
