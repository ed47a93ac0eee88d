"""The operations on a KV pool that a step runs, one folder each: contract, reference and, where it exists, a kernel.

Knows nothing about sessions, turns or sparsity methods: an operation is told which slots and cells to read. Hop 8 of the turn.

Letters used by all contracts: S slots of a pool, T new tokens, N cached tokens of one segment, R or r query rows, W scoring
rows, H query heads, Hkv KV heads, G = H // Hkv query heads of one KV head, D head dim. A pool is `[S, Hkv, D]` and holds one
layer; slot = block * BLOCK_TOKENS + offset. Query head h reads KV head h // G.
"""

from loopserve.kernels.compact_kv import compact_kv
from loopserve.kernels.coverage_threshold import coverage_threshold
from loopserve.kernels.line_scores import line_scores
from loopserve.kernels.mass_outside_tiles import mass_outside_tiles
from loopserve.kernels.mass_per_tile import mass_per_tile
from loopserve.kernels.paged_decode import LeftOut, paged_decode
from loopserve.kernels.sketch import KeySketch
from loopserve.kernels.sketch_log_sum import sketch_log_sum
from loopserve.kernels.sketch_scores import SketchScores, sketch_scores
from loopserve.kernels.sparse_prefill import sparse_prefill
from loopserve.kernels.store_kv import store_kv
from loopserve.kernels.store_sketch import store_sketch
from loopserve.kernels.token_scores import token_scores

__all__ = [
    "KeySketch",
    "LeftOut",
    "SketchScores",
    "compact_kv",
    "coverage_threshold",
    "line_scores",
    "mass_outside_tiles",
    "mass_per_tile",
    "paged_decode",
    "sketch_log_sum",
    "sketch_scores",
    "sparse_prefill",
    "store_kv",
    "store_sketch",
    "token_scores",
]
