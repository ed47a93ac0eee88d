"""Tells dialogues to an engine and asks about them, on the caller's thread. Owns the order of requests and what stays in the KV pool.

Each dialogue is told once under each prefill method, in a session of its own, and every variant asks over that past:

    tell -> ask all questions of the stop under all variants, at once -> tell on -> ... -> forget

A question computes its own input anew under every variant: its rows are what some methods choose by. Dense rows over a dense past are
the same whatever decode reads, so decode methods share that past. Knows nothing of scores, files and statistics.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from loopserve.config import BLOCK_TOKENS
from loopserve.dialogue import (
    Mode,
    QualityContract,
    QualityReport,
    SamplingParams,
    SessionId,
    TurnEnded,
    TurnRequest,
    TurnUsage,
)
from loopserve.engine import Engine
from loopserve.evaluation.prompts import Question, Script, Stop, TokenIds
from loopserve.evaluation.turns import Turns
from loopserve.evaluation.variants import REFERENCE, Variant

_WAITING_RATIO = 2  # turns submitted over turns in the batch: the next ones are there when places come free
OPEN_MAX = 64  # dialogues told at a time, however large the pool
MAX_BRANCHES = 4  # idle ones of a session; any of them holds the whole past
_SPARE_BLOCKS = 2  # of a question, for the parts of blocks at its two ends

ContractOf = Callable[[Variant, Question], QualityContract]


@dataclass(frozen=True, slots=True)
class PastQuality:
    """What sparsity did while the past was told, so far."""

    coverage: float | None  # mean over tellings, each weighted by its causal cells; None: nothing was measured
    cells_share: float  # of the causal cells, computed


@dataclass(frozen=True, slots=True)
class Answered:
    """A question as it was answered."""

    script: Script
    question: Question
    variant: Variant
    contract: QualityContract
    ended: TurnEnded
    past: PastQuality


@dataclass(frozen=True, slots=True)
class Asking:
    """One dialogue under one prefill method: what of it is still to be asked, by turn index."""

    script: Script
    prefill: str
    variants: dict[int, tuple[Variant, ...]]


@dataclass(slots=True)
class _PastTally:
    """The running account behind `PastQuality`."""

    cells: float = 0.0
    cells_computed: float = 0.0
    covered: float = 0.0
    cells_measured: float = 0.0

    def add(self, usage: TurnUsage) -> None:
        quality: QualityReport = usage.quality
        start, rows = usage.cached_tokens, usage.prompt_tokens - usage.cached_tokens
        cells = rows * start + rows * (rows + 1) / 2
        self.cells += cells
        self.cells_computed += cells * quality.prefill_cells_computed_share
        if quality.coverage_mean is not None:
            self.covered += cells * quality.coverage_mean
            self.cells_measured += cells

    def quality(self) -> PastQuality:
        return PastQuality(
            coverage=self.covered / self.cells_measured if self.cells_measured else None,
            cells_share=self.cells_computed / self.cells if self.cells else 1.0,
        )


@dataclass(slots=True)
class _Open:
    """A dialogue that is being told and asked about."""

    asking: Asking
    blocks: int  # of the pool, at most
    stops: Iterator[Stop]
    to_tell: deque[TokenIds] = field(default_factory=deque)
    to_ask: deque[tuple[Question, Variant]] = field(default_factory=deque)
    past: _PastTally = field(default_factory=_PastTally)
    told_tokens: int = 0
    num_pending: int = 0
    is_telling: bool = False

    @property
    def session_id(self) -> SessionId:
        return SessionId(f"{self.asking.script.dialogue.id}/{self.asking.prefill}")

    @property
    def is_dense(self) -> bool:
        """Whether its past is told by dense rows: these come out the same however they are cut into requests."""
        return self.asking.prefill == REFERENCE

    def has_request(self) -> bool:
        """Whether a request can be made now; goes on to the next stop where the present one is done with."""
        while not self.to_tell and not self.to_ask and not self.num_pending:
            stop = next(self.stops, None)
            if stop is None:
                return False
            self._begin(stop)
        return not self.is_telling and bool(self.to_tell or self.to_ask)

    def is_done(self) -> bool:
        """Whether everything was asked and answered."""
        return not self.has_request() and not self.num_pending

    def _begin(self, stop: Stop) -> None:
        for question in stop.questions:
            self.to_ask.extend((question, v) for v in self.asking.variants.get(question.turn_index, ()))
        if (
            not self.is_dense
        ):  # lines are chosen for each turn as it is told, so all is told even where nothing is left to ask
            self.to_tell.extend(stop.told)
        if stop.past_ids and (self.to_ask or not self.is_dense):
            self.to_tell.append(stop.past_ids)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A turn in the engine: a question under a variant, or, without one, a past being told."""

    each: _Open
    contract: QualityContract
    question: Question | None = None
    variant: Variant | None = None


class Driver:
    """Puts askings through one engine, as many at a time as fit its pool."""

    def __init__(
        self, engine: Engine, *, concurrency: int, max_tokens: int, seed: int, contract_of: ContractOf
    ) -> None:
        """`max_tokens` is the longest answer; `seed` is of the rows that sparse prefill samples, the same under every variant."""
        self._engine = engine
        self._concurrency = concurrency
        self._max_tokens = max_tokens
        self._seed = seed
        self._contract_of = contract_of
        self._blocks = engine.memory().blocks.total
        self._pending: Turns[_Pending] = Turns(engine)

    def run(self, askings: Iterable[Asking]) -> Iterator[Answered]:
        """Every question under every variant, answered; in no particular order. Raises EngineUnavailable when a turn fails."""
        coming = iter(askings)
        opened: deque[_Open] = deque()
        next_one = next(coming, None)
        while opened or next_one is not None:
            while next_one is not None and self._has_room(opened, next_one):
                opened.append(self._open(next_one))
                next_one = next(coming, None)
            self._submit(opened)
            yield from self._take_ended()
            for done in [each for each in opened if each.is_done()]:
                opened.remove(done)
                self._engine.release(done.session_id)

    def _has_room(self, opened: Sequence[_Open], asking: Asking) -> bool:
        """Whether another dialogue is to be opened: none is, or all that are cannot fill the batch and it fits beside them."""
        if not opened:
            return True
        waiting = sum(len(each.to_ask) for each in opened if not each.is_telling) + len(self._pending)
        blocks = sum(each.blocks for each in opened) + self._blocks_of(asking)
        return waiting < self._concurrency * _WAITING_RATIO and blocks <= self._blocks and len(opened) < OPEN_MAX

    def _open(self, asking: Asking) -> _Open:
        stops = asking.script.stops
        asked = [any(asking.variants.get(q.turn_index) for q in stop.questions) for stop in stops]
        last = max((number for number, is_asked in enumerate(asked, start=1) if is_asked), default=0)
        return _Open(asking, self._blocks_of(asking), iter(stops[:last]))

    def _blocks_of(self, asking: Asking) -> int:
        return num_blocks(asking.script, concurrency=self._concurrency, max_tokens=self._max_tokens)

    def _submit(self, opened: Iterable[_Open]) -> None:
        """Requests until enough wait, of the dialogues opened first first: these are to be done with."""
        for each in opened:
            while len(self._pending) < self._concurrency * _WAITING_RATIO and each.has_request():
                if each.to_tell:
                    self._tell(each)
                else:
                    self._ask(each, *each.to_ask.popleft())

    def _tell(self, each: _Open) -> None:
        """Compute the KV of a past. What a probe computed before of the same text is not taken for it, unless it is exact."""
        token_ids = each.to_tell.popleft()
        contract = QualityContract(mode=Mode.EXACT)
        if not each.is_dense:
            contract = QualityContract(mode=Mode.SPARSE, prefill_method=each.asking.prefill, decode_method=REFERENCE)
        reuse = None if each.is_dense else each.told_tokens
        self._send(_Pending(each, contract), token_ids, max_tokens=1, reuse_tokens_max=reuse)
        each.is_telling = True
        each.told_tokens = len(token_ids)

    def _ask(self, each: _Open, question: Question, variant: Variant) -> None:
        pending = _Pending(each, self._contract_of(variant, question), question, variant)
        reuse = question.past_tokens
        self._send(pending, question.prompt_ids, max_tokens=self._max_tokens, reuse_tokens_max=reuse)

    def _send(self, pending: _Pending, token_ids: TokenIds, *, max_tokens: int, reuse_tokens_max: int | None) -> None:
        each = pending.each
        request = TurnRequest(
            session_id=each.session_id,
            prompt_ids=token_ids,
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=self._seed_of(each, token_ids)),
            contract=pending.contract,
            cache_salt=each.asking.prefill,  # an approximate past is never completed from an exact one of the same text
            reuse_tokens_max=reuse_tokens_max,
        )
        self._pending.submit(request, pending, dialogue=each.asking.script.dialogue.id)
        each.num_pending += 1

    def _seed_of(self, each: _Open, token_ids: TokenIds) -> int:
        text = f"{self._seed}:{each.asking.script.dialogue.id}:{len(token_ids)}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")

    def _take_ended(self) -> Iterator[Answered]:
        for pending, ended in self._pending.step():
            each, question, variant = pending.each, pending.question, pending.variant
            each.num_pending -= 1
            if question is None or variant is None:
                each.past.add(ended.usage)
                each.is_telling = False
            else:
                yield Answered(each.asking.script, question, variant, pending.contract, ended, each.past.quality())


def num_blocks(script: Script, *, concurrency: int, max_tokens: int) -> int:
    """The most blocks of the pool that a dialogue takes: its past once, and what the answers in the batch and the idle ones add to it."""
    past = -(-script.prompt_tokens_max // BLOCK_TOKENS)
    own = -(-(script.added_tokens_max + max_tokens) // BLOCK_TOKENS) + _SPARE_BLOCKS
    return past + (concurrency + MAX_BRANCHES + 1) * own
