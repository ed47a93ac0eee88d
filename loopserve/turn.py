"""One turn from submission to its terminal event: its record and what can be answered from it alone. Host only.

The catch-up law: a turn has no phases. Its branch holds the known tokens (prompt, then outputs), its block table says how many
of them are computed, and every step lets the computed ones chase the known ones:

    |<--- reused --->|<--- chunk --->|<--- chunk --->| ... |<- outputs, one a step ->|
    0              start       start + chunk_tokens   prompt_len                 known
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from loopserve.dialogue import FinishReason, SamplingParams, TokenId, TurnId, TurnRequest, TurnUsage
from loopserve.plan import SampleOrder
from loopserve.quality import QualityTally, TurnPolicy
from loopserve.sessions import Branch, Session


@dataclass(slots=True, eq=False)
class Turn:
    """One branch of one request. Edited by the scheduler only."""

    turn_id: TurnId
    request: TurnRequest
    policy: TurnPolicy
    seed: int
    eos_ids: tuple[TokenId, ...]
    max_session_tokens: int
    arrived_s: float
    leader: "Turn | None" = None  # the first branch of the request: the others wait for its prompt's KV
    session: Session | None = None
    branch: Branch | None = None
    start: int = 0  # position of the first token computed since the last admission; chunks are counted from here
    is_decoding: bool = False  # the prefill since the last admission is over: only the newest output is left
    decode_steps: int = 0  # since the last admission
    decode_sparse: bool = False
    budget_at_choice: int = 0
    chosen_at_tokens: int = 0  # context length at the last choice
    is_compact: bool = False  # its KV lies in host memory, or is about to: see `loopserve.room`
    has_recalled: bool = False  # since it is compact
    window_dense: bool = False  # the last measured coverage was too low
    cached_tokens: int = 0
    tally: QualityTally = field(default_factory=QualityTally)
    num_preemptions: int = 0
    turn_number: int = 0
    fetch_until_s: float | None = None  # its session is being brought from disk; it waits no longer than this
    admitted_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0
    ended: bool = False

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def leased_branch(self) -> Branch:
        """The branch, which every admitted turn has."""
        assert self.branch is not None, "the turn was never admitted"
        return self.branch

    @property
    def leased_session(self) -> Session:
        """The session, which every admitted turn has."""
        assert self.session is not None, "the turn was never admitted"
        return self.session

    @property
    def known_ids(self) -> list[TokenId]:
        """Prompt and outputs."""
        return self.leased_branch.token_ids

    @property
    def num_computed(self) -> int:
        """Known tokens whose KV is there."""
        return self.leased_branch.table.num_tokens

    @property
    def num_outputs(self) -> int:
        """Tokens generated so far."""
        return len(self.known_ids) - self.prompt_len if self.branch is not None else 0

    @property
    def max_outputs(self) -> int:
        """Most tokens this turn may generate."""
        room = self.max_session_tokens - self.prompt_len
        wanted = self.request.sampling.max_tokens
        return room if wanted is None else min(wanted, room)

    @property
    def waits_for_leader(self) -> bool:
        """Whether the request's first branch is still computing the prompt that this one will share."""
        leader = self.leader
        if leader is None or leader.ended:
            return False
        return leader.branch is None or leader.num_computed < leader.prompt_len

    def is_fetching(self, now_s: float) -> bool:
        """Whether it still waits for its session's KV."""
        return self.fetch_until_s is not None and now_s < self.fetch_until_s

    def next_chunk_len(self, chunk_tokens: int) -> int:
        """Rows of the next prefill chunk: to the next multiple of `chunk_tokens` from `start`, whatever the load."""
        to_boundary = chunk_tokens - (self.num_computed - self.start) % chunk_tokens
        return min(to_boundary, len(self.known_ids) - self.num_computed)

    @property
    def can_run_ahead(self) -> bool:
        """Whether the step after the next one can be planned before that one's token and measurements are known."""
        is_free = not _needs_history(self.request.sampling) and self.policy.min_coverage is None
        return self.is_decoding and is_free

    def sample_order(self, *, num_pending: int = 0) -> SampleOrder:
        """How the next output is drawn, or the one after `num_pending` more."""
        sampling = self.request.sampling
        output_index = self.num_outputs + num_pending
        banned = self.end_ids() if output_index < sampling.min_tokens else ()
        known = self.known_ids
        has_penalty = _needs_history(sampling)
        return SampleOrder(
            params=sampling,
            seed=self.seed,
            output_index=output_index,
            prompt_ids=self.request.prompt_ids if has_penalty else (),
            output_ids=known[self.prompt_len :] if has_penalty else (),
            banned_ids=banned,
        )

    def end_ids(self) -> tuple[TokenId, ...]:
        """Tokens that end the turn."""
        sampling = self.request.sampling
        return sampling.stop_token_ids if sampling.ignore_eos else self.eos_ids + sampling.stop_token_ids

    def reason_to_end(self) -> FinishReason | None:
        """Why the turn ends after its newest output, or None when it goes on."""
        if self.num_outputs > self.request.sampling.min_tokens and self.known_ids[-1] in self.end_ids():
            return FinishReason.STOP
        if self.num_outputs >= self.max_outputs:
            return FinishReason.LENGTH
        return None

    def output_ids(self) -> Sequence[TokenId]:
        """The answer so far."""
        return self.known_ids[self.prompt_len :] if self.branch is not None else ()

    def usage(self) -> TurnUsage:
        """Token counts and the account of sparsity so far."""
        return TurnUsage(
            prompt_tokens=self.prompt_len,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.num_outputs,
            quality=self.tally.report(self.policy.mode),
        )


def _needs_history(sampling: SamplingParams) -> bool:
    return (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) != (0.0, 0.0, 1.0)
