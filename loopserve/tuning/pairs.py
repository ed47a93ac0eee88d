"""Measures one context length: a chunk of prefill, or an answer, dense and sparse in turns over the same exact KV. Chooses no lengths."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from loopserve.config import DecodeSparsity, PrefillSparsity
from loopserve.plan import SparsePrefill, StepResult
from loopserve.reads import num_kept_tokens
from loopserve.tuning.conversation import Conversation


@dataclass(frozen=True, slots=True)
class Prefill:
    """One chunk over one context, dense and sparse."""

    context_tokens: int  # cached before the chunk
    alpha: float
    dense_s: tuple[float, ...]
    sparse_s: tuple[float, ...]
    cells_share: float  # of the causal cells that sparse computed
    dense_heads: int  # of layers x heads, that fell back
    coverage: float | None


@dataclass(frozen=True, slots=True)
class Decode:
    """One answer over one context, dense and sparse; seconds are means over the answer's steps."""

    context_tokens: int
    budget_tokens: int
    dense_s: tuple[float, ...]
    sparse_s: tuple[float, ...]
    kept_tokens: int  # at the first step
    coverage: float | None


def measure_prefill(
    conversation: Conversation, context_tokens: int, *, chunk: int, config: PrefillSparsity, pairs: int
) -> Prefill:
    """Dense and sparse in turns, after one of each that is not counted. Leaves the chunk's positions sparse."""
    dense_s, sparse_s, results = [], [], []
    end = context_tokens + chunk
    for index in range(pairs + 1):
        dense, _ = conversation.chunk(context_tokens, end, sparse=None)
        order = SparsePrefill(config.method, alpha=config.alpha, min_coverage=None, seed=index)
        sparse, result = conversation.chunk(context_tokens, end, sparse=order)
        if index:
            dense_s.append(dense)
            sparse_s.append(sparse)
            results.append(result.quality[0])
    computed, total = sum(q.cells_computed for q in results), sum(q.cells_total for q in results)
    return Prefill(
        context_tokens=context_tokens,
        alpha=config.alpha,
        dense_s=tuple(dense_s),
        sparse_s=tuple(sparse_s),
        cells_share=computed / total,
        dense_heads=results[-1].dense_heads,
        coverage=_coverage([StepResult((), (quality,)) for quality in results]),
    )


def measure_decode(
    conversation: Conversation,
    context_tokens: int,
    *,
    steps: int,
    budget_tokens: int,
    pairs: int,
    config: DecodeSparsity,
) -> Decode:
    """Dense and sparse in turns, after one answer of each that is not counted: as long, so that nothing is met first under the clock."""
    dense_s, sparse_s, results = [], [], []
    for index in range(pairs + 1):
        dense, _ = conversation.answer(context_tokens, steps, budget_tokens=None)
        sparse, found = conversation.answer(context_tokens, steps, budget_tokens=budget_tokens)
        if index:
            dense_s.append(dense)
            sparse_s.append(sparse)
            results += found
    return Decode(
        context_tokens=context_tokens,
        budget_tokens=budget_tokens,
        dense_s=tuple(dense_s),
        sparse_s=tuple(sparse_s),
        kept_tokens=num_kept_tokens(context_tokens + 1, context_tokens + 1, budget_tokens, config),
        coverage=_coverage(results),
    )


def _coverage(results: Sequence[StepResult]) -> float | None:
    qualities = [quality for result in results for quality in result.quality]
    count = sum(quality.coverage_count for quality in qualities)
    return sum(quality.coverage_sum for quality in qualities) / count if count else None


def speedup(point: Prefill | Decode) -> float:
    """Median over pairs of how many times dense takes as long as sparse."""
    return statistics.median(dense / sparse for dense, sparse in zip(point.dense_s, point.sparse_s, strict=True))


def first_that_pays(points: Sequence[Prefill | Decode], *, margin: float = 1.0) -> int | None:
    """The smallest measured context from which on sparse is more than `margin` times as fast, at every longer one too, if any."""
    found = None
    for point in sorted(points, key=lambda point: point.context_tokens, reverse=True):
        if speedup(point) <= margin:
            break
        found = point.context_tokens
    return found
