"""How much one API key may use: requests and tokens a minute, turns at a time, tokens an answer. Hop 1; knows no HTTP but header names.

    admit    charges one request and the prompt, estimated from its text; raises where a window is full, and then nothing is charged
    close    frees the turns and settles the tokens with what was really read and written, once, however the turn ended

A turn that runs is never cut: what it generates beyond the window is charged all the same, and the next request waits for it. The windows
are those of the library `limits`, in memory, of a fixed minute from a key's first use of it: the one kind whose count may be corrected
afterwards. They belong to one process, so each of several ingresses gives out its share.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from deploy.errors import InsufficientQuota, LimitReached
from deploy.keys import Caller, KeyLimits
from deploy.protocol import CompletionCall
from loopserve.errors import InvalidRequest

_CHARS_PER_TOKEN = 4  # of an estimate that the end of the turn corrects
_NO_SLOT_RETRY_S = 1.0  # nobody knows when a turn ends
_EVENT_END = b"\n\n"


@dataclass(frozen=True, slots=True)
class _Window:
    """One kind of limit of one key."""

    kind: str  # as OpenAI's headers name it
    item: RateLimitItem
    cost: int


class Admission:
    """One request that was let in. `close` it in every case; a second time does nothing."""

    def __init__(self, limiter: "Limiter", caller: Caller, windows: tuple[_Window, ...], *, num_turns: int) -> None:
        self._limiter = limiter
        self._caller = caller
        self._windows = windows
        self._num_turns = num_turns
        self._prompt_tokens: int | None = None
        self._num_events = 0
        self._generated_tokens: int | None = None
        self._is_closed = False

    def accept(self, prompt_tokens: int) -> None:
        """A replica took the turn and knows its prompt."""
        self._prompt_tokens = prompt_tokens

    def forward(self, events: bytes) -> None:
        """Part of a stream goes out. Only counted for streams that are given up: an event is a token, or a few."""
        self._num_events += events.count(_EVENT_END)

    def finish(self, generated_tokens: int) -> None:
        """The turn came to its end by itself."""
        self._generated_tokens = generated_tokens

    def refund(self) -> None:
        """The turn failed or was refused: its tokens cost nothing. The request stays counted."""
        self._prompt_tokens, self._num_events, self._generated_tokens = None, 0, None

    def close(self) -> None:
        """Free the turns and settle the tokens."""
        if self._is_closed:
            return
        self._is_closed = True
        spent_tokens = 0
        if self._prompt_tokens is not None:
            generated = self._num_events if self._generated_tokens is None else self._generated_tokens
            spent_tokens = self._prompt_tokens + generated
        self._limiter.settle(self._caller, self._windows, spent_tokens=spent_tokens, num_turns=self._num_turns)

    def headers(self) -> dict[str, str]:
        """OpenAI's headers about the key's windows as they are now."""
        return self._limiter.headers(self._caller)


class Limiter:
    """The windows and running turns of all keys in one process. Event loop only."""

    def __init__(self, *, num_processes: int, unix_time: Callable[[], float] = time.time) -> None:
        """`num_processes` share every limit evenly, rounded down, but at least one each."""
        self._num_processes = num_processes
        self._unix_time = unix_time
        self._storage = MemoryStorage()
        self._windows = FixedWindowRateLimiter(self._storage)
        self._running: Counter[str] = Counter()

    def admit(self, caller: Caller, call: CompletionCall) -> Admission:
        """Let a request in and charge for it. Raises LimitReached, or InsufficientQuota where waiting would not help."""
        windows = self._windows_of(caller, prompt_tokens=_prompt_tokens(call))
        self._check_slots(caller, call.num_branches)
        for window in windows:
            self._check_window(caller, window)
        for window in windows:
            self._windows.hit(window.item, caller.key_id, cost=window.cost)
        self._running[caller.key_id] += call.num_branches
        return Admission(self, caller, windows, num_turns=call.num_branches)

    def num_running(self, caller: Caller) -> int:
        """Turns of the key that have not been closed."""
        return self._running[caller.key_id]

    def settle(self, caller: Caller, windows: tuple[_Window, ...], *, spent_tokens: int, num_turns: int) -> None:
        """Correct what `admit` charged. Called by `Admission.close` only."""
        self._running[caller.key_id] -= num_turns
        if not self._running[caller.key_id]:
            del self._running[caller.key_id]
        for window in windows:
            if window.kind == "tokens":
                self._add(window.item.key_for(caller.key_id), window.item.get_expiry(), spent_tokens - window.cost)

    def headers(self, caller: Caller) -> dict[str, str]:
        """`x-ratelimit-*` of every window that the key has."""
        found = {}
        for window in self._windows_of(caller, prompt_tokens=0):
            stats = self._windows.get_window_stats(window.item, caller.key_id)
            found[f"x-ratelimit-limit-{window.kind}"] = str(window.item.amount)
            found[f"x-ratelimit-remaining-{window.kind}"] = str(stats.remaining)
            found[f"x-ratelimit-reset-{window.kind}"] = duration(self._until(stats.reset_time))
        return found

    def _windows_of(self, caller: Caller, *, prompt_tokens: int) -> tuple[_Window, ...]:
        limits = caller.limits
        wanted = (("requests", limits.requests_per_minute, 1), ("tokens", limits.tokens_per_minute, prompt_tokens))
        return tuple(
            _Window(kind, RateLimitItemPerMinute(self._share(limit), namespace=kind), cost)
            for kind, limit, cost in wanted
            if limit is not None
        )

    def _check_slots(self, caller: Caller, num_turns: int) -> None:
        if caller.limits.concurrent_turns is None:
            return
        most = self._share(caller.limits.concurrent_turns)
        if num_turns > most:
            raise InsufficientQuota(
                f"The request asks for {num_turns} answers at a time; the API key may have {most}. Ask for fewer with `n`.",
                headers=self.headers(caller),
            )
        running = self._running[caller.key_id]
        if running + num_turns > most:
            raise LimitReached(
                f"{running} turns of this API key are running and {most} may run at a time; wait until one has ended.",
                retry_after_s=_NO_SLOT_RETRY_S,
                headers=self.headers(caller),
            )

    def _check_window(self, caller: Caller, window: _Window) -> None:
        most = window.item.amount
        if window.cost > most:
            raise InsufficientQuota(
                f"The prompt is about {window.cost} tokens long; the API key may use {most} {window.kind} a minute. "
                "Shorten the conversation, or ask the operator for a larger limit.",
                headers=self.headers(caller),
            )
        if not self._windows.test(window.item, caller.key_id, cost=window.cost):
            stats = self._windows.get_window_stats(window.item, caller.key_id)
            wait_s = self._until(stats.reset_time)
            raise LimitReached(
                f"The API key may use {most} {window.kind} a minute; {stats.remaining} are left and this request needs about "
                f"{window.cost}. Try again in {duration(wait_s)}.",
                retry_after_s=wait_s,
                headers=self.headers(caller),
            )

    def _add(self, key: str, expiry_s: int, num: int) -> None:
        """Correct a count, beyond its limit if need be."""
        if num > 0:
            self._storage.incr(key, expiry_s, amount=num)
        elif num < 0:
            self._storage.decr(key, amount=-num)

    def _share(self, limit: int) -> int:
        return max(1, limit // self._num_processes)

    def _until(self, unix_s: float) -> float:
        return max(0.0, unix_s - self._unix_time())


def with_max_tokens(call: CompletionCall, limits: KeyLimits) -> CompletionCall:
    """The call with its answers bounded by the key's `max_tokens`. Raises InvalidRequest where it asks for longer ones by name."""
    most, wanted = limits.max_tokens, call.sampling.max_tokens
    if most is None or (wanted is not None and wanted <= most):
        return call
    if wanted is not None:
        raise InvalidRequest(
            f"max_tokens is {wanted}; the API key allows answers of at most {most} tokens.", param="max_tokens"
        )
    return replace(call, sampling=replace(call.sampling, max_tokens=most))


def duration(seconds: float) -> str:
    """A time as OpenAI's headers write it: `6m0s`, `12s`, `120ms`."""
    if seconds < 1.0:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _prompt_tokens(call: CompletionCall) -> int:
    """About how many tokens the prompt has; at least one."""
    if call.messages is not None:
        return max(1, sum(len(message.content) for message in call.messages) // _CHARS_PER_TOKEN)
    prompt = call.prompt or ""
    return max(1, len(prompt) // _CHARS_PER_TOKEN if isinstance(prompt, str) else len(prompt))
