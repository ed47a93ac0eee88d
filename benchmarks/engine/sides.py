"""Owns the ways to answer the same dialogues: our engine, `generate` with its cache kept, and `transformers`' continuous batching.

Every side gets the same prompts, answers greedily, never stops early, and is timed from its first turn to its last token, prefill
included. What a side sets up once for all turns is outside its time. Knows nothing about pairs, ratios and tables.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

from benchmarks.drive import drive
from loopserve.dialogue import Mode, QualityContract, SamplingParams, SessionId, TurnEnded, TurnRequest
from loopserve.engine import Engine

Ids = tuple[int, ...]
Turns = tuple[Ids, ...]  # of one dialogue

_RESULT_WAIT_S = 300.0  # for one answer of continuous batching
_WARM_UP_IDS = [7] * 24
_FORCE_GQA = "TRANSFORMERS_SDPA_FORCE_GQA"


@dataclass(frozen=True, slots=True)
class Workload:
    """Dialogues of equal shape: every turn brings new tokens and gets an answer."""

    dialogues: int
    turns: int
    prompt_tokens: int
    answer_tokens: int

    @property
    def context_tokens(self) -> int:
        """Length of a dialogue at its end."""
        return self.turns * (self.prompt_tokens + self.answer_tokens)

    @property
    def output_tokens(self) -> int:
        """Tokens answered over all dialogues."""
        return self.dialogues * self.turns * self.answer_tokens


@dataclass(frozen=True, slots=True)
class Run:
    """One side's pass over a workload."""

    seconds: float
    answers: tuple[Turns, ...]  # [dialogue][turn]


class Side(Protocol):
    """A way to answer dialogues."""

    @property
    def name(self) -> str:
        """For tables."""

    def run(self, prompts: tuple[Turns, ...], *, answer_tokens: int) -> Run:
        """Answer all turns of all dialogues; `prompts` is [dialogue][turn], new tokens only."""


def make_prompts(workload: Workload, *, vocab: int, seed: int) -> tuple[Turns, ...]:
    """New tokens of every turn of every dialogue. Fresh ones for every run, so that no side finds an earlier run's prefixes."""
    rng = random.Random(seed)

    def ids() -> Ids:
        return tuple(rng.randrange(vocab) for _ in range(workload.prompt_tokens))

    return tuple(tuple(ids() for _ in range(workload.turns)) for _ in range(workload.dialogues))


class LoopServeSide:
    """Our engine, all dialogues at once; a dialogue's next turn is submitted when its last has ended."""

    name = "loopserve"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._num_runs = 0

    def run(self, prompts: tuple[Turns, ...], *, answer_tokens: int) -> Run:
        """See `Side`."""
        self._num_runs += 1
        users = [_User(f"run-{self._num_runs}-{i}", turns, answer_tokens) for i, turns in enumerate(prompts)]
        started = time.perf_counter()
        drive(self._engine, users)
        seconds = time.perf_counter() - started
        for user in users:
            self._engine.release(user.session_id)
        return Run(seconds, tuple(tuple(user.answers) for user in users))


class _User:
    def __init__(self, name: str, turns: Turns, answer_tokens: int) -> None:
        self.session_id = SessionId(name)
        self.answers: list[Ids] = []
        self._turns = turns
        self._known: Ids = ()
        self._sampling = SamplingParams(max_tokens=answer_tokens, temperature=0.0, ignore_eos=True)

    def next_request(self) -> TurnRequest | None:
        if len(self.answers) == len(self._turns):
            return None
        self._known += self._turns[len(self.answers)]
        return TurnRequest(self.session_id, self._known, self._sampling, QualityContract(mode=Mode.AUTO))

    def turn_ended(self, ended: TurnEnded) -> None:
        self._known += ended.token_ids
        self.answers.append(ended.token_ids)


class GenerateSide:
    """`model.generate`, dialogue after dialogue; the cache of a dialogue is handed from turn to turn."""

    name = "generate"

    def __init__(self, model: Any) -> None:
        self._model = model

    @torch.inference_mode()
    def run(self, prompts: tuple[Turns, ...], *, answer_tokens: int) -> Run:
        """See `Side`."""
        started = time.perf_counter()
        answers = tuple(self._dialogue(turns, answer_tokens) for turns in prompts)
        return Run(time.perf_counter() - started, answers)

    def _dialogue(self, turns: Turns, answer_tokens: int) -> Turns:
        cache = DynamicCache(config=self._model.config)
        known: list[int] = []
        answers: list[Ids] = []
        for turn in turns:
            known.extend(turn)
            ids = torch.tensor([known])
            # `generate` computes only what the cache lacks: the new tokens, and the last answer's last token.
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=answer_tokens,
                min_new_tokens=answer_tokens,
                do_sample=False,
                use_cache=True,
            )
            answers.append(tuple(output[0, len(known) :].tolist()))
            known.extend(answers[-1])
        return tuple(answers)


@dataclass(frozen=True, slots=True)
class BatchingSettings:
    """What of continuous batching there is to choose on a CPU. Flash attention, graphs and the decode fast path need an accelerator."""

    attention: str = "sdpa"  # "sdpa" | "paged|eager"
    page_size: int = 32  # prefixes are shared in whole pages
    max_batch_tokens: int = 1024
    scheduler: str = "fifo"  # "fifo" | "prefill_first"
    grouped_heads: bool = False  # the environment switch that keeps sdpa from repeating KV heads under a mask
    together: bool = True  # a round's turns enter while the loop is paused, so that one batch takes them all
    compile_level: int = 0

    def sentence(self) -> str:
        """For tables and notes."""
        return (
            f"{self.attention}, pages of {self.page_size}, {self.max_batch_tokens} tokens a batch, {self.scheduler}"
            f"{', KV heads not repeated' if self.grouped_heads and self.attention == 'sdpa' else ''}"
            f"{', rounds submitted together' if self.together else ''}"
            f"{f', torch.compile level {self.compile_level}' if self.compile_level else ''}"
        )


class ContinuousBatchingSide:
    """`transformers`' continuous batching with one manager for all turns: all dialogues at once, round after round."""

    name = "continuous batching"

    def __init__(self, model: Any, settings: BatchingSettings) -> None:
        self._model = model
        self.settings = settings

    def run(self, prompts: tuple[Turns, ...], *, answer_tokens: int) -> Run:
        """See `Side`. A manager, warmed up outside the time, serves one run; prefixes are shared within it."""
        self._model.set_attn_implementation(self.settings.attention)
        sampling = GenerationConfig(max_new_tokens=answer_tokens, do_sample=False, eos_token_id=-1)
        with (
            _environment(_FORCE_GQA, "1" if self.settings.grouped_heads else None),
            self._model.continuous_batching_context_manager(
                generation_config=sampling,
                continuous_batching_config=self._config(prompts, answer_tokens),
            ) as manager,
        ):
            self._round(manager, [_WARM_UP_IDS], answer_tokens=2)
            started = time.perf_counter()
            answers = self._dialogues(manager, prompts, answer_tokens)
            seconds = time.perf_counter() - started
        return Run(seconds, answers)

    def _dialogues(self, manager: Any, prompts: tuple[Turns, ...], answer_tokens: int) -> tuple[Turns, ...]:
        known: list[list[int]] = [[] for _ in prompts]
        answers: list[list[Ids]] = [[] for _ in prompts]
        for turn_index in range(len(prompts[0])):
            for ids, turns in zip(known, prompts, strict=True):
                ids.extend(turns[turn_index])
            for ids, said, answer in zip(
                known, answers, self._round(manager, known, answer_tokens=answer_tokens), strict=True
            ):
                ids.extend(answer)
                said.append(answer)
        return tuple(tuple(said) for said in answers)

    def _round(self, manager: Any, conversations: list[list[int]], *, answer_tokens: int) -> list[Ids]:
        inputs = [list(ids) for ids in conversations]
        if self.settings.together:
            with manager.pause():
                request_ids = manager.add_requests(inputs, max_new_tokens=answer_tokens)
        else:
            request_ids = manager.add_requests(inputs, max_new_tokens=answer_tokens)
        answers: dict[str, Ids] = {}
        while len(answers) < len(inputs):
            result = manager.get_result(timeout=_RESULT_WAIT_S)
            if result is None or result.error is not None:
                raise RuntimeError(f"continuous batching failed: {'no answer' if result is None else result.error}")
            if result.is_finished():
                answers[result.request_id] = tuple(result.generated_tokens)
        return [answers[request_id] for request_id in request_ids]

    def _config(self, prompts: tuple[Turns, ...], answer_tokens: int) -> ContinuousBatchingConfig:
        settings = self.settings
        longest = max(sum(len(turn) + answer_tokens for turn in turns) for turns in prompts)
        pages_a_dialogue = -(-longest // settings.page_size) + 1
        padding: dict[str, int] = {}
        if settings.compile_level:  # compiled shapes are padded; the defaults are made for large accelerators
            padding = {"q_padding_interval_size": max(1, len(prompts)), "kv_padding_interval_size": 256}
        return ContinuousBatchingConfig(
            page_size=settings.page_size,
            num_blocks=2 * len(prompts) * pages_a_dialogue,  # twice what is needed, so that nothing is held back
            max_batch_tokens=settings.max_batch_tokens,
            max_requests_per_batch=max(len(prompts), 1),
            allow_block_sharing=True,
            scheduler_type=settings.scheduler,
            default_compile_level=settings.compile_level,
            auto_switch_to_flash=False,
            **padding,
        )


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before
