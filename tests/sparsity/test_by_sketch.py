"""A batch of rows that rank tokens by sketches reads what each row's own selection would."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loopserve.config import DecodeSparsity
from loopserve.kernels import KeySketch, paged_decode, store_sketch
from loopserve.methods import DECODE_RULES
from loopserve.sparsity import DECODE_METHODS, TurnSelection
from loopserve.sparsity.by_sketch import RankedRows, attend_ranked
from tests.sparsity.conftest import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, SCALE, Context, random_context

CONFIG = DecodeSparsity(budget_tokens=16, budget_floor_tokens=1, sink_tokens=2, window_tokens=3)
PROGRESSIVE = DECODE_RULES["progressive"]


def read_alone(
    context: Context, sketch: KeySketch, length: int, budget: int, config: DecodeSparsity, *, measure: bool
) -> tuple[Tensor, Tensor | None]:
    """The newest row's attention and coverage by a selection of its own."""
    sums = torch.zeros((1, NUM_KV_HEADS, HEAD_DIM))
    method = DECODE_METHODS["progressive"]
    selection = TurnSelection(
        1, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, config, method, device="cpu", dtype=torch.float32, value_sums=sums
    )
    slots, query = context.slots[:length], context.query[length - 1 : length]
    selection.observe(0, query, torch.tensor([length - 1]), context.key_pool, slots, scale=SCALE)
    selection.choose(0, context.key_pool, context.value_pool, slots, budget_tokens=budget, scale=SCALE)
    coverage = selection.refresh(
        0, context.key_pool, slots, budget_tokens=budget, scale=SCALE, measure=measure, sketch=sketch
    )
    columns, valid = selection.kept_columns(0, length)
    output = paged_decode(
        query,
        context.key_pool,
        context.value_pool,
        slots[columns][None],
        None if valid is None else valid[None],
        scale=SCALE,
        left_out=selection.left_out(0, length),
    )
    return output[0], coverage


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(1, 90)), min_size=1, max_size=4),
    st.integers(0, 4),
    st.sampled_from(["kv_head", "query_head"]),
    st.sampled_from(["mean", "nothing"]),
    st.integers(0, 3),
    st.integers(1, 5),
    st.integers(0, 20),
)
def test_each_row_reads_and_measures_what_it_would_alone(
    rows: list[tuple[int, int]],
    num_measured: int,
    select_per: str,
    left_out: str,
    sink_tokens: int,
    window_tokens: int,
    padding: int,
):
    config = replace(
        CONFIG, select_per=select_per, left_out=left_out, sink_tokens=sink_tokens, window_tokens=window_tokens
    )
    assert PROGRESSIVE.ranks_by_sketch(config)
    context = random_context(0, 80, sharpness=2.0)
    sketch = KeySketch.empty(len(context.key_pool), NUM_KV_HEADS, HEAD_DIM, "cpu")
    sketch.scales.fill_(torch.nan)
    store_sketch(context.key_pool[context.slots], sketch, context.slots)
    lengths, budgets = [length for length, _ in rows], [budget for _, budget in rows]
    unread = next(slot for slot in range(len(context.key_pool)) if slot not in set(context.slots.tolist()))
    slots = torch.full((len(rows), max(lengths) + padding), unread)
    for row, length in zip(slots, lengths, strict=True):
        row[:length] = context.slots[:length]
    always = sink_tokens + window_tokens
    ranked = RankedRows(
        slots,
        torch.tensor(lengths),
        torch.tensor(budgets),
        width=max(budgets) + (padding if padding % 2 else 0),
        is_full=padding % 2 == 0 and len(set(budgets)) == 1 and min(lengths) - always >= budgets[0],
        num_measured=min(num_measured, len(rows)),
    )
    means = torch.stack([context.value_pool[context.slots[:length]].mean(dim=0) for length in lengths])
    output, coverage = attend_ranked(
        torch.stack([context.query[length - 1] for length in lengths]),
        context.key_pool,
        context.value_pool,
        sketch,
        ranked,
        mean_value=means if left_out == "mean" else None,
        config=config,
        scale=SCALE,
    )
    assert coverage.shape == (ranked.num_measured, NUM_HEADS)
    for row, (length, budget) in enumerate(rows):
        measure = row < ranked.num_measured
        expected, measured = read_alone(context, sketch, length, budget, config, measure=measure)
        torch.testing.assert_close(output[row], expected, atol=1e-4, rtol=0)  # the share left out is a small difference
        if measure:
            assert measured is not None
            torch.testing.assert_close(coverage[row], measured, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, scoring="exact"),
        replace(CONFIG, refresh_outputs=2),
        replace(CONFIG, scoring_rows=2),
        replace(CONFIG, pooling_tokens=3),
        replace(CONFIG, coverage_alpha=0.9),
    ],
)
def test_what_needs_more_than_the_rows_own_query_is_no_ranking(config: DecodeSparsity):
    assert not PROGRESSIVE.ranks_by_sketch(config)
    assert not any(rule.ranks_by_sketch(CONFIG) for name, rule in DECODE_RULES.items() if name != "progressive")
