"""Holds many dialogues at once: who begins when, what is sent in which order, when to stop. Knows no statistics.

    worker    one of `concurrency`: takes the next dialogue, waits for its arrival, holds it to its end, takes the next
    closing   no turn is sent any more; think and arrival times end
    cut       what is still being answered is given up and recorded as cut

A dialogue's history is what the server answered, and a turn that fails ends its dialogue: nobody knows how it would have gone on.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import Any

import httpx

from loopserve.bench.endpoint import Endpoint, Seen, ask, served_model
from loopserve.bench.records import Failure, FailureKind, Gaps, TurnRecord
from loopserve.bench.workload import RUN_TURNS_MAX, Script, ScriptTurn, Workload

_LATE_S = 0.05  # an arrival later than this waited for a place


@dataclass(slots=True)
class LoadResult:
    """What a load came to. `turns` are in the order in which they ended, warm-up included; the counters are of the measured part."""

    model: str = ""
    turns: list[TurnRecord] = field(default_factory=list)
    gaps: Gaps = field(default_factory=Gaps)
    wall_s: float = 0.0
    generator_cpu_s: float = 0.0
    num_begun: int = 0
    num_completed: int = 0  # dialogues with every turn answered
    num_late: int = 0  # arrivals that found `concurrency` dialogues held
    is_interrupted: bool = False


async def run_load(
    workload: Workload,
    endpoint: Endpoint,
    *,
    on_turn: Callable[[TurnRecord], None] = lambda turn: None,
    stop: asyncio.Event | None = None,
    clock: Callable[[], float] = time.perf_counter,
    transport: httpx.AsyncBaseTransport | None = None,
) -> LoadResult:
    """Send a load to an endpoint and give back all that was seen.

    Ends by itself: with the last dialogue, or `drain_s` after `duration_s`. `stop` ends it at once; turns in flight are then
    recorded as cut. `on_turn` comes with every turn as it ends, warm-up included. Failures of turns are records; raises
    EngineUnavailable only where no model is named and the server lists none.
    """
    client = partial(endpoint.client, tls=endpoint.tls(), transport=transport)
    model = endpoint.model
    if not model:
        async with client() as http:
            model = await served_model(http, endpoint.url)
    run = _Run(workload, replace(endpoint, model=model), client, on_turn, stop or asyncio.Event(), clock, clock())
    if workload.num_warmup:
        await _Part(run, first=0, end=workload.num_warmup, warm_up=True).hold()
    cpu_s, run.began_at = time.process_time(), clock()
    if not run.stop.is_set():
        num = workload.num_measured
        end = None if num is None else workload.num_warmup + num
        await _Part(run, first=workload.num_warmup, end=end, warm_up=False).hold()
    result = run.result
    result.model, result.wall_s, result.generator_cpu_s = model, clock() - run.began_at, time.process_time() - cpu_s
    result.is_interrupted = run.stop.is_set()
    return result


@dataclass(slots=True)
class _Run:
    """What warm-up and measured part share."""

    workload: Workload
    endpoint: Endpoint
    client: Callable[[], httpx.AsyncClient]
    on_turn: Callable[[TurnRecord], None]
    stop: asyncio.Event
    clock: Callable[[], float]
    began_at: float  # of the part that is held
    result: LoadResult = field(default_factory=LoadResult)
    # Sessions of an earlier run are never met.
    name: str = field(default_factory=lambda: f"bench-{secrets.token_hex(4)}")


class _Part:
    """Warm-up or measured part: the same workers, apart in what they count and when they end."""

    def __init__(self, run: _Run, *, first: int, end: int | None, warm_up: bool) -> None:
        self._run = run
        self._next, self._end = first, end
        self._warm_up = warm_up
        self._closing = asyncio.Event()
        self._gaps = Gaps() if warm_up else run.result.gaps
        self._rate_per_s = None if warm_up else run.workload.rate_per_s
        self._arrivals = Random(f"{run.workload.seed}/arrivals")
        self._arrival_s = 0.0

    async def hold(self) -> None:
        """All dialogues of the part, or until time or the user ends it."""
        work = self._run.workload
        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(self._work()) for _ in range(self._num_workers())]
            stopped = group.create_task(self._run.stop.wait())
            over: list[asyncio.Future[Any]] = [asyncio.gather(*workers, return_exceptions=True), stopped]
            limit_s = None if self._warm_up else work.duration_s
            await asyncio.wait(over, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            self._closing.set()
            if not self._run.stop.is_set():
                await asyncio.wait(over, timeout=work.drain_s, return_when=asyncio.FIRST_COMPLETED)
            for task in (*workers, stopped):
                task.cancel()

    def _num_workers(self) -> int:
        at_once = self._run.workload.concurrency
        return at_once if self._end is None else min(at_once, self._end - self._next)

    async def _work(self) -> None:
        async with self._run.client() as http:
            while not self._closing.is_set() and len(self._run.result.turns) < RUN_TURNS_MAX:
                index = self._next
                if index == self._end:
                    return
                self._next += 1
                if self._rate_per_s is not None and not await self._arrive(self._rate_per_s):
                    return
                await self._converse(http, self._run.workload.source.script(index))

    async def _arrive(self, rate_per_s: float) -> bool:
        """Wait for the next arrival; False where the load closes before it."""
        self._arrival_s += self._arrivals.expovariate(rate_per_s)
        wait_s = self._arrival_s - (self._run.clock() - self._run.began_at)
        if wait_s < -_LATE_S:
            self._run.result.num_late += 1
        return not await self._closes_within(wait_s)

    async def _closes_within(self, wait_s: float) -> bool:
        """Wait; whether the load closed meanwhile."""
        if wait_s > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), wait_s)
        return self._closing.is_set()

    async def _converse(self, http: httpx.AsyncClient, script: Script) -> None:
        result = self._run.result
        messages = [{"role": "system", "content": script.system}] if script.system else []
        history_tokens: int | None = None
        result.num_begun += not self._warm_up
        for number, turn in enumerate(script.turns, start=1):
            if await self._closes_within(turn.think_s):
                return
            messages.append({"role": "user", "content": turn.user})
            seen = Seen(self._run.clock())
            try:
                failure = await self._ask(http, script, turn, messages, seen)
            except asyncio.CancelledError:
                cut = Failure(FailureKind.CUT, "the load was over")
                self._note(script, turn, number, seen, history_tokens, cut)
                raise
            self._note(script, turn, number, seen, history_tokens, failure)
            if failure is not None:
                return
            messages.append({"role": "assistant", "content": seen.text})
            usage = seen.usage
            history_tokens = usage.prompt_tokens + usage.completion_tokens if usage else None
        result.num_completed += not self._warm_up

    async def _ask(
        self, http: httpx.AsyncClient, script: Script, turn: ScriptTurn, messages: list[dict[str, str]], seen: Seen
    ) -> Failure | None:
        run = self._run
        return await ask(
            http,
            run.endpoint,
            run.endpoint.request_body(messages, output_tokens_max=turn.output_tokens_max),
            seen,
            session=f"{run.name}-{script.id}",
            gaps=self._gaps,
            clock=run.clock,
        )

    def _note(
        self,
        script: Script,
        turn: ScriptTurn,
        number: int,
        seen: Seen,
        history_tokens: int | None,
        failure: Failure | None,
    ) -> None:
        run = self._run
        usage = seen.usage
        output_tokens = usage.completion_tokens if usage else seen.num_chunks
        first_at, last_at = seen.first_chunk_at, seen.last_chunk_at
        inter_token_s = None
        if first_at is not None and last_at is not None and output_tokens > 1 and seen.num_chunks > 1:
            inter_token_s = (last_at - first_at) / (output_tokens - 1)
        record = TurnRecord(
            dialogue=script.id,
            number=number,
            num_turns=len(script.turns),
            warm_up=self._warm_up,
            sent_at_s=seen.started_at - run.began_at,
            first_token_s=None if first_at is None else first_at - seen.started_at,
            total_s=run.clock() - seen.started_at,
            inter_token_s=inter_token_s,
            num_chunks=seen.num_chunks,
            output_tokens=output_tokens,
            counted_by_usage=usage is not None,
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=usage.cached_tokens if usage else None,
            history_tokens=history_tokens,
            replica=seen.replica,
            finish_reason=seen.finish_reason,
            num_rejections=seen.num_rejections,
            right=turn.is_right(seen.text) if turn.is_right and failure is None else None,
            failure=failure,
        )
        run.result.turns.append(record)
        run.on_turn(record)
