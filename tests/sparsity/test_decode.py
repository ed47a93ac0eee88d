"""Phase 2 of one turn: when tokens are chosen, which are kept, and how good the choice was."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loopserve.config import DecodeSparsity
from loopserve.kernels import KeySketch, sketch_scores, store_sketch
from loopserve.methods import DECODE_RULES
from loopserve.reads import num_kept_tokens
from loopserve.sparsity import DECODE_METHODS, TurnSelection
from loopserve.sparsity.progressive import heaviest
from tests.sparsity.conftest import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, SCALE, Context, random_context

CONFIG = DecodeSparsity(
    budget_tokens=16,
    budget_floor_tokens=1,
    refresh_outputs=16,
    scoring_rows=4,
    sink_tokens=2,
    window_tokens=6,
    pooling_tokens=3,
)


def new_selection(
    method: str = "progressive",
    config: DecodeSparsity = CONFIG,
    num_layers: int = 1,
    *,
    num_kv_heads: int = NUM_KV_HEADS,
) -> TurnSelection:
    return TurnSelection(
        num_layers,
        NUM_HEADS,
        num_kv_heads,
        HEAD_DIM,
        config,
        DECODE_METHODS[method],
        device="cpu",
        dtype=torch.float32,
        value_sums=torch.full((num_layers, num_kv_heads, HEAD_DIM), torch.nan),  # begun by a choice
    )


def record(selection: TurnSelection, context: Context, first: int, last: int, layer: int = 0) -> None:
    """Observe the rows of a context that holds a query for every position, as a prefill of them would."""
    selection.observe(
        layer, context.query[first:last], torch.arange(first, last), context.key_pool, context.slots[:last], scale=SCALE
    )


def refresh(
    selection: TurnSelection, context: Context, num_columns: int, budget_tokens: int = 16, layer: int = 0
) -> Tensor | None:
    return selection.refresh(
        layer, context.key_pool, context.slots[:num_columns], budget_tokens=budget_tokens, scale=SCALE
    )


def choose(
    selection: TurnSelection, context: Context, num_columns: int, budget_tokens: int = 16, layer: int = 0
) -> None:
    selection.choose(
        layer,
        context.key_pool,
        context.value_pool,
        context.slots[:num_columns],
        budget_tokens=budget_tokens,
        scale=SCALE,
    )


def kept(selection: TurnSelection, num_columns: int, layer: int = 0) -> list[list[int]]:
    """Valid columns of each list, as they are listed."""
    columns, valid = selection.kept_columns(layer, num_columns)
    if valid is None:
        return columns.tolist()
    return [row[ok].tolist() for row, ok in zip(columns, valid, strict=True)]


def test_refreshes_are_due_at_the_documented_steps():
    config = DecodeSparsity(early_refreshes=(4, 8), refresh_outputs=16)
    due = {name: [k for k in range(1, 50) if rule.choice_due(k, config)] for name, rule in DECODE_RULES.items()}
    assert due.pop("progressive") == [4, 8, 16, 32, 48]
    for name in ("streaming", "h2o", "quest"):
        assert due.pop(name) == list(range(1, 50))
    assert set(map(tuple, due.values())) == {()}


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(sorted(DECODE_METHODS)),
    st.sampled_from(["kv_head", "query_head"]),
    st.sampled_from([1, 2, 4]),  # KV heads, of four query heads
    st.integers(1, 60),
    st.integers(0, 12),
    st.integers(1, 80),
    st.sampled_from([None, 0.3, 1.0]),
)
def test_what_is_always_kept_is_and_the_rest_is_within_the_budget_of_all_layers_and_heads(
    method: str,
    select_per: str,
    num_kv_heads: int,
    at_choice: int,
    later: int,
    budget_tokens: int,
    coverage_alpha: float | None,
):
    config = replace(CONFIG, method=method, select_per=select_per, coverage_alpha=coverage_alpha)
    context = random_context(0, 80, num_kv_heads=num_kv_heads)
    selection = new_selection(method, config, 3, num_kv_heads=num_kv_heads)
    layout = DECODE_RULES[method].layout(at_choice, budget_tokens, config)
    num_columns, lists = at_choice + later, []
    always = {*range(layout.num_sinks), *range(layout.recent_start, num_columns)}
    for layer in range(3):
        record(selection, context, 0, at_choice, layer)
        choose(selection, context, at_choice, budget_tokens=budget_tokens, layer=layer)
        lists += kept(selection, num_columns, layer)
    assert len(lists) == 3 * (num_kv_heads if select_per == "kv_head" else NUM_HEADS)
    for columns in lists:
        assert len(set(columns)) == len(columns)
        assert always <= set(columns) <= set(range(num_columns))
    told = num_kept_tokens(num_columns, at_choice, budget_tokens, config) * len(lists)
    assert sum(map(len, lists)) <= told
    if coverage_alpha is None:
        assert sum(map(len, lists)) == told
    if method != "dense":
        rule = DECODE_RULES[method]
        window = CONFIG.window_tokens if rule.window_tokens is None else rule.window_tokens
        both = budget_tokens + CONFIG.sink_tokens + window + rule.page_tokens
        assert told <= (both + later) * len(lists)


@pytest.mark.parametrize("method", DECODE_METHODS)
@pytest.mark.parametrize("num_kv_heads", [1, 4])
@pytest.mark.parametrize("at_choice", [1, 2, 7, 50])
def test_a_budget_of_the_whole_context_keeps_every_column_once(method: str, num_kv_heads: int, at_choice: int):
    context = random_context(0, 60, num_kv_heads=num_kv_heads)
    selection = new_selection(method, num_layers=2, num_kv_heads=num_kv_heads)
    for layer in range(2):
        record(selection, context, 0, at_choice, layer)
        refresh(selection, context, at_choice, budget_tokens=60, layer=layer)
        for columns in kept(selection, 60, layer):
            assert sorted(columns) == list(range(60))


@pytest.mark.parametrize("method", DECODE_METHODS)
def test_the_same_rows_choose_the_same_tokens(method: str):
    context = random_context(0, 60, sharpness=2.0)
    chosen = []
    for _ in range(2):
        selection = new_selection(method)
        record(selection, context, 0, 50)
        refresh(selection, context, 50, budget_tokens=17)
        chosen.append(kept(selection, 50))
    assert chosen[0] == chosen[1]


def test_the_heaviest_candidates_by_pooled_group_scores_are_chosen():
    context, selection = random_context(0, 60, sharpness=3.0), new_selection()
    record(selection, context, 0, 60)
    refresh(selection, context, 60, budget_tokens=9)
    scores = context.weights(context.query[56:60], torch.arange(56, 60)).sum(dim=1)[:, 2:54]  # candidates of [H, N]
    pooled = torch.stack([scores[:, max(0, c - 1) : c + 2].max(dim=1).values for c in range(52)], dim=1)
    per_list = pooled.reshape(NUM_KV_HEADS, -1, 52).sum(dim=1)
    for columns, ranked in zip(kept(selection, 60), per_list.argsort(dim=1, descending=True), strict=True):
        assert set(columns) == {0, 1, *(ranked[:9] + 2).tolist(), *range(54, 60)}


def test_only_the_newest_rows_score_however_they_were_recorded():
    context = random_context(0, 60)
    at_once, one_by_one = new_selection(), new_selection()
    record(at_once, context, 0, 50)
    for row in range(41, 50):
        record(one_by_one, context, row, row + 1)
    for selection in (at_once, one_by_one):
        refresh(selection, context, 50)
    assert [set(c) for c in kept(at_once, 50)] == [set(c) for c in kept(one_by_one, 50)]


@pytest.mark.parametrize("num_steps", [1, 3, 4, 9])  # fewer rows than the ring, as many, more
@pytest.mark.parametrize("select_per", ["kv_head", "query_head"])
@pytest.mark.parametrize("coverage_alpha", [None, 0.5])
def test_coverage_is_the_weight_that_the_old_choice_held_under_the_queries_that_used_it(
    num_steps: int, select_per: str, coverage_alpha: float | None
):
    config = replace(CONFIG, select_per=select_per, coverage_alpha=coverage_alpha)
    context, selection = random_context(0, 60, sharpness=2.0), new_selection(config=config)
    record(selection, context, 0, 40)
    assert refresh(selection, context, 40, budget_tokens=5) is None
    num_columns = 40 + num_steps
    record(selection, context, 40, num_columns)
    old = kept(selection, num_columns)
    coverage = refresh(selection, context, num_columns, budget_tokens=5)
    used = torch.arange(max(40, num_columns - 4), num_columns)
    whole = Context(context.query, context.key_pool, context.value_pool, context.slots[:num_columns])
    weights = whole.weights(context.query[used], used).mean(dim=1)  # [H, N]
    expected = torch.stack([weights[h, old[h * len(old) // NUM_HEADS]].sum() for h in range(NUM_HEADS)])
    assert coverage is not None
    torch.testing.assert_close(coverage.double(), expected, atol=1e-5, rtol=0)


def test_where_every_step_chooses_by_sketches_the_choice_is_measured_by_the_keys_under_the_query_that_uses_it():
    config = replace(CONFIG, refresh_outputs=1, scoring_rows=1, pooling_tokens=1)
    context, selection = random_context(0, 60, sharpness=2.0), new_selection(config=config)
    sketch = KeySketch.empty(len(context.key_pool), NUM_KV_HEADS, HEAD_DIM, "cpu")
    store_sketch(context.key_pool[context.slots], sketch, context.slots)
    record(selection, context, 0, 50)
    refresh(selection, context, 50, budget_tokens=5)
    record(selection, context, 50, 51)
    pool, slots = context.key_pool, context.slots[:51]
    coverage = selection.refresh(0, pool, slots, budget_tokens=5, scale=SCALE, sketch=sketch)
    by_sketch = sketch_scores(
        context.query[50:51], sketch, slots[None], torch.tensor([51]), num_lists=NUM_KV_HEADS, scale=SCALE
    ).weights
    best = by_sketch[0, :, 2:45].topk(5, dim=1).indices + 2
    now = kept(selection, 51)
    assert [set(columns) for columns in now] == [{0, 1, *row, *range(45, 51)} for row in best.tolist()]
    weights = Context(context.query, pool, context.value_pool, slots).weights(context.query[50:51], torch.tensor([50]))
    held = torch.stack([weights[h, 0, now[h * len(now) // NUM_HEADS]].sum() for h in range(NUM_HEADS)])
    assert coverage is not None
    torch.testing.assert_close(coverage.double(), held, atol=1e-5, rtol=0)


def chosen_by_sketch(config: DecodeSparsity, *, budget_tokens: int, num_columns: int = 51):
    """A selection that chose by sketches that are the keys: these have one size in every channel."""
    context, selection = random_context(0, 60, sharpness=2.0), new_selection(config=config)
    context.key_pool[context.slots] = context.key_pool[context.slots].sign() * 0.5
    sketch = KeySketch.empty(len(context.key_pool), NUM_KV_HEADS, HEAD_DIM, "cpu")
    store_sketch(context.key_pool[context.slots], sketch, context.slots)
    record(selection, context, 0, num_columns)
    slots = context.slots[:num_columns]
    choose(selection, context, num_columns)
    selection.refresh(
        0, context.key_pool, slots, budget_tokens=budget_tokens, scale=SCALE, measure=False, sketch=sketch
    )
    return context, selection


def test_what_is_left_out_weighs_what_it_would_have_and_is_taken_for_the_mean_value():
    config = replace(CONFIG, refresh_outputs=1, scoring_rows=1, pooling_tokens=1)
    context, selection = chosen_by_sketch(config, budget_tokens=5)
    left_out = selection.left_out(0, 51)
    assert left_out is not None
    group = NUM_HEADS // NUM_KV_HEADS
    for head in range(NUM_HEADS):
        kv_head, read = head // group, kept(selection, 51)[head * len(kept(selection, 51)) // NUM_HEADS]
        others = [column for column in range(51) if column not in read]
        logits = context.key_pool[context.slots[others], kv_head].double() @ context.query[50, head].double() * SCALE
        torch.testing.assert_close(left_out.log_weight[0, head].double(), logits.logsumexp(0), atol=1e-4, rtol=0)
    values = context.value_pool[context.slots[:51]].double().mean(dim=0)
    torch.testing.assert_close(left_out.value[0].double(), values, atol=1e-5, rtol=0)


def test_where_everything_is_read_nothing_is_left_out():
    config = replace(CONFIG, refresh_outputs=1, scoring_rows=1, pooling_tokens=1)
    _, selection = chosen_by_sketch(config, budget_tokens=1000)
    left_out = selection.left_out(0, 51)
    assert left_out is not None
    assert (left_out.log_weight < -9).all(), "no more than rounding, beside tokens that weigh about one"


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, refresh_outputs=1, scoring_rows=1, left_out="nothing"),
        replace(CONFIG, refresh_outputs=2, scoring_rows=1),
        replace(CONFIG, refresh_outputs=1, scoring_rows=2),
        replace(CONFIG, refresh_outputs=1, scoring_rows=1, scoring="exact"),
    ],
)
def test_nothing_stands_for_what_nobody_weighed(config: DecodeSparsity):
    _, selection = chosen_by_sketch(config, budget_tokens=5)
    assert selection.left_out(0, 51) is None


def test_a_choice_at_the_prefills_end_is_the_one_that_a_refresh_would_make_and_nothing_has_used_it_yet():
    context = random_context(0, 60, sharpness=3.0)
    at_end, later = new_selection(), new_selection()
    for selection in (at_end, later):
        record(selection, context, 0, 50)
    choose(at_end, context, 50, budget_tokens=9)
    refresh(later, context, 50, budget_tokens=9)
    assert kept(at_end, 50) == kept(later, 50)
    assert at_end.refresh(0, context.key_pool, context.slots[:50], budget_tokens=9, scale=SCALE, choose=False) is None


def test_a_choice_is_measured_on_rows_since_it_was_made_and_on_each_of_them_once():
    context, selection = random_context(0, 60, sharpness=2.0), new_selection()
    record(selection, context, 0, 40)
    refresh(selection, context, 40, budget_tokens=5)
    record(selection, context, 40, 42)
    pool, slots = context.key_pool, context.slots[:44]
    assert selection.refresh(0, pool, slots[:42], budget_tokens=5, scale=SCALE, measure=False) is None
    in_use = kept(selection, 44)
    record(selection, context, 42, 44)
    coverage = selection.refresh(0, pool, slots, budget_tokens=5, scale=SCALE, choose=False)
    assert selection.refresh(0, pool, slots, budget_tokens=5, scale=SCALE, choose=False) is None
    used = torch.arange(42, 44)
    weights = Context(context.query, pool, context.value_pool, slots).weights(context.query[used], used).mean(dim=1)
    expected = torch.stack([weights[h, in_use[h * len(in_use) // NUM_HEADS]].sum() for h in range(NUM_HEADS)])
    assert coverage is not None
    torch.testing.assert_close(coverage.double(), expected, atol=1e-5, rtol=0)


def test_a_budget_takes_effect_at_the_next_refresh():
    context, selection = random_context(0, 60), new_selection()
    record(selection, context, 0, 50)
    sizes = []
    for budget_tokens in (20, 3, 30):
        refresh(selection, context, 50, budget_tokens)
        sizes.append(len(kept(selection, 50)[0]))
        assert [len(columns) for columns in kept(selection, 50)] == [sizes[-1]] * NUM_KV_HEADS
    assert sizes == [2 + 20 + 6, 2 + 3 + 6, 2 + 30 + 6]


def test_coverage_mode_keeps_no_more_than_its_share_needs():
    choice = heaviest(torch.tensor([[1.0, 8.0, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0]]), 3, coverage_alpha=0.7)
    assert choice.indices[0, 0] == 1
    assert choice.valid is not None
    assert choice.valid.tolist() == [[True, False, False], [True, True, True]]  # the budget is a ceiling


def test_a_later_choice_brings_back_what_an_earlier_one_left_out():
    context, selection = random_context(0, 60, sharpness=4.0), new_selection()
    record(selection, context, 0, 50)
    refresh(selection, context, 50, budget_tokens=4)
    before = [set(columns) for columns in kept(selection, 50)]
    record(selection, context, 50, 54)
    refresh(selection, context, 54, budget_tokens=4)
    after = [{c for c in columns if c < 44} for columns in kept(selection, 54)]
    assert any(new - old for old, new in zip(before, after, strict=True))


def test_layers_choose_apart_and_may_be_left_out():
    context, selection = random_context(0, 60), new_selection(num_layers=3)
    for layer, last in ((0, 50), (2, 44)):
        record(selection, context, 0, last, layer)
        refresh(selection, context, 50, budget_tokens=5, layer=layer)
    assert kept(selection, 50, 0) != kept(selection, 50, 2)
    with pytest.raises(AssertionError, match="must choose"):
        selection.kept_columns(1, 50)


def test_a_choice_that_is_never_made_again_is_still_measured() -> None:
    config = DecodeSparsity(budget_tokens=8, budget_floor_tokens=1, window_tokens=2, sink_tokens=1, scoring_rows=4)
    torch.manual_seed(0)
    keys = torch.randn(80, 1, 8)
    selection = TurnSelection(1, 2, 1, 8, config, DECODE_METHODS["first_block"], device="cpu", dtype=torch.float32)
    selection.record(0, torch.randn(3, 2, 8), torch.arange(57, 60))
    assert selection.refresh(0, keys, torch.arange(60), budget_tokens=8, scale=0.35) is None
    before = selection.kept_columns(0, 70)[0]
    selection.record(0, torch.randn(1, 2, 8), torch.tensor([69]))
    coverage = selection.refresh(0, keys, torch.arange(70), budget_tokens=8, scale=0.35, choose=False)
    assert coverage is not None and (coverage > 0).all() and (coverage < 1).all()
    assert torch.equal(selection.kept_columns(0, 70)[0], before)
