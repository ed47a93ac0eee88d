"""`line_scores` in Triton: `loopserve.kernels.row_weights` says how the work is cut and what is read how often.

Four launches: sort the rows by group, log-sums of blocks of columns, their merge, weights by group.
"""

from torch import Tensor

from loopserve.kernels.row_weights import row_weights


def line_scores(
    query: Tensor, key_pool: Tensor, slots: Tensor, positions: Tensor, *, groups: Tensor, num_groups: int, scale: float
) -> Tensor:
    """See the contract in `loopserve.kernels.line_scores`."""
    return row_weights(query, key_pool, slots, positions, groups=groups, num_groups=num_groups, scale=scale)
