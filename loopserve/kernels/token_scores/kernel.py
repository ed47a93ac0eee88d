"""`token_scores` in Triton: row weights with all rows in one group. `loopserve.kernels.row_weights` says how the work is cut.

Three launches: log-sums of blocks of columns, their merge, weights. A single group needs neither sorted rows nor a product to add them up.
"""

from torch import Tensor

from loopserve.kernels.row_weights import row_weights


def token_scores(query: Tensor, key_pool: Tensor, slots: Tensor, positions: Tensor, *, scale: float) -> Tensor:
    """See the contract in `loopserve.kernels.token_scores`."""
    weights = row_weights(query, key_pool, slots, positions, groups=None, num_groups=1, scale=scale)  # [H, 1, N]
    return weights[:, 0]
