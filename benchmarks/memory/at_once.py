"""Owns one question: do so many conversations get their answers at once on one engine? And how fast, where they do.

All are submitted together. They are answered at once if there are steps in which every one of them decodes, as many as are to be counted,
and nobody ever had to give way for that: no turn waits once all are in the batch, none is preempted, no budget is lowered. Room and
scheduler decide that from lengths alone, so it can be asked without a model (`NoModel`), in seconds; whoever publishes asks again with one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.memory.copies import give_to_each
from loopserve.config import EngineConfig
from loopserve.dialogue import Mode, QualityContract, SamplingParams, SessionId, TurnEnded, TurnEvent, TurnRequest
from loopserve.engine import Engine
from loopserve.errors import LoopServeError, Overloaded
from loopserve.kv.image import SessionImage
from loopserve.loading import LoadedModel
from loopserve.plan import BlockCopy, BlockId, SampledToken, StepPlan, StepResult
from loopserve.runner import Finished, ModelRunner, Runner
from loopserve.stats import StepStats, TurnStats

_PATIENCE_S = 1e9  # nobody gives way for having others wait: the budget is part of the question


@dataclass(frozen=True, slots=True)
class Load:
    """Equal conversations; `context_tokens` is their length at their answers' ends."""

    conversations: int
    context_tokens: int
    question_tokens: int
    answer_tokens: int
    warm_steps: int  # of all at once, that are not counted: what is chosen for the first time is brought in them
    counted_steps: int

    def __post_init__(self) -> None:
        assert self.history_tokens > 0, "the question and the answer are longer than the conversation"

    @property
    def history_tokens(self) -> int:
        """Computed before the load begins."""
        return self.context_tokens - self.question_tokens - self.answer_tokens


@dataclass(frozen=True, slots=True)
class AtOnce:
    """What became of a load. Only of one that was answered at once there are numbers."""

    why_not: str  # "" where all were answered at once
    step_s: tuple[float, ...] = ()  # counted
    device_bytes: int = 0  # kept beside the model while all are answered
    step_bytes: int | None = None  # needed by counted steps beyond that and given back; None: not known on this device
    compact_turns: int = 0
    cached_tokens_min: int = 0  # of any turn, in its prompt: nothing of the histories was computed again
    coverage: float | None = None  # in decode, mean over the turns that measured it

    @property
    def is_at_once(self) -> bool:
        """Whether all were answered at once."""
        return not self.why_not


class StepLog:
    """A stats sink that keeps every step, and when it was over."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.ended_s: list[float] = []

    def on_step(self, stats: StepStats) -> None:
        """Keep it."""
        self.steps.append(stats)
        self.ended_s.append(time.perf_counter())

    def on_turn(self, stats: TurnStats) -> None:
        """Turns are told by their events."""


class NoModel:
    """A runner that computes nothing: every turn draws token 0."""

    device_bytes = 0

    def launch(self, plan: StepPlan) -> Finished:
        """The step, done."""
        return Finished(StepResult(tuple(SampledToken(s.turn_id, 0) for s in plan.segments if s.sample is not None)))

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """There is nothing to copy."""

    def erase(self, blocks: Sequence[BlockId]) -> None:
        """There is nothing in them."""

    def read(self, blocks: Sequence[BlockId]) -> tuple[Tensor, Tensor]:
        """Raises NotImplementedError: nobody hands over what was never computed."""
        raise NotImplementedError("a runner without a model has no KV")

    def write(self, blocks: Sequence[BlockId], keys: Tensor, values: Tensor) -> None:
        """There is nowhere to put it."""


def answer(
    loaded: LoadedModel,
    config: EngineConfig,
    load: Load,
    history: SessionImage,
    *,
    mode: Mode,
    questions: Sequence[Sequence[int]],
    runner: Runner | None = None,
) -> AtOnce:
    """Put a load on a fresh engine. `questions`: the new tokens of each conversation. `runner` None: the real one."""
    assert len(questions) == load.conversations, "everybody asks"
    if runner is None:
        assert config.kv_blocks is not None and config.host_blocks is not None, "sizes are given, not found"
        runner = ModelRunner(loaded, config, num_blocks=config.kv_blocks, num_host_blocks=config.host_blocks)
    log = StepLog()
    engine = Engine(config, loaded=loaded, runner=runner, stats=log)
    names = [f"conversation {index}" for index in range(load.conversations)]
    try:
        if not give_to_each(engine, history, names):
            return AtOnce("the histories do not fit")
    except Overloaded:
        return AtOnce("the histories do not fit")
    known = history.branches[0].token_ids
    sampling = SamplingParams(max_tokens=load.answer_tokens, temperature=0.0, ignore_eos=True)
    # Questions are computed densely: what is told of coverage is then of decode alone.
    contract = QualityContract(mode=mode, prefill_method="dense")
    listener = _Listener()
    for name, question in zip(names, questions, strict=True):
        prompt = (*known, *question)
        request = TurnRequest(SessionId(name), prompt, sampling, contract, cache_salt=name)
        try:
            engine.submit(request, listener)
        except LoopServeError as error:
            return AtOnce(f"a conversation is refused: {error.message}")
    return _count(engine, runner, load, log, listener)


def settings_for(config: EngineConfig, load: Load) -> EngineConfig:
    """`config` with room in its tables for the load, and patience for as long as it takes."""
    return replace(
        config,
        max_running_turns=load.conversations,
        max_waiting_turns=max(config.max_waiting_turns, load.conversations),
        max_sessions=max(config.max_sessions, load.conversations + 1),
        max_session_tokens=load.context_tokens,
        lower_after_s=_PATIENCE_S,
        max_queue_s=_PATIENCE_S,
        offload_after_s=_PATIENCE_S,
    )


class _Listener:
    """Keeps the turns' ends."""

    def __init__(self) -> None:
        self.ended: list[TurnEnded] = []

    def __call__(self, events: Sequence[TurnEvent]) -> None:
        self.ended.extend(event for event in events if isinstance(event, TurnEnded))


def _count(engine: Engine, runner: Runner, load: Load, log: StepLog, listener: _Listener) -> AtOnce:
    """Step until all decode, then through the counted steps."""
    wanted, most, first = load.warm_steps + load.counted_steps, 0, None
    workspace = _Workspace(runner)
    while first is None or len(log.steps) - first < wanted:
        if first is not None and len(log.steps) - first == load.warm_steps:
            workspace.begin()
        if not engine.step() or listener.ended:
            return AtOnce(f"at most {most} were in decode together when the first answer ended")
        step = log.steps[-1]
        most = max(most, step.num_decode_tokens)
        if step.num_preempted:
            return AtOnce("a turn was preempted")
        if first is None and step.num_decode_tokens == load.conversations:
            first = len(log.steps) - 1
        elif first is not None and step.num_decode_tokens < load.conversations:
            return AtOnce("a turn had to wait in its answer")
    memory = engine.memory()
    if memory.pressure.lowered_budgets:
        return AtOnce("budgets were lowered")
    step_bytes = workspace.end()
    device_bytes = runner.device_bytes
    for turn in list(engine._audience):
        engine.cancel(turn)
    while engine.step():  # a step that was launched ahead
        pass
    usages = [ended.usage for ended in listener.ended]
    coverages = [usage.quality.coverage_mean for usage in usages if usage.quality.coverage_mean is not None]
    begin = first + load.warm_steps
    return AtOnce(
        why_not="",
        step_s=tuple(log.ended_s[index] - log.ended_s[index - 1] for index in range(begin, begin + load.counted_steps)),
        device_bytes=device_bytes,
        step_bytes=step_bytes,
        compact_turns=memory.num_compact_turns,
        cached_tokens_min=min(usage.cached_tokens for usage in usages),
        coverage=sum(coverages) / len(coverages) if coverages else None,
    )


class _Workspace:
    """Memory that steps take and give back, where the device counts it."""

    def __init__(self, runner: Runner) -> None:
        is_cuda = isinstance(runner, ModelRunner) and runner.store.device.type == "cuda"
        self._device = runner.store.device if is_cuda and isinstance(runner, ModelRunner) else None
        self._before = 0

    def begin(self) -> None:
        """Count from here."""
        if self._device is not None:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)

    def end(self) -> int | None:
        """The most beyond what was held at the beginning, bytes."""
        if self._device is None:
            return None
        return int(torch.cuda.max_memory_allocated(self._device) - self._before)
