"""Sketches of the keys: kept with the blocks, read instead of the keys where a choice in decode is due."""

from dataclasses import replace

import pytest
import torch
from fake_device import drain

from loopserve.config import BLOCK_TOKENS, DecodeSparsity, EngineConfig
from loopserve.dialogue import Mode, QualityContract, SamplingParams, SessionId, TurnRequest
from loopserve.errors import ConfigError
from loopserve.kernels import KeySketch, store_sketch
from loopserve.kv.cache import Tier
from loopserve.kv.store import KVStore
from loopserve.plan import BlockCopy, BlockId
from loopserve.reads import planned_read_tokens
from loopserve.runner import bytes_a_block, num_pool_blocks

DECODE = DecodeSparsity(budget_tokens=24, budget_floor_tokens=1, scoring="sketch", refresh_outputs=3)
PROMPT = tuple(index * 37 % 251 for index in range(150))


def answer(eng, inbox, *, session: str = "s", prompt=PROMPT, **contract):
    sampling = SamplingParams(max_tokens=20, temperature=0.0, seed=1, ignore_eos=True)
    (turn_id,) = eng.submit(
        TurnRequest(SessionId(session), tuple(prompt), sampling, QualityContract(Mode.SPARSE, **contract)), inbox
    )
    drain(eng)
    return inbox.ended[turn_id]


def check_sketches(eng) -> None:
    """Every slot's sketch is that of the key that lies there."""
    store = eng._runner.store
    assert len(store.sketches) == len(store.keys)
    every = [torch.cat(tiers) for tiers in zip(store.keys, store.host_keys, strict=True)]
    for keys, sketch in zip(every, store.sketches, strict=True):
        written = keys.ne(0).any(dim=2).any(dim=1).nonzero()[:, 0]
        assert len(written) > 0
        expected = KeySketch.empty(*keys.shape, "cpu")
        store_sketch(keys[written], expected, written)
        assert torch.equal(sketch.signs, expected.signs)
        assert torch.equal(sketch.scales, expected.scales)


def test_every_key_in_the_pools_has_its_sketch_through_turns_branches_offloads_and_erasure(engine):
    eng, inbox, _ = engine(decode=DECODE)
    first = answer(eng, inbox)
    answer(eng, inbox, prompt=(*PROMPT, *first.token_ids, 3, 4, 5))
    answer(eng, inbox, prompt=(*PROMPT[:101], 7, 8, 9))  # an edit: a part block is copied
    assert eng._sessions.evict_one()  # to host memory
    answer(eng, inbox, session="other", prompt=PROMPT[:70])
    assert eng.occupancy(Tier.HOST).warm > 0
    check_sketches(eng)
    eng.release(SessionId("s"))
    check_sketches(eng)


def test_no_sketch_is_kept_where_nothing_reads_it(engine):
    eng, _, _ = engine(decode=DecodeSparsity(scoring="exact"))
    assert eng._runner.store.sketches == []


def test_blocks_are_copied_and_erased_with_their_sketches():
    shape = {"num_layers": 2, "num_blocks": 3, "num_kv_heads": 2, "head_dim": 8}
    store = KVStore(**shape, dtype=torch.float32, device=torch.device("cpu"), sketch=True)
    for sketch in store.sketches:
        store_sketch(torch.randn(16, 2, 8), sketch, torch.arange(16, 32))
    store.copy_blocks([BlockCopy(BlockId(1), BlockId(2))])
    for sketch in store.sketches:
        for pool in (sketch.signs, sketch.scales):
            assert torch.equal(pool[16:32], pool[32:48]) and pool[16:32].any()
    store.erase_blocks([BlockId(1)])
    for sketch in store.sketches:
        for pool in (sketch.signs, sketch.scales):
            assert not pool[16:32].any() and pool[32:48].any()


def test_memory_of_a_block_counts_its_sketch(engine):
    with_sketch, _, _ = engine(decode=DECODE, host_blocks=0)
    without, _, _ = engine(decode=replace(DECODE, scoring="exact"))
    loaded, store = with_sketch._loaded, with_sketch._runner.store
    head_bytes = -(-loaded.head_dim // 8) + 2
    more = loaded.num_layers * loaded.num_kv_heads * BLOCK_TOKENS * head_bytes
    assert with_sketch.memory().block_bytes - without.memory().block_bytes == more
    assert store.device_bytes == 128 * with_sketch.memory().block_bytes
    config = EngineConfig(kv_bytes_max=10_000_000, decode=DECODE)
    assert num_pool_blocks(loaded, config) == 10_000_000 // bytes_a_block(loaded, config)


@pytest.mark.parametrize("select_per", ["kv_head", "query_head"])
def test_a_budget_over_everything_answers_as_exact_scoring_does(engine, select_per: str):
    answers = []
    for scoring in ("exact", "sketch"):
        eng, inbox, _ = engine(decode=replace(DECODE, scoring=scoring, select_per=select_per))
        answers.append(answer(eng, inbox, budget_tokens=1000, prefill_method="dense").token_ids)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("select_per", ["kv_head", "query_head"])
def test_the_mean_value_of_what_is_left_out_changes_answers_only_where_something_is(engine, select_per: str):
    every = replace(DECODE, refresh_outputs=1, select_per=select_per)
    answers = {}
    for left_out in ("mean", "nothing"):
        for budget_tokens in (4, 1000):
            eng, inbox, _ = engine(decode=replace(every, left_out=left_out))
            ended = answer(eng, inbox, budget_tokens=budget_tokens, prefill_method="dense")
            answers[left_out, budget_tokens] = ended.token_ids
    assert answers["mean", 1000] == answers["nothing", 1000]
    assert answers["mean", 4] != answers["nothing", 4]


def test_choices_by_sketch_are_due_as_often_and_read_less(engine):
    ended = {}
    for scoring in ("exact", "sketch"):
        eng, inbox, _ = engine(decode=replace(DECODE, scoring=scoring))
        ended[scoring] = answer(eng, inbox).usage.quality
    exact, sketch = ended["exact"], ended["sketch"]
    assert exact.refreshes == sketch.refreshes == 9  # the first, 3, 4, 6, 8, 9, 12, 15 and 18
    assert exact.kept_tokens == sketch.kept_tokens
    assert sketch.read_tokens < exact.read_tokens
    assert sketch.coverage_mean is not None, "measured at step 16"
    for scoring, quality in ended.items():
        planned = planned_read_tokens(
            24, context_tokens=150, outputs=20, config=replace(DECODE, scoring=scoring), shape=eng.model_shape
        )
        assert quality.read_tokens == pytest.approx(planned)


def test_an_unknown_stand_in_for_what_is_left_out_is_refused():
    with pytest.raises(ConfigError, match=r"decode\.left_out 'median'"):
        DecodeSparsity(left_out="median")


def test_an_unknown_scoring_is_refused():
    with pytest.raises(ConfigError, match=r"decode\.scoring 'guess'"):
        DecodeSparsity(scoring="guess")
