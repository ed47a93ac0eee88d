"""The decode methods of other papers, each against its mechanism written out."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loopserve.config import DecodeSparsity
from loopserve.sparsity.adakv import head_budgets
from loopserve.sparsity.pyramidkv import layer_budget
from tests.sparsity.conftest import NUM_HEADS, NUM_KV_HEADS, SCALE, Context, random_context
from tests.sparsity.test_decode import kept, new_selection, record, refresh

CONFIG = DecodeSparsity(budget_tokens=16, budget_floor_tokens=1, scoring_rows=4, sink_tokens=2, window_tokens=6)
GROUP = NUM_HEADS // NUM_KV_HEADS


def snapkv_scores(context: Context, num_columns: int) -> Tensor:
    """Last 32 rows' weights, summed, averaged over five positions, summed over the group: float64 [Hkv, C] of columns 2 to N - 32."""
    rows = torch.arange(max(0, num_columns - 32), num_columns)
    seen = Context(context.query, context.key_pool, context.value_pool, context.slots[:num_columns])
    summed = seen.weights(seen.query[rows], rows).sum(dim=1)[:, 2 : num_columns - 32]
    padded = torch.nn.functional.pad(summed, (2, 2))
    pooled = torch.stack([padded[:, c : c + 5].sum(dim=1) / 5 for c in range(summed.shape[1])], dim=1)
    return pooled.reshape(NUM_KV_HEADS, GROUP, -1).sum(dim=1)


def test_snapkv_keeps_the_heaviest_by_the_last_rows_pooled_weights_whatever_comes_later():
    context, selection = random_context(0, 90, sharpness=3.0), new_selection("snapkv", CONFIG)
    record(selection, context, 0, 80)
    refresh(selection, context, 80, budget_tokens=11)
    best = snapkv_scores(context, 80).topk(11, dim=1).indices + 2
    for columns, chosen in zip(kept(selection, 80), best.tolist(), strict=True):
        assert set(columns) == {0, 1, *chosen, *range(48, 80)}


@given(st.integers(0, 400), st.integers(1, 12), st.integers(0, 1500))
def test_pyramid_budgets_fall_over_the_layers_and_add_up(budget: int, num_layers: int, num_candidates: int):
    layers = [
        layer_budget(budget, layer=layer, num_layers=num_layers, num_candidates=num_candidates)
        for layer in range(num_layers)
    ]
    assert sum(layers) == num_layers * min(budget, num_candidates)
    assert all(0 <= tokens <= num_candidates for tokens in layers)
    assert all(lower <= upper + 1 for upper, lower in itertools.pairwise(layers))  # 1: rounding


def test_pyramid_budgets_span_from_nearly_twice_to_a_twentieth():
    layers = [layer_budget(100, layer=layer, num_layers=5, num_candidates=10_000) for layer in range(5)]
    assert layers == [195, 148, 100, 52, 5]
    assert [layer_budget(100, layer=layer, num_layers=2, num_candidates=196) for layer in range(2)] == [100, 100]
    assert [layer_budget(100, layer=layer, num_layers=2, num_candidates=200) for layer in range(2)] == [195, 5]
    assert [layer_budget(1000, layer=layer, num_layers=2, num_candidates=2000) for layer in range(2)] == [1950, 50]


def test_layers_that_stay_dense_have_no_part_in_the_pyramid():
    config = replace(CONFIG, dense_layers=(0, 2))
    context, selection = random_context(0, 90), new_selection("pyramidkv", config, num_layers=4)
    sizes = []
    for layer in (1, 3):
        record(selection, context, 0, 80, layer)
        refresh(selection, context, 80, budget_tokens=20, layer=layer)
        sizes.append(len(kept(selection, 80, layer)[0]) - 34)
    assert sizes == [39, 1]


def test_adakv_gives_a_head_as_much_as_it_has_among_the_best_beside_an_even_floor():
    scores = torch.zeros((2, 50))
    scores[0, :30] = 2.0 + torch.arange(30)
    scores[1, :30] = 1.0
    # Of the best 20 all are the first head's: 0.8 * 20 + 0.2 * 10 and 0.2 * 10.
    assert head_budgets(scores, 10).tolist() == [18, 2]


@given(st.integers(0, 60), st.integers(1, 60), st.integers(1, 8), st.integers(0, 99))
def test_adakv_budgets_add_up_and_no_head_gets_more_than_there_is(
    budget: int, num_candidates: int, num_heads: int, seed: int
):
    budget = min(budget, num_candidates)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand((num_heads, num_candidates), generator=generator) ** 8
    counts = head_budgets(scores, budget)
    assert int(counts.sum()) == num_heads * budget
    assert ((counts >= int(0.2 * budget)) & (counts <= num_candidates)).all()


def test_adakv_keeps_each_heads_best_by_snapkvs_scores():
    context, selection = random_context(0, 90, sharpness=3.0), new_selection("adakv", CONFIG)
    record(selection, context, 0, 80)
    refresh(selection, context, 80, budget_tokens=11)
    scores = snapkv_scores(context, 80)
    for columns, per_head, count in zip(
        kept(selection, 80), scores, head_budgets(scores.float(), 11).tolist(), strict=True
    ):
        assert set(columns) == {0, 1, *(per_head.topk(count).indices + 2).tolist(), *range(48, 80)}


def heavy_hitters(context: Context, prompt: int, steps: int, budget: int) -> list[list[set[int]]]:
    """H2O written out, [step][head]: a set of tokens that only shrinks but for the newest, and a sum of weights for each of them."""
    whole = budget + CONFIG.window_tokens
    recent = max(CONFIG.window_tokens, whole // 2)
    heavy = whole - recent
    keys = context.key_pool[context.slots].double()
    queries = context.query.double().view(-1, NUM_KV_HEADS, GROUP, context.query.shape[2])
    seen: list[list[set[int]]] = [[] for _ in range(steps)]
    for head in range(NUM_KV_HEADS):
        logits = torch.einsum("rgd,nd->grn", queries[:, head], keys[:, head]) * SCALE
        causal = torch.arange(len(keys)) > torch.arange(len(keys))[:, None]
        sums = logits.masked_fill(causal, -torch.inf).softmax(dim=2)[:, :prompt].sum(dim=(0, 1))
        alive = set(range(prompt))
        for step in range(steps):
            now = prompt + step + 1
            alive.add(now - 1)
            open_ones = sorted((t for t in alive if 2 <= t < now - recent), key=lambda t: float(sums[t]), reverse=True)
            # What there is beyond the budget is left out; one more is kept for the token that just came.
            alive -= set(open_ones[heavy:])
            tokens = sorted(alive)
            weights = logits[:, now - 1, tokens].softmax(dim=1).sum(dim=0)
            sums[tokens] += weights
            seen[step].append(set(tokens))
    return seen


@pytest.mark.parametrize("budget", [3, 14, 30])
def test_h2o_reads_what_survives_by_accumulated_weight(budget: int):
    prompt, steps = 60, 12
    context, selection = random_context(0, 80, sharpness=3.0), new_selection("h2o", CONFIG)
    record(selection, context, 0, 32)  # a prefill in two chunks
    record(selection, context, 32, prompt)
    selection.choose(0, context.key_pool, context.value_pool, context.slots[:prompt], budget_tokens=budget, scale=SCALE)
    expected = heavy_hitters(context, prompt, steps, budget)
    for step in range(steps):
        now = prompt + step + 1
        selection.record(0, context.query[now - 1 : now], torch.tensor([now - 1]))
        refresh(selection, context, now, budget_tokens=budget)
        assert [set(columns) for columns in kept(selection, now)] == expected[step]
        selection.note_read(0, context.query[now - 1 : now], context.key_pool, context.slots[:now], scale=SCALE)


def test_h2o_never_reads_again_what_it_left_out():
    context, selection = random_context(0, 80, sharpness=4.0), new_selection("h2o", CONFIG)
    record(selection, context, 0, 60)
    selection.choose(0, context.key_pool, context.value_pool, context.slots[:60], budget_tokens=20, scale=SCALE)
    gone = [set(range(60)) - set(columns) for columns in kept(selection, 60)]
    for now in range(61, 80):
        selection.record(0, context.query[now - 1 : now], torch.tensor([now - 1]))
        refresh(selection, context, now, budget_tokens=20)
        selection.note_read(0, context.query[now - 1 : now], context.key_pool, context.slots[:now], scale=SCALE)
        for columns, left_out in zip(kept(selection, now), gone, strict=True):
            assert not left_out & set(columns)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_quest_reads_the_pages_with_the_largest_bounds_under_the_current_query(num_kv_heads: int):
    context = random_context(0, 110, sharpness=3.0, num_kv_heads=num_kv_heads)
    selection = new_selection("quest", CONFIG, num_kv_heads=num_kv_heads)
    record(selection, context, 0, 100)
    for now in (101, 102, 107):
        selection.record(0, context.query[now - 1 : now], torch.tensor([now - 1]))
        refresh(selection, context, now, budget_tokens=40)  # two pages
        keys = context.key_pool[context.slots[:96]].double().view(6, 16, num_kv_heads, -1)
        query = context.query[now - 1].double().view(num_kv_heads, -1, 1, keys.shape[3])
        least, largest = keys.amin(dim=1).transpose(0, 1)[:, None], keys.amax(dim=1).transpose(0, 1)[:, None]
        bounds = torch.maximum(query * least, query * largest).sum(dim=3) * SCALE  # [Hkv, G, P]
        logits = torch.einsum("hgd,pthd->hgpt", query[:, :, 0], keys) * SCALE
        assert (logits.amax(dim=3) <= bounds + 1e-9).all()
        pages = bounds.softmax(dim=2).sum(dim=1).topk(2, dim=1).indices
        if num_kv_heads == NUM_HEADS:
            assert torch.equal(pages, bounds[:, 0].topk(2, dim=1).indices)
        for columns, best in zip(kept(selection, now), pages.tolist(), strict=True):
            assert set(columns) == {t for p in best for t in range(16 * p, 16 * p + 16)} | set(range(96, now))


def test_streaming_reads_the_newest_and_slides():
    context, selection = random_context(0, 80), new_selection("streaming", CONFIG)
    record(selection, context, 0, 60)
    selection.choose(0, context.key_pool, context.value_pool, context.slots[:60], budget_tokens=10, scale=SCALE)
    for now in (61, 70):
        refresh(selection, context, now, budget_tokens=10)
        assert kept(selection, now) == [[0, 1, *range(now - 16, now)]] * NUM_KV_HEADS


def test_a_method_that_chooses_at_every_step_is_measured_on_what_the_query_reads():
    context, selection = random_context(0, 90, sharpness=2.0), new_selection("quest", CONFIG)
    record(selection, context, 0, 80)
    selection.choose(0, context.key_pool, context.value_pool, context.slots[:80], budget_tokens=32, scale=SCALE)
    for now in (81, 82):
        selection.record(0, context.query[now - 1 : now], torch.tensor([now - 1]))
        coverage = refresh(selection, context, now, budget_tokens=32)
    seen = Context(context.query, context.key_pool, context.value_pool, context.slots[:82])
    weights = seen.weights(context.query[81:82], torch.tensor([81]))[:, 0]
    read = kept(selection, 82)
    assert coverage is not None
    expected = torch.stack([weights[h, read[h // GROUP]].sum() for h in range(NUM_HEADS)])
    torch.testing.assert_close(coverage.double(), expected, atol=1e-5, rtol=0)
