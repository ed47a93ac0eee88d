"""How the runner lays out rows: what is read as one view, and what a view must never show."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import loaded_model

from loopserve.attention import RunGroup
from loopserve.config import EngineConfig
from loopserve.dialogue import SamplingParams, SessionId, TurnEnded, TurnRequest
from loopserve.engine import Engine
from loopserve.layout import equally_spaced


@given(st.sets(st.integers(0, 60), max_size=12))
def test_equally_spaced_parts_hold_every_number_once(starts):
    parts = equally_spaced(sorted(starts))
    assert sorted(number for part in parts for number in part) == sorted(starts)
    for part in parts:
        assert len({b - a for a, b in itertools.pairwise(part)}) <= 1


def test_numbers_at_one_distance_are_one_part():
    assert equally_spaced([16, 1040, 2064, 3088]) == [[16, 1040, 2064, 3088]]


def test_run_group_views_each_context_where_it_lies():
    pool = torch.arange(40.0).view(20, 2, 1)
    group = RunGroup(first_slot=3, spacing_slots=5, num_rows=3, num_tokens=4, bias=None)
    view = group.read(pool)  # [R, Hkv, M, D]
    for row in range(3):
        first = 3 + 5 * row
        assert torch.equal(view[row], pool[first : first + 4].transpose(0, 1))


def test_what_is_not_finite_never_enters_the_pool_where_a_neighbours_view_would_see_it():
    loaded = loaded_model("llama")
    engine = Engine(EngineConfig(kv_blocks=300), loaded=loaded)
    prompts = [tuple(range(first, first + length)) for first, length in ((0, 40), (50, 33), (90, 40))]
    alone = [_answers(engine, [prompt])[0] for prompt in prompts]
    store = engine._runner.store
    for pool in (*store.keys, *store.values):
        assert pool.isfinite().all()
    # A checkpoint that overflows for one token must not reach the turns beside it.
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[200] = float("inf")
    together = _answers(engine, [*prompts, (1, 200, 3)])
    assert together[:3] == alone
    for pool in (*store.keys, *store.values):
        assert pool.isfinite().all()


def _answers(engine, prompts):
    ended = {}

    def listen(events):
        ended.update({event.turn_id: event for event in events if isinstance(event, TurnEnded)})

    ids = [
        engine.submit(
            TurnRequest(SessionId(f"{prompt}"), prompt, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)),
            listen,
        )[0]
        for prompt in prompts
    ]
    while engine.step():
        pass
    return [list(ended[turn_id].token_ids) for turn_id in ids]
