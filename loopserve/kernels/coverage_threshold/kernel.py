"""`coverage_threshold` in Triton: a search over the bits of the threshold, not a sort.

Floats that are not negative are ordered as their bits are. One program a row fixes two bits of the threshold in each of sixteen passes,
from the highest: it adds up, for the three larger values of these bits at once, the entries that are at least as large, and keeps the
largest value that still reaches the target. Every lane keeps sums of its own, which are merged once a pass. The row is read sixteen
times, from the L2 cache after the first: 64 Ki columns are 256 KiB.

By the instructions that sm_90 executes, not measured: an entry costs three comparisons, selections and float64 multiply-adds a pass, so two
bits a pass cost 48 of each, four bits in eight passes 120; one bit at a time costs 31, but as many reads of the row and conversions to
float64. Rejected: a sort (one of [32, 64 Ki] reads and writes 8 MiB at least four times, and its result must be summed as well), and a
histogram by atomics (most entries fall in few bins).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Few rows leave a multiprocessor one program: as many threads as it may have. Three sums of four lanes are 24 registers a thread, of 64.
_BLOCK = 4096
_NUM_WARPS = 32


def coverage_threshold(weights: Tensor, targets: Tensor) -> Tensor:
    """See the contract in `loopserve.kernels.coverage_threshold`."""
    num_rows, num_columns = weights.shape
    thresholds = torch.empty_like(targets, memory_format=torch.contiguous_format)
    if num_rows == 0:
        return thresholds
    rows, wanted = weights.contiguous(), targets.contiguous()
    _search[(num_rows,)](rows, wanted, thresholds, num_columns, BLOCK=_BLOCK, num_warps=_NUM_WARPS)
    return thresholds


@triton.jit(do_not_specialize=["num_columns"])
def _search(weights, targets, thresholds, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    entries_of_row = weights + row * num_columns
    target = tl.load(targets + row)
    offsets = tl.arange(0, BLOCK)
    found = tl.full((), 0, tl.uint32)  # the threshold's bits so far
    for step in range(16):
        # The first unit is 2.0. Twice and three times it are larger than every float's bits, so nothing reaches the target there.
        unit = tl.full((), 1, tl.uint32) << (30 - 2 * step)
        sums_1 = tl.zeros((BLOCK,), dtype=tl.float64)
        sums_2 = tl.zeros((BLOCK,), dtype=tl.float64)
        sums_3 = tl.zeros((BLOCK,), dtype=tl.float64)
        for first in range(0, num_columns, BLOCK):
            columns = first + offsets
            entries = tl.load(entries_of_row + columns, mask=columns < num_columns, other=0.0)
            bits = entries.to(tl.uint32, bitcast=True)
            weight = entries.to(tl.float64)
            # Multiplied, not selected: one multiply-add, where a selection of float64 is two instructions before the addition.
            sums_1 += (bits >= found + unit).to(tl.float64) * weight
            sums_2 += (bits >= found + 2 * unit).to(tl.float64) * weight
            sums_3 += (bits >= found + 3 * unit).to(tl.float64) * weight
        # Sums fall as candidates rise, so those that reach the target are the first ones.
        found += unit * _reaches(sums_1, target) + unit * _reaches(sums_2, target) + unit * _reaches(sums_3, target)
    threshold = found.to(tl.float32, bitcast=True)
    tl.store(thresholds + row, tl.where(target <= 0.0, float("inf"), threshold))


@triton.jit
def _reaches(sums, target):
    """1 where lanes' sums [BLOCK] add up to the target, else 0."""
    return (tl.sum(sums, axis=0) >= target.to(tl.float64)).to(tl.uint32)
