"""Owns who answers whole dialogues on an accelerator: our engine, dense or sparse, and vLLM where it is installed.

Every side gets the same dialogues, at most `concurrency` at once: a reader submits a dialogue's next turn when the last has
ended, then takes the next dialogue. Answers are greedy and of full length. A side times each turn from its submission. Knows
nothing about pairs and tables.
"""

from __future__ import annotations

import gc
import itertools
import random
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.drive import drive
from benchmarks.engine.random_model import ModelSize
from benchmarks.engine.shape import llama_config
from loopserve.dialogue import Mode, QualityContract, SamplingParams, SessionId, TurnEnded, TurnRequest
from loopserve.engine import Engine
from loopserve.stats import StepStats, TurnStats

Ids = tuple[int, ...]
Dialogue = tuple[Ids, ...]  # new tokens of each turn


@dataclass(frozen=True, slots=True)
class TurnTime:
    """One turn, as its client sees it."""

    dialogue: int
    turn: int  # 1 is the first
    prompt_tokens: int
    new_tokens: int
    answer_tokens: int
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """One side's pass over all dialogues."""

    seconds: float
    turns: tuple[TurnTime, ...]

    @property
    def answer_tokens(self) -> int:
        """Over all turns."""
        return sum(turn.answer_tokens for turn in self.turns)


class TurnsSide(Protocol):
    """A way to answer dialogues."""

    @property
    def name(self) -> str:
        """For tables."""

    def run(self, dialogues: Sequence[Dialogue], *, answer_tokens: int, is_over: Callable[[], bool]) -> Run:
        """Answer all turns; where `is_over`, none begins any more and the run is shorter."""


def make_dialogues(
    num: int, turns: int, *, first_tokens: int, later_tokens: tuple[int, int], vocab: int, seed: int
) -> list[Dialogue]:
    """Random new tokens: `first_tokens` in a first turn, from `later_tokens[0]` to `later_tokens[1]` in each later one."""
    rng = random.Random(seed)

    def ids(num_tokens: int) -> Ids:
        return tuple(rng.randrange(vocab) for _ in range(num_tokens))

    return [(ids(first_tokens), *(ids(rng.randint(*later_tokens)) for _ in range(turns - 1))) for _ in range(num)]


class Collector:
    """A stats sink that keeps ended turns."""

    def __init__(self) -> None:
        self.turns: list[TurnStats] = []

    def on_step(self, stats: StepStats) -> None:
        """Steps are not looked at."""

    def on_turn(self, stats: TurnStats) -> None:
        """Keep it."""
        self.turns.append(stats)


class EngineSide:
    """Our engine in one mode, driven on the caller's thread. Sides of several modes share one engine and one pool."""

    def __init__(self, engine: Engine, collector: Collector, mode: Mode, *, concurrency: int) -> None:
        self.name = f"loopserve, {mode.value}"
        self._engine, self._collector = engine, collector
        self._mode = mode
        self._concurrency = concurrency
        self._runs = itertools.count(1)

    def run(self, dialogues: Sequence[Dialogue], *, answer_tokens: int, is_over: Callable[[], bool]) -> Run:
        """See `TurnsSide`. Every run has a cache salt of its own, so that none finds what another computed. Raises ValueError."""
        salt = f"{self.name} {next(self._runs)}"
        waiting = deque(enumerate(dialogues))
        readers = [
            _Reader(waiting, answer_tokens, salt=salt, mode=self._mode, is_over=is_over)
            for _ in range(self._concurrency)
        ]
        self._collector.turns.clear()
        started = time.perf_counter()
        drive(self._engine, readers)
        seconds = time.perf_counter() - started
        sessions = {stats.session_id: _dialogue_of(stats.session_id) for stats in self._collector.turns}
        turns = tuple(
            _turn_time(stats, sessions[stats.session_id], dialogues, answer_tokens) for stats in self._collector.turns
        )
        for session_id in sessions:
            self._engine.release(session_id)
        return Run(seconds, turns)


class _Reader:
    """Holds one dialogue after the other; see `benchmarks.drive.Script`."""

    def __init__(
        self,
        waiting: deque[tuple[int, Dialogue]],
        answer_tokens: int,
        *,
        salt: str,
        mode: Mode,
        is_over: Callable[[], bool],
    ) -> None:
        self._waiting = waiting
        self._salt = salt
        self._contract = QualityContract(mode=mode)
        self._sampling = SamplingParams(max_tokens=answer_tokens, temperature=0.0, ignore_eos=True)
        self._is_over = is_over
        self._session_id = SessionId("")
        self._turns: deque[Ids] = deque()
        self._known: list[int] = []

    def next_request(self) -> TurnRequest | None:
        """The next turn of the dialogue at hand, or the first of the next one."""
        if self._is_over():
            return None
        if not self._turns:
            if not self._waiting:
                return None
            index, dialogue = self._waiting.popleft()
            self._turns, self._known = deque(dialogue), []
            self._session_id = SessionId(f"{self._salt} {index}")
        self._known.extend(self._turns.popleft())
        return TurnRequest(self._session_id, tuple(self._known), self._sampling, self._contract, cache_salt=self._salt)

    def turn_ended(self, ended: TurnEnded) -> None:
        """The answer belongs to the conversation."""
        self._known.extend(ended.token_ids)


class VllmSide:
    """vLLM's engine in this process, through `LLM.llm_engine`: a model of the same shape, its weights random (`load_format="dummy"`)."""

    name = "vLLM"

    def __init__(
        self, size: ModelSize, *, max_tokens: int, concurrency: int, memory_share: float, max_batch_tokens: int
    ) -> None:
        """Loads it. `max_tokens` of a dialogue; `memory_share` of the device that it may take, KV included."""
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

        self._sampling_params = SamplingParams
        self._concurrency = concurrency
        self._folder = tempfile.TemporaryDirectory()
        config = llama_config(size)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(self._folder.name)
        self._engine: Any = LLM(
            model=self._folder.name,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=max_tokens,
            max_num_seqs=concurrency,
            max_num_batched_tokens=max_batch_tokens,
            enable_prefix_caching=True,
            gpu_memory_utilization=memory_share,
        ).llm_engine
        self._runs = itertools.count(1)

    def run(self, dialogues: Sequence[Dialogue], *, answer_tokens: int, is_over: Callable[[], bool]) -> Run:
        """See `TurnsSide`. Prompts of a later run differ, or find an earlier run's prefixes."""
        params = self._sampling_params(temperature=0.0, max_tokens=answer_tokens, ignore_eos=True, detokenize=False)
        waiting, number = deque(range(len(dialogues))), next(self._runs)
        known: list[list[int]] = [[] for _ in dialogues]
        begun: dict[str, tuple[int, int, float]] = {}  # dialogue, turn, when
        first_s: dict[str, float] = {}
        turns: list[TurnTime] = []

        def begin(dialogue: int, turn: int) -> None:
            known[dialogue].extend(dialogues[dialogue][turn - 1])
            request_id = f"{number}-{dialogue}-{turn}"
            begun[request_id] = (dialogue, turn, time.perf_counter())
            self._engine.add_request(request_id, {"prompt_token_ids": list(known[dialogue])}, params)

        started = time.perf_counter()
        for _ in range(min(self._concurrency, len(dialogues))):
            begin(waiting.popleft(), 1)
        while begun:
            for output in self._engine.step():
                now = time.perf_counter()
                answer = output.outputs[0].token_ids
                if answer:
                    first_s.setdefault(output.request_id, now)
                if not output.finished:
                    continue
                dialogue, turn, at = begun.pop(output.request_id)
                _require_full(len(answer), answer_tokens, self.name)
                new = len(dialogues[dialogue][turn - 1])
                first = first_s[output.request_id] - at
                turns.append(TurnTime(dialogue, turn, len(known[dialogue]), new, answer_tokens, first, now - at))
                known[dialogue].extend(answer)
                if is_over():
                    continue
                if turn < len(dialogues[dialogue]):
                    begin(dialogue, turn + 1)
                elif waiting:
                    begin(waiting.popleft(), 1)
        return Run(time.perf_counter() - started, tuple(turns))

    def close(self) -> None:
        """Give the device back."""
        self._engine = None
        self._folder.cleanup()
        gc.collect()


def _dialogue_of(session_id: SessionId) -> int:
    return int(session_id.rpartition(" ")[2])


def _turn_time(stats: TurnStats, dialogue: int, dialogues: Sequence[Dialogue], answer_tokens: int) -> TurnTime:
    _require_full(stats.usage.completion_tokens, answer_tokens, "loopserve")
    assert stats.first_token_s is not None, "an answered turn has a first token"
    return TurnTime(
        dialogue=dialogue,
        turn=stats.turn_number,
        prompt_tokens=stats.usage.prompt_tokens,
        new_tokens=len(dialogues[dialogue][stats.turn_number - 1]),
        answer_tokens=stats.usage.completion_tokens,
        first_token_s=stats.first_token_s,
        total_s=stats.total_s,
    )


def _require_full(num_tokens: int, wanted: int, side: str) -> None:
    if num_tokens != wanted:
        raise ValueError(f"{side} answered a turn with {num_tokens} tokens, {wanted} were asked for")
