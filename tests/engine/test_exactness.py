"""Whatever else happens in the batch, a dense answer is the one that stock `transformers` gives, to the logit.

Greedy tokens must equal those of `generate`. Where they do not, the reference itself must have been undecided: its two best logits
there lie closer than `LOGIT_TOLERANCE`. And every output's log-probabilities (the 20 best, which the engine reports) must lie within that
tolerance of the reference's over the same tokens. Measured in float32 they differ by 2e-6, and the logits span about 7.
"""

import random

import pytest
from fake_device import drain
from tiny_models import VOCAB, greedy_reference, reference_logits

from loopserve.config import DecodeSparsity, PrefillSparsity
from loopserve.dialogue import FinishReason, Mode, QualityContract, SamplingParams, SessionId, TurnEnded, TurnRequest
from loopserve.kv.cache import Provenance

LOGIT_TOLERANCE = 2e-5
DENSE = QualityContract()
EXACT = QualityContract(mode=Mode.EXACT)
SPARSE = QualityContract(mode=Mode.SPARSE)


def random_ids(count: int, *, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(count)]


def submit(engine, inbox, session: str, prompt, *, contract=DENSE, num_branches=1, salt="", **sampling):
    params = {"max_tokens": 10, "temperature": 0.0, "ignore_eos": True, "top_logprobs": 20} | sampling
    request = TurnRequest(
        SessionId(session), tuple(prompt), SamplingParams(**params), contract, num_branches, cache_salt=salt
    )
    return engine.submit(request, inbox)


def answer(engine, inbox, session: str, prompt, **options) -> TurnEnded:
    (turn_id,) = submit(engine, inbox, session, prompt, **options)
    drain(engine)
    return inbox.ended[turn_id]


def check_logits(model, inbox, turn_id, prompt) -> None:
    """Each output's reported log-probabilities are the reference's after the same tokens."""
    ids = list(inbox.ended[turn_id].token_ids)
    logits = reference_logits(model, [*prompt, *ids])[len(prompt) - 1 : -1]
    logprobs = logits.log_softmax(dim=-1)
    assert len(inbox.logprobs[turn_id]) == len(ids) > 0
    for row, reported in zip(logprobs, inbox.logprobs[turn_id], strict=True):
        assert len(reported.top) == 20
        for candidate in (reported.chosen, *reported.top):
            assert abs(candidate.logprob - row[candidate.token_id].item()) < LOGIT_TOLERANCE
        assert abs(reported.top[0].logprob - row.max().item()) < LOGIT_TOLERANCE, "a likelier token is missing"


def check_greedy(model, inbox, turn_id, prompt) -> None:
    """The answer is `generate`'s, near-ties of the reference apart, and so is every logit that was reported."""
    ids = list(inbox.ended[turn_id].token_ids)
    expected = greedy_reference(model, list(prompt), len(ids))
    if ids != expected:
        at = next(i for i, (mine, theirs) in enumerate(zip(ids, expected, strict=True)) if mine != theirs)
        best = reference_logits(model, [*prompt, *expected[:at]])[-1].topk(2).values
        assert best[0] - best[1] < LOGIT_TOLERANCE, f"output {at} differs, and not by a near-tie"
    check_logits(model, inbox, turn_id, prompt)


def is_mixed(step) -> bool:
    return step.num_prefill_tokens > 0 and step.num_decode_tokens > 0


def test_single_turn_answers_as_generate(engine, reference, family):
    eng, inbox, _ = engine(family)
    prompt = random_ids(30)
    (turn_id,) = submit(eng, inbox, "s", prompt, max_tokens=24)
    drain(eng)
    assert len(inbox.ended[turn_id].token_ids) == 24
    check_greedy(reference(family), inbox, turn_id, prompt)


def test_batched_turns_in_chunks_beside_decodes_answer_as_generate(engine, reference, family):
    eng, inbox, stats = engine(family)
    prompts = [random_ids(count, seed=count) for count in (1, 5, 16, 17, 40, 64, 100, 130)]
    turn_ids = [submit(eng, inbox, f"s{i}", prompt)[0] for i, prompt in enumerate(prompts)]
    drain(eng)
    assert max(step.num_running for step in stats.steps) > 4
    assert sum(map(is_mixed, stats.steps)) >= 3, "chunks of some turns were to meet decodes of others"
    assert sum(step.num_prefill_tokens for step in stats.steps) == sum(map(len, prompts))
    for turn_id, prompt in zip(turn_ids, prompts, strict=True):
        check_greedy(reference(family), inbox, turn_id, prompt)


def test_turns_that_share_another_sessions_prefix_answer_as_generate(engine, reference, family):
    eng, inbox, _ = engine(family)
    opening = random_ids(70)
    answer(eng, inbox, "first", opening)
    prompts = {name: opening + random_ids(9, seed=i) for i, name in enumerate(("second", "third"))}
    turn_ids = {name: submit(eng, inbox, name, prompt)[0] for name, prompt in prompts.items()}
    stranger = submit(eng, inbox, "stranger", prompts["second"], salt="another tenant")[0]
    drain(eng)
    for name, prompt in prompts.items():
        assert inbox.ended[turn_ids[name]].usage.cached_tokens == 64, "the four full blocks"
        check_greedy(reference(family), inbox, turn_ids[name], prompt)
    assert inbox.ended[stranger].usage.cached_tokens == 0
    check_greedy(reference(family), inbox, stranger, prompts["second"])


def test_preempted_turns_answer_as_generate(engine, reference, family):
    eng, inbox, stats = engine(family, kv_blocks=10)
    prompts = [random_ids(count, seed=count) for count in (20, 35, 30, 25)]
    turn_ids = [submit(eng, inbox, f"s{i}", prompt, max_tokens=30)[0] for i, prompt in enumerate(prompts)]
    drain(eng)
    assert sum(turn.num_preemptions > 0 for turn in stats.turns) >= 1
    assert sum(step.num_preempted for step in stats.steps) == sum(turn.num_preemptions for turn in stats.turns)
    for turn_id, prompt in zip(turn_ids, prompts, strict=True):
        assert inbox.ended[turn_id].reason is FinishReason.LENGTH
        check_greedy(reference(family), inbox, turn_id, prompt)


def test_turns_beside_cancelled_ones_answer_as_generate(engine, reference, family):
    eng, inbox, _ = engine(family, max_running_turns=3)
    prompts = [random_ids(count, seed=count) for count in (40, 20, 150, 50)]
    kept, decoding, prefilling, waiting = (
        submit(eng, inbox, f"s{i}", prompt, max_tokens=20)[0] for i, prompt in enumerate(prompts)
    )
    while len(inbox.tokens.get(decoding, ())) < 2:
        eng.step()
    turns = {turn.turn_id: turn for turn in eng._scheduler.turns()}
    assert 0 < turns[prefilling].num_computed < len(prompts[2]), "to be cancelled in the middle of its prefill"
    assert turns[waiting].branch is None, "to be cancelled before it was admitted"
    for turn_id in (decoding, prefilling, waiting):
        eng.cancel(turn_id)
    after = submit(eng, inbox, "after", random_ids(60, seed=60))[0]
    drain(eng)
    for turn_id in (decoding, prefilling, waiting):
        assert inbox.ended[turn_id].reason is FinishReason.CANCELLED
    assert len(inbox.ended[decoding].token_ids) >= 2
    check_logits(reference(family), inbox, decoding, prompts[1])
    check_greedy(reference(family), inbox, kept, prompts[0])
    check_greedy(reference(family), inbox, after, random_ids(60, seed=60))
    # What was cancelled mid-prefill left exact KV behind, which its own session goes on from.
    again = answer(eng, inbox, "s2", prompts[2])
    assert again.usage.cached_tokens > 0
    check_greedy(reference(family), inbox, again.turn_id, prompts[2])


def test_branches_regenerations_and_edits_answer_as_generate(engine, reference, family):
    eng, inbox, _ = engine(family)
    prompt = random_ids(41)
    branches = submit(eng, inbox, "s", prompt, num_branches=3, temperature=1.0, seed=5, max_tokens=18)
    drain(eng)
    answers = [inbox.ended[turn_id].token_ids for turn_id in branches]
    assert len(set(answers)) == 3
    assert [inbox.ended[turn_id].usage.cached_tokens for turn_id in branches] == [0, 40, 40]
    for turn_id in branches:
        check_logits(reference(family), inbox, turn_id, prompt)
    regenerated = answer(eng, inbox, "s", prompt)
    assert regenerated.usage.cached_tokens == 40
    check_greedy(reference(family), inbox, regenerated.turn_id, prompt)
    edited_prompt = prompt[:25] + random_ids(12, seed=9)
    edited = answer(eng, inbox, "s", edited_prompt)
    assert edited.usage.cached_tokens == 25, "to the middle of a block"
    check_greedy(reference(family), inbox, edited.turn_id, edited_prompt)
    for first in answers:  # every branch is still there, and unharmed
        follow_up = [*prompt, *first, *random_ids(7, seed=3)]
        end = answer(eng, inbox, "s", follow_up)
        assert end.usage.cached_tokens == len(prompt) + len(first) - 1
        check_greedy(reference(family), inbox, end.turn_id, follow_up)


def test_five_turns_compute_only_what_each_adds_and_answer_as_generate(engine, reference, family):
    eng, inbox, stats = engine(family)
    history: list[int] = []
    for turn in range(5):
        cached = max(0, len(history) - 1)  # the last answer's last token was drawn, never computed
        history += random_ids(11 + turn * 7, seed=turn)
        end = answer(eng, inbox, "s", history)
        assert end.usage.cached_tokens == cached
        check_greedy(reference(family), inbox, end.turn_id, history)
        history += end.token_ids
    assert [turn.turn_number for turn in stats.turns] == [1, 2, 3, 4, 5]
    computed = sum(step.num_prefill_tokens + step.num_decode_tokens for step in stats.steps)
    assert computed == len(history) - 1, "every token but the last once, none twice"


@pytest.mark.parametrize("tail_len", [1, 130])
@pytest.mark.parametrize(("scoring", "refresh_outputs", "refreshes"), [("exact", 16, 4), ("sketch", 1, 20)])
def test_sparse_path_that_leaves_nothing_out_answers_as_generate(
    engine, reference, family, tail_len, scoring, refresh_outputs, refreshes
):
    eng, inbox, _ = engine(
        family,
        max_step_prefill_tokens=256,
        prefill=PrefillSparsity(chunk_tokens=256, alpha=1.0, dense_head_share=1.0, tile_tokens=32, local_tokens=32),
        decode=DecodeSparsity(budget_tokens=4096, scoring=scoring, refresh_outputs=refresh_outputs),
    )
    prompt = random_ids(256 + tail_len)
    (turn_id,) = submit(eng, inbox, "s", prompt, contract=SPARSE, max_tokens=20)
    drain(eng)
    quality = inbox.ended[turn_id].usage.quality
    assert quality.mode is Mode.SPARSE
    assert quality.dense_fallbacks == 0, "every head went the sparse way"
    assert quality.prefill_cells_computed_share == 1.0
    assert quality.refreshes == refreshes  # before outputs 2, 5, 9 and 17, or before each
    assert quality.coverage_worst_head == pytest.approx(1.0, abs=1e-5)
    assert quality.kept_tokens == quality.context_tokens > len(prompt)
    branch = eng._sessions.get(SessionId("s")).branches[0]
    assert branch.table.exact_tokens == 0, "what the sparse path computes is never called exact"
    check_greedy(reference(family), inbox, turn_id, prompt)


TINY = {
    "max_step_prefill_tokens": 128,
    "prefill": PrefillSparsity(
        chunk_tokens=128, alpha=0.3, dense_head_share=1.0, tile_tokens=16, local_tokens=16, sink_tokens=1
    ),
    "decode": DecodeSparsity(
        budget_tokens=2, budget_floor_tokens=1, sink_tokens=1, window_tokens=2, auto_min_context_tokens=64
    ),
}


def test_exact_after_sparse_turns_answers_as_generate_and_auto_goes_on_from_it(engine, reference, family):
    eng, inbox, _ = engine(family, **TINY)
    opening = random_ids(64)
    first = answer(eng, inbox, "s", opening, contract=EXACT)
    history = [*opening, *first.token_ids, *random_ids(250, seed=1)]
    exact_tokens = 64 + len(first.token_ids) - 1
    sparse = answer(eng, inbox, "s", history, contract=SPARSE)
    assert sparse.usage.cached_tokens == exact_tokens
    assert sparse.usage.quality.prefill_cells_computed_share < 0.9
    assert sparse.usage.quality.kept_tokens < sparse.usage.quality.context_tokens / 2
    assert list(sparse.token_ids) != greedy_reference(reference(family), history, 10), "nothing was left out to notice"

    history += [*sparse.token_ids, *random_ids(20, seed=2)]
    exact = answer(eng, inbox, "s", history, contract=EXACT)
    assert exact.usage.cached_tokens == exact_tokens, "nothing that came after the sparse turn"
    assert exact.usage.quality.rectified_tokens == 0
    check_greedy(reference(family), inbox, exact.turn_id, history)
    branch = max(eng._sessions.get(SessionId("s")).branches, key=lambda b: len(b.token_ids))
    assert branch.table.exact_tokens == branch.table.num_tokens
    assert {eng._cache.provenance(block) for block in branch.table.blocks[:-1]} == {Provenance.EXACT}

    history += exact.token_ids
    cached = len(history) - 1
    history += random_ids(20, seed=3)
    auto = answer(eng, inbox, "s", history)
    assert auto.usage.cached_tokens == cached
    assert auto.usage.quality.mode is Mode.AUTO
    assert auto.usage.quality.refreshes > 0, "auto decodes sparsely beyond its threshold"


def test_sparsely_decoded_answer_is_computed_again_with_the_next_prompt(engine, reference, family):
    eng, inbox, _ = engine(family, **TINY)
    history, prompt_len = random_ids(100), 0
    for turn in range(3):
        end = answer(eng, inbox, "s", history, max_tokens=21, contract=SPARSE)
        quality = end.usage.quality
        if turn > 0:
            assert end.usage.cached_tokens == prompt_len, "the last prompt, whose rows stand"
            assert quality.rectified_tokens == 20, "the last answer, but for the token that was never computed"
        prompt_len = len(history)
        history += [*end.token_ids, *random_ids(13, seed=turn)]
    # Without rectification the decoded rows would have been kept.
    kept, inbox, _ = engine(family, **(TINY | {"decode": DecodeSparsity(budget_tokens=64, rectify=False)}))
    history = random_ids(100)
    end = answer(kept, inbox, "s", history, contract=SPARSE)
    again = answer(kept, inbox, "s", [*history, *end.token_ids, 5], contract=SPARSE)
    assert (again.usage.cached_tokens, again.usage.quality.rectified_tokens) == (109, 0)


def test_same_seed_draws_the_same_alone_batched_and_preempted(engine, family):
    prompts = [random_ids(count, seed=count) for count in (20, 35, 30, 25)]
    sampling = {"temperature": 1.0, "max_tokens": 30}

    def answers(kv_blocks: int, *, together: bool) -> tuple[list, int]:
        eng, inbox, stats = engine(family, kv_blocks=kv_blocks)
        turn_ids = []
        for index, prompt in enumerate(prompts):
            turn_ids += submit(eng, inbox, f"s{index}", prompt, seed=index, **sampling)
            if not together:
                drain(eng)
        drain(eng)
        return [inbox.ended[i].token_ids for i in turn_ids], sum(turn.num_preemptions for turn in stats.turns)

    alone, _ = answers(128, together=False)
    batched, _ = answers(128, together=True)
    preempted, num_preemptions = answers(10, together=True)
    assert num_preemptions > 0
    assert alone == batched == preempted
    sampling["temperature"] = 0.0
    assert answers(128, together=True)[0] != alone, "nothing was drawn at random"


def test_logits_differ_from_the_reference_when_the_context_does(engine, reference):
    """The comparison above can fail: one changed token far back is noticed."""
    eng, inbox, _ = engine()
    prompt = random_ids(60)
    (turn_id,) = submit(eng, inbox, "s", prompt)
    drain(eng)
    changed = [(prompt[0] + 1) % VOCAB, *prompt[1:]]
    with pytest.raises(AssertionError):
        check_logits(reference("llama"), inbox, turn_id, changed)
