"""A device without a model: what a step would read and write, small enough to check every slot of it.

The "KV" of a token is a digest of the digest that lies one position before it, read through the turn's block table as attention
would, and of the token itself. So a slot holds the right digest only if everything before it was right too, and a wrong block, a
late copy or a stale table shows in the first row that reads it. Every slot also says whose it is and whether it is exact.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import torch

from loopserve.config import BLOCK_TOKENS, DecodeSparsity, EngineConfig, PrefillSparsity
from loopserve.dialogue import Mode, SessionId, TokenId, TokensGenerated, TurnEnded, TurnEvent, TurnId, TurnStarted
from loopserve.engine import Engine
from loopserve.kv.cache import KVCache
from loopserve.loading import LoadedModel
from loopserve.methods import DECODE_RULES
from loopserve.plan import (
    NULL_BLOCK,
    PENDING_TOKEN,
    BlockCopy,
    SampledToken,
    Segment,
    SegmentQuality,
    StepPlan,
    StepResult,
)
from loopserve.runner import Finished
from loopserve.stats import StepStats, TurnStats
from loopserve.turn import Turn

VOCAB = 24
EOS_ID = 23
Digest = bytes


@dataclass(frozen=True)
class Slot:
    """What one slot of the fake pool holds."""

    digest: Digest
    owner: SessionId | None  # None: exact, and so anybody's within the salt
    is_exact: bool


def first_digest(salt: str) -> Digest:
    """What lies before position 0."""
    return _digest(b"start", salt.encode())


def next_digest(before: Digest, token_id: TokenId) -> Digest:
    """The KV of a token after everything before it."""
    return _digest(before, bytes([token_id]))


def digest_of(token_ids: Sequence[TokenId], salt: str) -> Digest:
    """The KV of the last token of a sequence."""
    digest = first_digest(salt)
    for token_id in token_ids:
        digest = next_digest(digest, token_id)
    return digest


def drawn_token(context: Digest, seed: int, output_index: int, banned_ids: Sequence[TokenId] = ()) -> TokenId:
    """The next token: a pure function of the context, the turn's seed and the place in the answer."""
    noise = _digest(context, f"{seed}|{output_index}".encode())
    return next(t for t in (byte % VOCAB for byte in _endless(noise)) if t not in banned_ids)


def expected_answer(turn: Turn, num_tokens: int) -> list[TokenId]:
    """What `turn` must answer if it computes `num_tokens` outputs, whatever happens around it."""
    digest = digest_of(turn.request.prompt_ids, turn.request.cache_salt)
    answer: list[TokenId] = []
    for index in range(num_tokens):
        banned = turn.end_ids() if index < turn.request.sampling.min_tokens else ()
        answer.append(drawn_token(digest, turn.seed, index, banned))
        digest = next_digest(digest, answer[-1])
    return answer


@dataclass
class FakeDevice:
    """A runner that checks every plan against what it knows of the turns, and keeps what it was given."""

    cache: KVCache = field(init=False)
    turns: Callable[[], Iterator[Turn]] = field(init=False)
    slots: dict[int, Slot] = field(default_factory=dict)
    plans: list[StepPlan] = field(default_factory=list)
    before_run: Callable[[StepPlan], None] = lambda plan: None
    _tables: dict[TurnId, tuple[int, list[int]]] = field(default_factory=dict)  # epoch and blocks, as last read
    _drawn: dict[TurnId, TokenId] = field(default_factory=dict)
    _captured: set[TurnId] = field(default_factory=set)
    _chosen: set[TurnId] = field(default_factory=set)

    def attach(self, engine: Engine) -> None:
        """Look at the host's side of `engine`, for checks only."""
        self.cache = engine._cache
        self.turns = engine._scheduler.turns

    def run(self, plan: StepPlan) -> StepResult:
        """Carry out a step as the real runner does, checking every order in it."""
        self.before_run(plan)
        self.plans.append(plan)
        turns = {turn.turn_id: turn for turn in self.turns()}
        for turn_id in plan.ended_turns:
            self._tables.pop(turn_id, None)
            self._captured.discard(turn_id)
            self._chosen.discard(turn_id)
        self.copy(plan.copies)
        assert len({s.turn_id for s in plan.segments}) == len(plan.segments), "a turn has two segments in one step"
        self._check_writes(plan.segments)
        tokens, quality = [], []
        for segment in plan.segments:
            turn = turns[segment.turn_id]
            last = self._compute(segment, turn)
            order = segment.sample
            if order is not None:
                token = drawn_token(last.digest, order.seed, order.output_index, order.banned_ids)
                tokens.append(SampledToken(segment.turn_id, token))
                self._drawn[segment.turn_id] = token
            if segment.prefill is not None or segment.decode is not None:
                quality.append(self._measured(segment, last.digest))
        return StepResult(tokens=tuple(tokens), quality=tuple(quality))

    def launch(self, plan: StepPlan) -> Finished:
        """See `run`."""
        return Finished(self.run(plan))

    device_bytes = 0
    parcels: dict = field(
        default_factory=dict
    )  # by an engine's image: what lay in each of its blocks; shared by those that hand over

    def read(self, blocks: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """An image's tensors, that name the parcel which holds what they stand for."""
        number = len(self.parcels) + 1
        self.parcels[number] = [
            [self.slots.get(block * BLOCK_TOKENS + offset) for offset in range(BLOCK_TOKENS)] for block in blocks
        ]
        names = torch.zeros((1, len(blocks), BLOCK_TOKENS, 1, 1))
        for index in range(len(blocks)):
            names[0, index, 0] = number * 1024 + index
        return names, names

    def write(self, blocks: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put a parcel's content into blocks."""
        for index, block in enumerate(blocks):
            number, place = divmod(int(keys[0, index, 0]), 1024)
            for offset, slot in enumerate(self.parcels[number][place]):
                if slot is None:
                    self.slots.pop(block * BLOCK_TOKENS + offset, None)
                else:
                    self.slots[block * BLOCK_TOKENS + offset] = slot

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Carry out copies."""
        for copy in copies:
            assert copy.target != NULL_BLOCK
            self._copy(copy.source, copy.target)

    def erase(self, blocks: Sequence[int]) -> None:
        """Forget what lies in blocks that nobody holds."""
        for block in blocks:
            assert block != NULL_BLOCK
            assert block not in self.cache._hash_of, f"indexed block {block} is erased"
            for offset in range(BLOCK_TOKENS):
                self.slots.pop(block * BLOCK_TOKENS + offset, None)

    def content(self, blocks: Sequence[int], num_tokens: int) -> list[Slot | None]:
        """What lies in the first `num_tokens` places of a block table."""
        return [self.slots.get(_slot(blocks, position)) for position in range(num_tokens)]

    def _compute(self, segment: Segment, turn: Turn) -> Slot:
        known, token_ids = turn.known_ids, list(segment.token_ids)
        start, end = segment.start, segment.start + len(token_ids)
        if token_ids == [PENDING_TOKEN]:  # drawn by the step before, which is not applied yet
            known = token_ids = [*known, self._drawn[turn.turn_id]]
            token_ids = token_ids[-1:]
        assert start < end <= len(known), "a segment computes known tokens, at least one"
        assert token_ids == known[start:end], "rows are not the turn's tokens at these positions"
        assert len(segment.block_table) * BLOCK_TOKENS >= end, "the block table does not cover the rows"
        assert (segment.sample is not None) == (end == len(known)), "drawn from exactly the last known token's row"
        table = self._table_as_read(segment)
        self._check_context(segment, turn, table)
        self._check_reach(segment, turn, table)
        if segment.decode is not None:
            assert len(segment.token_ids) == 1
            assert turn.turn_id in self._captured, "a sparse decode follows a prefill that kept its queries"
            assert turn.turn_id in self._chosen, "a selection is read before it is chosen"
        if segment.capture is not None:
            assert segment.capture.decode is turn.policy.decode
            assert segment.capture.choose == (end == len(known)), "the first choice is made at the prefill's end"
            self._captured.add(turn.turn_id)
            if segment.capture.choose:
                self._chosen.add(turn.turn_id)
        is_dense = segment.prefill is None and (segment.decode is None or segment.decode.dense)
        session_id = turn.request.session_id
        slot = self._before(turn, table, start)
        for position in range(start, end):
            is_exact = is_dense and slot.is_exact
            digest = next_digest(slot.digest, known[position])
            slot = Slot(digest, None if is_exact else session_id, is_exact)
            self.slots[_slot(table, position)] = slot
        return slot

    def _before(self, turn: Turn, table: Sequence[int], start: int) -> Slot:
        if start > 0:
            return self.slots[_slot(table, start - 1)]
        return Slot(first_digest(turn.request.cache_salt), None, True)

    def _check_reach(self, segment: Segment, turn: Turn, table: Sequence[int]) -> None:
        """A prefill reads host memory through the stage; who decodes reads what is recent, and has places for the rest."""
        far = [number for number, block in enumerate(table) if block in self.cache.host_pool.ids]
        is_prefill = not turn.is_decoding
        if not far or is_prefill:
            return
        order = segment.decode
        assert order is not None and not order.dense, "a dense row reads what is not on the device"
        config = turn.policy.decode
        room = len(segment.places) * BLOCK_TOKENS
        assert room >= config.sink_tokens + order.budget_tokens, "more tokens may be chosen than there are places"
        recent_start = (
            DECODE_RULES[config.method].layout(order.chosen_at_tokens, order.budget_tokens, config).recent_start
        )
        assert (far[-1] + 1) * BLOCK_TOKENS <= recent_start, "a recent token is not on the device"
        assert all(self.cache.pool.count(block) == 1 for block in segment.places)

    def _check_context(self, segment: Segment, turn: Turn, table: Sequence[int]) -> None:
        digest = first_digest(turn.request.cache_salt)
        for position, slot in enumerate(self.content(table, segment.start)):
            digest = next_digest(digest, turn.known_ids[position])
            assert slot is not None, f"turn {turn.turn_id} reads position {position}, which nobody wrote"
            assert slot.digest == digest, f"turn {turn.turn_id} reads another context at position {position}"
            assert slot.owner in (None, turn.request.session_id), "approximate KV of another session is read"
            assert slot.is_exact or turn.policy.mode is not Mode.EXACT, "an exact turn reads approximate KV"
            if position < turn.leased_branch.table.exact_tokens:
                assert slot.is_exact, f"position {position} is called exact but is not"

    def _check_writes(self, segments: Sequence[Segment]) -> None:
        written: dict[int, TurnId] = {}
        for segment in segments:
            first, last = segment.start // BLOCK_TOKENS, (segment.start + len(segment.token_ids) - 1) // BLOCK_TOKENS
            for block in segment.block_table[first : last + 1]:
                assert block in self.cache.pool.ids, "tokens are written to the device only"
                assert block not in written, f"turns {written[block]} and {segment.turn_id} write block {block}"
                assert self.cache.pool.count(block) == 1, f"turn {segment.turn_id} writes shared block {block}"
                assert block not in self.cache._hash_of, f"turn {segment.turn_id} writes indexed block {block}"
                written[block] = segment.turn_id

    def _table_as_read(self, segment: Segment) -> list[int]:
        """The block table as a runner knows it that, within one epoch, reads only what was added at its end."""
        epoch, blocks = self._tables.get(segment.turn_id, (None, []))
        if epoch != segment.table_epoch:
            blocks = []
        blocks = blocks + list(segment.block_table[len(blocks) :])
        self._tables[segment.turn_id] = (segment.table_epoch, blocks)
        assert blocks == list(segment.block_table), "the table changed within one epoch other than by growing"
        return blocks

    def _copy(self, source: int, target: int) -> None:
        for offset in range(BLOCK_TOKENS):
            slot = self.slots.get(source * BLOCK_TOKENS + offset)
            if slot is None:
                self.slots.pop(target * BLOCK_TOKENS + offset, None)
            else:
                self.slots[target * BLOCK_TOKENS + offset] = slot

    def _measured(self, segment: Segment, digest: Digest) -> SegmentQuality:
        is_measured = segment.prefill is not None or (segment.decode is not None and segment.decode.measure)
        coverage = digest[0] / 255
        return SegmentQuality(
            turn_id=segment.turn_id,
            coverage_sum=coverage if is_measured else 0.0,
            coverage_count=int(is_measured),
            coverage_worst=coverage if is_measured else 1.0,
        )


@dataclass
class Clock:
    """Time that a test moves by hand."""

    now_s: float = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now_s


@dataclass
class Inbox:
    """A listener that holds every turn to the shape of its stream: started, tokens, one end, nothing after it."""

    started: dict[TurnId, TurnStarted] = field(default_factory=dict)
    tokens: dict[TurnId, list[TokenId]] = field(default_factory=dict)
    logprobs: dict[TurnId, list] = field(default_factory=dict)
    ended: dict[TurnId, TurnEnded] = field(default_factory=dict)

    def __call__(self, events: Sequence[TurnEvent]) -> None:
        """Take the events of one step."""
        for event in events:
            assert event.turn_id not in self.ended, f"an event after the end: {event}"
            match event:
                case TurnStarted():
                    assert event.turn_id not in self.started, "a turn starts once"
                    assert event.turn_id not in self.tokens, "tokens before the start"
                    self.started[event.turn_id] = event
                case TokensGenerated():
                    assert event.turn_id in self.started, "tokens before the start"
                    self.tokens.setdefault(event.turn_id, []).extend(event.token_ids)
                    self.logprobs.setdefault(event.turn_id, []).extend(event.logprobs)
                case TurnEnded():
                    assert list(event.token_ids) == self.tokens.get(event.turn_id, []), "the end tells another answer"
                    assert event.usage.completion_tokens == len(event.token_ids)
                    self.ended[event.turn_id] = event


@dataclass
class StatsLog:
    """A stats sink that keeps everything."""

    steps: list[StepStats] = field(default_factory=list)
    turns: list[TurnStats] = field(default_factory=list)

    def on_step(self, stats: StepStats) -> None:
        """Keep it."""
        self.steps.append(stats)

    def on_turn(self, stats: TurnStats) -> None:
        """Keep it."""
        self.turns.append(stats)


def fake_loaded(*, max_positions: int = 4096) -> LoadedModel:
    """The facts of a model that is not there."""
    return LoadedModel(
        model=None,
        tokenizer=None,
        name="fake",
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
        vocab_size=VOCAB,
        max_positions=max_positions,
        eos_ids=(EOS_ID,),
        dtype=torch.float32,
        device=torch.device("cpu"),
        fingerprint="fake",
    )


def small_config(**overrides) -> EngineConfig:
    """Limits and thresholds so small that short sequences reach them."""
    settings = {
        "kv_blocks": 16,
        "host_blocks": 0,
        "max_running_turns": 4,
        "max_waiting_turns": 8,
        "max_sessions": 5,
        "max_branches": 3,
        "max_step_prefill_tokens": 48,
        "max_queue_s": 50.0,
        "prefill": PrefillSparsity(chunk_tokens=16, auto_min_context_tokens=64),
        "decode": DecodeSparsity(
            budget_tokens=8,
            budget_floor_tokens=2,
            refresh_outputs=5,
            early_refreshes=(3,),
            sink_tokens=1,
            window_tokens=4,
            auto_min_context_tokens=24,
        ),
    }
    return EngineConfig(**(settings | overrides))


def fake_engine(config: EngineConfig | None = None, *, stats=None, clock=None) -> tuple[Engine, FakeDevice]:
    """An engine without a model, and the device that it believes in."""
    device = FakeDevice()
    engine = Engine(config or small_config(), loaded=fake_loaded(), runner=device, stats=stats, clock=clock or Clock())
    device.attach(engine)
    return engine, device


def drain(engine: Engine, *, max_steps: int = 10_000) -> int:
    """Step until there is nothing to do; how many steps that took."""
    for count in range(max_steps):
        if not engine.step():
            return count
    raise AssertionError(f"not drained after {max_steps} steps")


def _slot(blocks: Sequence[int], position: int) -> int:
    return blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS


def _digest(*parts: bytes) -> Digest:
    return blake2b(b"|".join(parts), digest_size=12).digest()


def _endless(noise: Digest) -> Iterator[int]:
    while True:
        yield from noise
        noise = _digest(noise)
