"""`coverage_threshold` in plain torch: sorted, and summed in float64."""

import torch
from torch import Tensor


def coverage_threshold(weights: Tensor, targets: Tensor) -> Tensor:
    """See the contract in `loopserve.kernels.coverage_threshold`."""
    num_columns = weights.shape[1]
    ordered = weights.sort(dim=1, descending=True).values
    # Over tens of thousands of columns the rounding of a float32 running sum would decide where it stops.
    num_needed = (ordered.cumsum(dim=1, dtype=torch.float64) < targets[:, None]).sum(dim=1) + 1
    reached = num_needed <= num_columns
    thresholds = torch.zeros_like(targets)
    if num_columns:
        at = (num_needed - 1).clamp(max=num_columns - 1)
        thresholds = ordered.gather(1, at[:, None])[:, 0].masked_fill(~reached, 0.0)
    return thresholds.masked_fill(targets <= 0, float("inf"))
