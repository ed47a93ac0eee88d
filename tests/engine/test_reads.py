"""What decode reads, against sums made by hand, as planned and as counted over whole turns."""

from dataclasses import replace

import pytest
from fake_device import Inbox, drain, fake_engine, small_config
from hypothesis import given
from hypothesis import strategies as st

from loopserve.config import DecodeSparsity
from loopserve.dialogue import Mode, QualityContract, SamplingParams, SessionId, TurnRequest
from loopserve.methods import DECODE_RULES
from loopserve.reads import ModelShape, budget_for_share, num_kept_tokens, planned_read_tokens

SHAPE = ModelShape(num_layers=4, num_heads=8, num_kv_heads=2, head_dim=64)
CONFIG = DecodeSparsity(
    budget_tokens=100,
    budget_floor_tokens=1,
    early_refreshes=(2,),
    refresh_outputs=4,
    measure_outputs=0,
    scoring="exact",
    sink_tokens=4,
    window_tokens=32,
)


def planned(method: str, outputs: int, *, config: DecodeSparsity = CONFIG, budget: int = 100) -> float:
    """Mean tokens' worth over an answer to a prompt of 1000 tokens."""
    config = replace(config, method=method)
    return planned_read_tokens(budget, context_tokens=1000, outputs=outputs, config=config, shape=SHAPE)


def test_dense_reads_the_context():
    assert planned("dense", 5) == (1001 + 1002 + 1003 + 1004) / 4


def test_what_is_chosen_once_at_the_prefills_end_costs_no_scoring_and_grows_by_what_comes_after():
    # sinks 4, chosen 100, window 32, and 1 to 4 tokens since the prompt
    assert planned("first_block", 5) == 136 + (1 + 2 + 3 + 4) / 4


def test_each_refresh_reads_half_a_token_for_every_key():
    # Refreshes at steps 2 and 4, which begin with nothing since: 137, 136 + 1002 / 2, 137, 136 + 1004 / 2.
    assert planned("progressive", 5) == (137 + 136 + 501 + 137 + 136 + 502) / 4


def test_every_step_of_a_choice_by_pages_reads_one_token_for_each_page():
    # 62 full pages of 1001 to 1005 tokens are summarised; 6 of them are read, and 9 to 13 tokens of the page being filled
    assert planned("quest", 6) == 62 + 96 + (9 + 10 + 11 + 12 + 13) / 5


def test_heavy_hitters_share_the_budget_with_a_window_that_slides():
    assert planned("h2o", 5) == 4 + 100 + 32


@pytest.mark.parametrize("method", ["snapkv", "pyramidkv", "adakv"])
def test_budgets_that_are_shared_out_unevenly_read_as_much_in_the_mean(method: str):
    assert planned(method, 5) == planned("first_block", 5)


def test_a_window_that_slides_reads_as_much_at_every_step():
    assert planned("streaming", 5) == 136


def test_measuring_reads_all_keys_unless_a_choice_does_anyway():
    measured = replace(CONFIG, measure_outputs=4)
    assert planned("first_block", 5, config=measured) == planned("first_block", 5) + (1004 / 2) / 4
    assert planned("progressive", 5, config=measured) == planned("progressive", 5)


def test_a_sketch_reads_a_bit_a_channel_and_a_scale_and_all_keys_where_it_is_measured():
    sketch = replace(CONFIG, scoring="sketch")  # of 64 channels: 8 bytes and 2, of the 256 that key and value take
    assert planned("progressive", 5, config=sketch) == (137 + 136 + 1002 * 10 / 256 + 137 + 136 + 1004 * 10 / 256) / 4
    every = replace(sketch, refresh_outputs=1, measure_outputs=4)  # chosen by the sketch all the same
    sketches = (1001 + 1002 + 1003 + 1004) * 10 / 256
    every = replace(every, left_out="nothing")
    assert planned("progressive", 5, config=every) == pytest.approx((4 * 136 + sketches + 1004 / 2) / 4)
    measured = replace(sketch, measure_outputs=4)  # the choice of step 4 reads the keys that its measurement reads
    assert planned("progressive", 5, config=measured) == (137 + 136 + 1002 * 10 / 256 + 137 + 136 + 1004 / 2) / 4
    measured = replace(sketch, measure_outputs=3)
    assert planned("progressive", 4, config=measured) == (137 + 136 + 1002 * 10 / 256 + 137 + 1003 / 2) / 3


def test_the_mean_value_is_read_at_every_step_that_chooses_by_the_newest_querys_sketches():
    every = replace(CONFIG, scoring="sketch", refresh_outputs=1, scoring_rows=1)
    without = planned("progressive", 5, config=replace(every, left_out="nothing"))
    assert planned("progressive", 5, config=every) == without + 0.5
    for other in (replace(every, scoring_rows=2), replace(every, refresh_outputs=2), replace(every, scoring="exact")):
        assert planned("progressive", 5, config=other) == planned(
            "progressive", 5, config=replace(other, left_out="nothing")
        )


def test_layers_that_stay_dense_count_in_full():
    config = replace(CONFIG, dense_layers=(0, 9))  # there are four layers
    assert planned("first_block", 5, config=config) == (1002.5 + 3 * 138.5) / 4


def test_a_list_for_every_query_head_reads_its_kv_head_once_for_each():
    config = replace(CONFIG, select_per="query_head")
    assert planned("streaming", 5, config=config) == 4 * 136
    assert planned("progressive", 3, config=config) == (4 * 137 + 4 * 136 + 501) / 2


def test_a_budget_over_everything_reads_everything():
    for method in DECODE_RULES:
        assert num_kept_tokens(50, 40, 40, replace(CONFIG, method=method)) == 50


@pytest.mark.parametrize("method", sorted(DECODE_RULES.keys() - {"dense"}))
@given(st.integers(1, 3000), st.integers(1, 70), st.floats(0.0, 1.2))
def test_the_budget_for_a_share_is_the_largest_that_keeps_to_it(method: str, context: int, outputs: int, share: float):
    config = replace(CONFIG, method=method)
    budget = budget_for_share(method, share, context_tokens=context, outputs=outputs, config=CONFIG, shape=SHAPE)
    steps = max(1, outputs - 1)
    most = share * (context + (steps + 1) / 2)

    def reads(budget_tokens: int) -> float:
        return planned_read_tokens(budget_tokens, context_tokens=context, outputs=steps + 1, config=config, shape=SHAPE)

    assert 0 <= budget <= context
    if budget > 0:
        assert reads(budget) <= most
    page = DECODE_RULES[method].page_tokens
    if budget + page <= context // page * page:
        assert reads(budget + page) > most


def test_the_budget_for_a_share_by_hand():
    def budget(method: str, share: float, outputs: int = 17, **settings) -> int:
        config = replace(CONFIG, early_refreshes=(4, 8), refresh_outputs=16, **settings)
        return budget_for_share(method, share, context_tokens=2000, outputs=outputs, config=config, shape=SHAPE)

    assert budget("dense", 1.0) == 2000
    assert budget("dense", 0.99) == 0
    # 10 % of 2008.5 is 200.85; sinks and window take 36, and 8.5 come on top in the mean of 16 steps
    assert budget("first_block", 0.1) == 200 - 36 - 8
    assert budget("streaming", 0.1) == 200 - 36
    # three refreshes of about 1000 in 16 steps are 188: nothing is left at 10 %, and at 20 % (401.7) about as much as before
    assert budget("progressive", 0.1) == 0
    assert budget("progressive", 0.2) == int(401.7 - (2004 + 2008 + 2016) / 2 / 16 - 36 - (6 + 6 + 28 + 0) / 16)


def request(contract: QualityContract) -> TurnRequest:
    sampling = SamplingParams(max_tokens=12, temperature=0.0, seed=1, ignore_eos=True)
    return TurnRequest(SessionId("s"), tuple(index * 7 % 20 for index in range(90)), sampling, contract)


@pytest.mark.parametrize("method", sorted(DECODE_RULES))
def test_a_turn_reports_what_was_planned_for_it(method: str):
    config = small_config(kv_blocks=200)
    engine, _ = fake_engine(config)
    inbox = Inbox()
    (turn_id,) = engine.submit(request(QualityContract(Mode.SPARSE, budget_tokens=20, decode_method=method)), inbox)
    drain(engine)
    quality = inbox.ended[turn_id].usage.quality
    assert quality.context_tokens == 90 + 6
    assert quality.read_tokens == pytest.approx(
        planned_read_tokens(
            20,
            context_tokens=90,
            outputs=12,
            config=replace(config.decode, method=method),
            shape=engine.model_shape,
        )
    )
    assert quality.kept_tokens <= quality.read_tokens <= quality.context_tokens


def test_a_dense_turn_reports_the_context():
    engine, _ = fake_engine(small_config(kv_blocks=200))
    inbox = Inbox()
    (turn_id,) = engine.submit(request(QualityContract(Mode.EXACT)), inbox)
    drain(engine)
    quality = inbox.ended[turn_id].usage.quality
    assert quality.kept_tokens == quality.read_tokens == quality.context_tokens == 96


def test_a_contract_that_wants_coverage_has_it_measured_and_reads_for_it():
    config = small_config(kv_blocks=200)
    config = replace(config, decode=replace(config.decode, measure_outputs=0, promise_outputs=5))
    reads = []
    for least in (None, 0.0):
        engine, device = fake_engine(config)
        inbox = Inbox()
        contract = QualityContract(Mode.SPARSE, least, 20, decode_method="first_block")
        (turn_id,) = engine.submit(request(contract), inbox)
        drain(engine)
        measured = [s.decode.measure for plan in device.plans for s in plan.segments if s.decode is not None]
        assert [step for step, measure in enumerate(measured, 1) if measure] == ([] if least is None else [3, 5, 10])
        reads.append(inbox.ended[turn_id].usage.quality.read_tokens)
    assert reads[1] - reads[0] == pytest.approx((93 + 95 + 100) / 2 / 11)


def test_a_promised_coverage_is_checked_now_and_then_even_where_every_step_chooses():
    config = small_config(kv_blocks=200)
    config = replace(config, decode=replace(config.decode, refresh_outputs=1, promise_outputs=6, early_refreshes=(2,)))
    engine, device = fake_engine(config)
    engine.submit(request(QualityContract(Mode.SPARSE, 0.0, 20)), Inbox())
    drain(engine)
    steps = [s.decode for plan in device.plans for s in plan.segments if s.decode is not None]
    assert len(steps) > 7 and all(step.choose for step in steps)
    assert [number for number, step in enumerate(steps, 1) if step.measure] == [2, 6]
