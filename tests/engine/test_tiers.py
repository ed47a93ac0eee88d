"""Where KV lies changes no answer: compact turns, offloads, recalls and parked turns against the run in which nothing ever left the device.

Real (tiny) models. Tokens must be equal, and where all rows are sparse the log-probabilities of the chosen ones, too, to the last bit: a
compact turn reads the same keys and values in the same order, from other places.
"""

import random
from dataclasses import replace

import pytest
from fake_device import drain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB

from loopserve.config import DecodeSparsity, PrefillSparsity
from loopserve.dialogue import Mode, QualityContract, SamplingParams, SessionId, TurnRequest
from loopserve.kv.cache import Tier

DECODE = DecodeSparsity(budget_tokens=32, budget_floor_tokens=1, sink_tokens=2, measure_outputs=3)
WAYS = {
    "by sketch, every output": DECODE,
    "by keys, every output": replace(DECODE, scoring="exact"),
    "by keys, every 5 outputs": replace(DECODE, scoring="exact", refresh_outputs=5),
    "by sketch, every 5 outputs": replace(DECODE, refresh_outputs=5),
    "pooled": replace(DECODE, pooling_tokens=3, scoring_rows=4),
    "as many as hold a share": replace(DECODE, scoring="exact", coverage_alpha=0.7),
    "once, by the last rows": replace(DECODE, method="snapkv"),
    "once, by the last 16 rows": replace(DECODE, method="first_block"),
    "nothing for what is left out": replace(DECODE, left_out="nothing"),
}


def random_ids(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB - 4) for _ in range(count)]


class Dialogues:
    """Some conversations side by side, greedy, each turn after all of the one before."""

    def __init__(self, eng, inbox, *, mode=Mode.SPARSE, max_tokens=20) -> None:
        self.eng, self.inbox = eng, inbox
        self.mode, self.max_tokens = mode, max_tokens
        self.histories: dict[str, list[int]] = {}
        self.answers: list[tuple[list[int], list[float]]] = []

    def turn(self, lengths: dict[str, int], *, seed: int, contract=None) -> None:
        """One turn of each of these sessions, with so many new tokens."""
        sampling = SamplingParams(max_tokens=self.max_tokens, temperature=0.0, ignore_eos=True, top_logprobs=0)
        turns = {}
        for number, (session, length) in enumerate(lengths.items()):
            prompt = self.histories.get(session, []) + random_ids(length, seed * 100 + number)
            request = TurnRequest(SessionId(session), tuple(prompt), sampling, contract or QualityContract(self.mode))
            (turns[session],) = self.eng.submit(request, self.inbox)
            self.histories[session] = prompt
        drain(self.eng)
        self.eng.check()
        for session, turn_id in turns.items():
            tokens = list(self.inbox.ended[turn_id].token_ids)
            assert len(tokens) == self.max_tokens
            self.histories[session] += tokens
            self.answers.append((tokens, [position.chosen.logprob for position in self.inbox.logprobs[turn_id]]))


def three_turns(engine, **overrides) -> Dialogues:
    family = overrides.pop("family", "llama")
    eng, inbox, _ = engine(family, **({"prefill": PrefillSparsity(chunk_tokens=32)} | overrides))
    dialogues = Dialogues(eng, inbox)
    dialogues.turn({"a": 150, "b": 90, "c": 40}, seed=1)
    dialogues.turn({"a": 33, "c": 120}, seed=2)
    dialogues.turn({"a": 1, "b": 17, "c": 3}, seed=3)
    return dialogues


@pytest.mark.parametrize("way", WAYS)
def test_compact_turns_answer_as_resident_ones_do(engine, way: str):
    resident = three_turns(engine, decode=WAYS[way], host_blocks=0)
    compact = three_turns(engine, decode=WAYS[way], host_blocks=200, compact_above_ratio=0.0)
    assert compact.answers == resident.answers
    memory = compact.eng.memory()
    assert memory.pressure.compacted_turns == 8 and memory.host_blocks.warm > 0


def test_every_family_answers_alike(engine, family: str):
    resident = three_turns(engine, family=family, decode=DECODE, host_blocks=0)
    compact = three_turns(engine, family=family, decode=DECODE, host_blocks=200, compact_above_ratio=0.0)
    assert compact.answers == resident.answers


@pytest.mark.parametrize("mode", [Mode.SPARSE, Mode.EXACT])
def test_sessions_that_went_to_host_memory_come_back_as_they_were(engine, mode: Mode):
    runs = []
    for kv_blocks, host_blocks in ((128, 0), (13, 200)):
        eng, inbox, _ = engine(decode=DECODE, kv_blocks=kv_blocks, host_blocks=host_blocks)
        dialogues = Dialogues(eng, inbox, mode=mode)
        for seed in range(3):
            for session in "abc":
                dialogues.turn({session: 60 if seed == 0 else 11}, seed=seed)
        runs.append(dialogues)
    assert runs[0].answers == runs[1].answers
    assert runs[1].eng.memory().pressure.offloaded_sessions >= 3
    assert runs[1].eng.memory().pressure.dropped_sessions == 0


def test_a_long_history_is_prefilled_dense_from_host_memory_too(engine):
    """Where lines are not worth it, a chunk reads all of the history through the stage."""
    runs = []
    for ratio, host_blocks in ((1.0, 0), (0.0, 200)):
        prefill = PrefillSparsity(method="dense", chunk_tokens=32)
        eng, inbox, _ = engine(decode=DECODE, prefill=prefill, host_blocks=host_blocks, compact_above_ratio=ratio)
        dialogues = Dialogues(eng, inbox)
        dialogues.turn({"a": 200}, seed=1)
        dialogues.turn({"a": 70}, seed=2)
        runs.append(dialogues)
    assert runs[0].answers == runs[1].answers
    assert runs[1].eng._runner._stage.device_bytes > 0, "nothing went through the stage"


def test_branches_of_a_compact_turn_share_host_blocks_and_choose_for_themselves(engine):
    answers = []
    for host_blocks in (0, 300):
        eng, inbox, _ = engine(decode=DECODE, host_blocks=host_blocks, compact_above_ratio=0.0)
        sampling = SamplingParams(max_tokens=25, temperature=1.0, seed=3, ignore_eos=True)
        request = TurnRequest(
            SessionId("s"), tuple(random_ids(150, 1)), sampling, QualityContract(Mode.SPARSE), num_branches=3
        )
        turn_ids = eng.submit(request, inbox)
        most_held = 0
        while eng.step():
            eng.check()
            most_held = max(most_held, eng.occupancy(Tier.HOST).active)
        answers.append([inbox.ended[turn_id].token_ids for turn_id in turn_ids])
    assert answers[0] == answers[1] and len(set(answers[1])) == 3
    assert 0 < most_held < 3 * 9, "the prompt of three branches lies in host memory once"


def test_late_recall_reads_what_was_chosen_before_and_gets_there(engine):
    """Not the same answer: but what is read late is not lost, and coverage tells what was read."""
    eng, inbox, _ = engine(
        decode=replace(DECODE, recall="late", measure_outputs=1), host_blocks=200, compact_above_ratio=0.0
    )
    dialogues = Dialogues(eng, inbox, max_tokens=40)
    dialogues.turn({"a": 300}, seed=1)
    late = next(iter(inbox.ended.values())).usage.quality
    now = three_turns(engine, decode=DECODE, host_blocks=200, compact_above_ratio=0.0)
    assert late.coverage_mean is not None and 0.0 < late.coverage_mean <= 1.0
    assert now.eng._runner.store.host_keys[0].shape[0] > 0


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_under_any_pressure_the_tokens_are_those_of_a_run_without_any(engine, data):
    """Random conversations in a pool too small for them, beside the same ones in a pool for all. Budgets stay, nobody is recomputed."""
    scoring = data.draw(st.sampled_from(["exact", "sketch"]))
    decode = replace(DECODE, scoring=scoring, budget_tokens=data.draw(st.sampled_from([8, 32])))
    kv_blocks = data.draw(st.integers(16, 40))
    # No rung below the budget: under pressure no budget is lowered.
    decode = replace(decode, budget_floor_tokens=decode.budget_tokens)
    small, inbox, _ = engine(decode=decode, kv_blocks=kv_blocks, host_blocks=400)
    large, large_inbox, _ = engine(decode=decode, kv_blocks=400, host_blocks=0)
    small.set_compact_above(data.draw(st.sampled_from([0.0, 0.5, 1.0])))
    runs = [Dialogues(small, inbox, max_tokens=12), Dialogues(large, large_inbox, max_tokens=12)]
    for seed in range(data.draw(st.integers(1, 4))):
        sessions = data.draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True))
        lengths = {session: data.draw(st.integers(1, 60)) for session in sessions}
        mode = data.draw(st.sampled_from([Mode.SPARSE, Mode.AUTO]))
        for run in runs:
            run.turn(lengths, seed=seed, contract=QualityContract(mode))
    (pressed, at_rest) = (run.answers for run in runs)
    assert [tokens for tokens, _ in pressed] == [tokens for tokens, _ in at_rest]
    for (_, logprobs), (_, expected) in zip(pressed, at_rest, strict=True):
        assert logprobs == pytest.approx(
            expected, abs=1e-5
        )  # dense rows of a batch are read as one view, or through their slots
