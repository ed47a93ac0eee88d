"""`coverage_threshold` in Triton: a search over the bits of the threshold, not a sort.

Floats that are not negative are ordered as their bits are. One program a row fixes four bits of the threshold in each of eight passes, from
the highest: it adds up, for all sixteen values of these bits at once, the entries that are at least as large, and keeps the largest value
that still reaches the target. The row is read eight times, from the L2 cache after the first: 64 Ki columns are 256 KiB. Rejected: a
sort (one of [32, 64 Ki] reads and writes 8 MiB at least four times, and its result must be summed as well); one bit a pass (31 passes);
a histogram by atomics (most entries fall in few bins).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Sixteen sums of a block are 16 Ki floats: 64 registers a thread at eight warps. By arithmetic, not measured.
_BLOCK = 1024
_NUM_WARPS = 8


def coverage_threshold(weights: Tensor, targets: Tensor) -> Tensor:
    """See the contract in `loopserve.kernels.coverage_threshold`."""
    num_rows, num_columns = weights.shape
    thresholds = torch.empty_like(targets)
    if num_rows == 0:
        return thresholds
    rows = weights.contiguous()
    _search[(num_rows,)](rows, targets, thresholds, num_columns, BLOCK=_BLOCK, num_warps=_NUM_WARPS)
    return thresholds


@triton.jit(do_not_specialize=["num_columns"])
def _search(weights, targets, thresholds, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    offsets = tl.arange(0, BLOCK)
    digit = tl.arange(0, 16)
    found = tl.full((), 0, tl.int32)  # the threshold's bits so far
    for step in tl.static_range(8):
        candidates = found | (digit << (28 - 4 * step))  # the sign bit makes the upper half of the first ones negative
        sums = tl.zeros((16,), dtype=tl.float64)
        for first in range(0, num_columns, BLOCK):
            inside = first + offsets < num_columns
            entries = tl.load(weights + row * num_columns + first + offsets, mask=inside, other=0.0)
            is_held = entries.to(tl.int32, bitcast=True)[None, :] >= candidates[:, None]
            sums += tl.sum(tl.where(is_held, entries[None, :], 0.0), axis=1).to(tl.float64)
        reaches = (sums >= target.to(tl.float64)) & (candidates >= 0)
        last = tl.max(tl.where(reaches, digit, 0), axis=0)  # sums fall as candidates rise
        found = found | (last << (28 - 4 * step))
    threshold = found.to(tl.float32, bitcast=True)
    tl.store(thresholds + row, tl.where(target <= 0.0, float("inf"), threshold))
