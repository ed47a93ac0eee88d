"""Every setting of the engine, with its default, its unit and the reason.

Floor 0; with `kernels/dispatch.py` the only room of `loopserve/` that reads the environment.

The defaults of `PrefillSparsity` and `DecodeSparsity` are our answers to what the LoopServe paper (arXiv 2507.13681) leaves open.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from loopserve.environment import read_environment
from loopserve.errors import ConfigError

BLOCK_TOKENS = 16  # unit of allocation, sharing and offload; part of the prefix fingerprint


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_threshold(phase: str, tokens: int | None) -> None:
    _check(tokens is None or tokens >= 0, f"{phase}.auto_min_context_tokens is {tokens}; it must not be negative")


@dataclass(frozen=True, slots=True)
class PrefillSparsity:
    """Phase 1: which lines a chunk of new rows computes, per query head."""

    method: str = "lines"  # a row of `loopserve.methods.PREFILL_RULES`
    chunk_tokens: int = 512  # one selection covers this many new rows, counted from the turn's start, whatever the load
    sampled_rows: int = 64  # rows whose dense weights choose the lines
    row_sampling: str = "stratified"  # "stratified" | "random" | "last"; the last block is always in, but for "random"
    heldout_rows: int = 16  # other rows, on which coverage is measured
    alpha: float = 0.95  # share of the sampled weight that the lines must hold; 1.0: all lines
    tile_tokens: int = 64  # a slash is a diagonal of tiles this wide
    sink_tokens: int = 4  # first columns, always kept
    local_tokens: int = 128  # diagonals of the last offsets, always kept
    dense_last_rows: int = 16  # rows at the chunk's end that read everything
    fixed_columns: int = 1000  # columns of each head that "fixed_lines" reads in a context of `fixed_at_tokens`, ...
    fixed_diagonals: int = 6096  # ... as MInference falls back on; its own numbers come from a search
    fixed_at_tokens: int = 32_768  # shorter contexts read in proportion, longer ones no more
    dense_head_share: float = 0.9  # a head whose lines cover more of its cells than this is computed dense, and counted
    auto_min_context_tokens: int | None = None  # `auto` is dense below; None: as `crossover.py` has it for the device

    def __post_init__(self) -> None:
        _check(
            self.chunk_tokens >= BLOCK_TOKENS,
            f"prefill.chunk_tokens is {self.chunk_tokens}; at least {BLOCK_TOKENS} is needed",
        )
        _check(0.0 < self.alpha <= 1.0, f"prefill.alpha is {self.alpha}; it is a share in (0, 1]")
        _check(
            self.sampled_rows > 0 and self.heldout_rows >= 0,
            "prefill.sampled_rows must be positive, heldout_rows not negative",
        )
        _check(
            self.row_sampling in ("stratified", "random", "last"),
            f"prefill.row_sampling {self.row_sampling!r} is unknown",
        )
        _check(
            min(self.fixed_columns, self.fixed_diagonals, self.fixed_at_tokens) >= 1,
            "prefill.fixed_columns, fixed_diagonals and fixed_at_tokens must be positive",
        )
        _check(
            self.tile_tokens > 0 and self.sink_tokens >= 0 and self.local_tokens >= 0,
            "prefill token counts must not be negative",
        )
        _check_threshold("prefill", self.auto_min_context_tokens)


@dataclass(frozen=True, slots=True)
class DecodeSparsity:
    """Phase 2: which cached tokens each head reads in decode, and when that is chosen again."""

    method: str = "progressive"  # a row of `loopserve.methods.DECODE_RULES`
    budget_tokens: int = 1024  # B, chosen tokens per KV head; sinks and window come on top
    budget_floor_tokens: int = 64  # nobody sets a lower ceiling
    refresh_outputs: int = 1  # n_d: chosen again after so many outputs, ...
    early_refreshes: tuple[int, ...] = (4, 8)  # ... and after these; then, a promised coverage is checked, too
    measure_outputs: int = 64  # coverage, where no choice scores all keys: half a dense step each time; 0: never
    promise_outputs: int = 16  # a `min_coverage` is checked after so many outputs, by all keys
    scoring: str = "sketch"  # a choice in decode reads "exact" keys | a "sketch" of them: a bit a channel, and a scale
    left_out: str = "mean"  # the weight that sketches give to what is not read goes to the "mean" value | to "nothing"
    recall: str = "wait"  # what a compact turn newly chose is read when it is there | "late": by the next output
    scoring_rows: int = 1  # newest queries that score a choice
    select_per: str = "kv_head"  # "kv_head": the group's scores summed | "query_head"
    pooling_tokens: int = 1  # max-pool of scores over positions, odd; 1: off
    sink_tokens: int = 4
    window_tokens: int = 1  # newest tokens at the choice, always read, as is everything since
    coverage_alpha: float | None = None  # keep only as many of the B as hold this share of the scored weight
    dense_layers: tuple[int, ...] = ()  # layers that always read everything, in both phases
    rectify: bool = True  # re-prefill the last answer with the next prompt if it was decoded sparse
    auto_min_context_tokens: int | None = None  # `auto` is dense below; None: as `crossover.py` has it for the device

    def __post_init__(self) -> None:
        _check(self.budget_floor_tokens >= 1, "decode.budget_floor_tokens must be at least 1")
        _check(
            self.budget_tokens >= self.budget_floor_tokens,
            f"decode.budget_tokens is {self.budget_tokens}, below the floor of {self.budget_floor_tokens}",
        )
        _check(
            self.refresh_outputs > 0
            and self.scoring_rows > 0
            and self.promise_outputs > 0
            and self.measure_outputs >= 0,
            "decode.refresh_outputs, scoring_rows and promise_outputs must be positive, measure_outputs not negative",
        )
        _check(self.scoring in ("exact", "sketch"), f"decode.scoring {self.scoring!r} is unknown")
        _check(self.left_out in ("mean", "nothing"), f"decode.left_out {self.left_out!r} is unknown")
        _check(self.recall in ("wait", "late"), f"decode.recall {self.recall!r} is unknown")
        _check(self.select_per in ("kv_head", "query_head"), f"decode.select_per {self.select_per!r} is unknown")
        _check(self.pooling_tokens % 2 == 1, f"decode.pooling_tokens is {self.pooling_tokens}; an odd number is needed")
        _check(
            self.coverage_alpha is None or 0.0 < self.coverage_alpha <= 1.0,
            "decode.coverage_alpha is a share in (0, 1]",
        )
        _check_threshold("decode", self.auto_min_context_tokens)

    @property
    def budget_rungs(self) -> tuple[int, ...]:
        """The budgets that a ceiling is chosen from: doubling from the floor, up to `budget_tokens`."""
        rungs = [self.budget_floor_tokens]
        while rungs[-1] * 2 < self.budget_tokens:
            rungs.append(rungs[-1] * 2)
        return tuple(dict.fromkeys([*rungs, self.budget_tokens]))

    def refresh_due(self, decode_step: int) -> bool:
        """Whether a method that chooses on schedule chooses again at decode step 1, 2, ... since the prefill."""
        return decode_step in self.early_refreshes or decode_step % self.refresh_outputs == 0

    def promise_due(self, decode_step: int) -> bool:
        """Whether a promised coverage is checked at decode step 1, 2, ...; checking reads all keys."""
        return decode_step in self.early_refreshes or decode_step % self.promise_outputs == 0


@dataclass(frozen=True, slots=True)
class DiskSettings:
    """Where sessions are kept beyond memory and restarts."""

    directory: str = ""  # empty: nowhere. Engines of one model may share it, on one machine or on a shared file system
    quota_bytes: int = 16 << 30  # of all engines that share it together; the least recently saved sessions go first
    shared: bool = False  # look for what other engines saved, too: a look at the disk for each new session
    save_after_s: float = 5.0  # a session that was idle so long is saved, so that a crash loses little
    wait_s: float = 5.0  # a turn waits no longer for its session; then it is computed again
    lease_s: float = 15.0  # an engine that was silent so long has lost its sessions to whoever asks
    flush_s: float = 10.0  # at the end, unsaved sessions are saved for so long

    def __post_init__(self) -> None:
        _check(self.quota_bytes > 0, f"disk.quota_bytes is {self.quota_bytes}; it must be positive")
        _check(self.lease_s > 0.0, f"disk.lease_s is {self.lease_s}; it must be positive")
        _check(
            min(self.save_after_s, self.wait_s, self.flush_s) >= 0.0,
            "disk.save_after_s, wait_s and flush_s must not be negative",
        )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """All of the engine. Immutable once built; what changes while running goes through `Engine.set_budget` and the like."""

    model: str = ""  # hub id or directory; empty: the shipped model
    dtype: str = "auto"  # "auto" | "float32" | "bfloat16" | "float16"
    device: str = "auto"  # "auto" | "cpu" | "cuda" | "cuda:1" ...
    max_session_tokens: int | None = None  # None: the model's own limit, or the pool's, whichever is less
    kv_blocks: int | None = None  # size of the pool; None: from kv_memory_ratio
    kv_memory_ratio: float = 0.5  # share of free device memory that the pool takes
    kv_bytes_max: int = 2 << 30  # on a CPU the pool shares the machine with everything else
    host_blocks: int | None = None  # size of the host tier; 0: none; None: from kv_host_ratio
    kv_host_ratio: float = 4.0  # host memory for KV that is not on the device, as a multiple of the device pool, ...
    kv_host_bytes_max: int = 4 << 30  # ... but no more than this; on CUDA it is pinned
    offload_after_s: float = 60.0  # sessions idle for so long move to host memory, before anybody needs their place
    compact_above_ratio: float = 1.0  # of the pool: turns that would take it further are compact; 1.0: when it is full
    max_running_turns: int = 32
    max_waiting_turns: int = 256
    lower_after_s: float = 10.0  # a turn that waited so long for room has the budgets of compact turns lowered
    max_queue_s: float = 120.0  # a turn that has waited longer ends with an error
    max_step_s: float = 300.0  # a step that takes longer counts as a dead engine
    max_step_prefill_tokens: int = 1024  # prefill rows of one forward; decode rows come on top
    max_sessions: int = 4096  # idle sessions beyond this are forgotten, oldest first
    max_branches: int = 8  # of one session; further ones push out the oldest idle one
    reuse: bool = True  # off: every turn computes its whole conversation (for comparison only)
    seed: int = 0  # of turns that bring none
    prefill: PrefillSparsity = field(default_factory=PrefillSparsity)
    decode: DecodeSparsity = field(default_factory=DecodeSparsity)
    disk: DiskSettings = field(default_factory=DiskSettings)
    default_mode: str = "auto"
    default_min_coverage: float | None = None
    launch_ahead: bool | None = None  # queue the next decode step before this one's tokens are known; None: on CUDA
    cuda_graphs: bool = True  # on CUDA, decode steps of like shape are captured once and replayed
    crossover_file: str = ""  # where sparse pays, by `loopserve bench --tune`; asked before the table that ships

    def __post_init__(self) -> None:
        _check(
            self.max_step_prefill_tokens >= self.prefill.chunk_tokens,
            f"max_step_prefill_tokens is {self.max_step_prefill_tokens}, less than prefill.chunk_tokens ({self.prefill.chunk_tokens}): "
            "no chunk would ever fit in a step",
        )
        for name in ("max_running_turns", "max_waiting_turns", "max_sessions", "max_branches"):
            _check(getattr(self, name) >= 1, f"{name} must be at least 1")
        _check(self.max_sessions > self.max_running_turns, "max_sessions must exceed max_running_turns")
        _check(self.default_mode in ("auto", "sparse", "exact"), f"default_mode {self.default_mode!r} is unknown")
        _check(0.0 < self.kv_memory_ratio <= 1.0, f"kv_memory_ratio is {self.kv_memory_ratio}; it is a share in (0, 1]")
        _check(
            0.0 <= self.compact_above_ratio <= 1.0,
            f"compact_above_ratio is {self.compact_above_ratio}; it is a share in [0, 1]",
        )
        _check(
            self.kv_host_ratio >= 0.0 and self.kv_host_bytes_max >= 0,
            "kv_host_ratio and kv_host_bytes_max must not be negative; host_blocks 0 switches the host tier off",
        )
        _check(self.offload_after_s >= 0.0, "offload_after_s must not be negative")
        _check(self.host_blocks is None or self.host_blocks >= 0, "host_blocks must not be negative")
        _check(self.kv_blocks is None or self.kv_blocks >= 2, "kv_blocks must be at least 2: one is reserved")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Self:
        """Defaults, then `LOOPSERVE_ENGINE_<FIELD>` (nested: `LOOPSERVE_ENGINE_DECODE__BUDGET_TOKENS`, values as JSON or plain text), then
        `overrides`. Raises ConfigError for an unknown or malformed setting."""
        env = os.environ if environ is None else environ
        return cls(**(read_environment(cls, env, prefix=ENV_PREFIX) | overrides))


ENV_PREFIX = "LOOPSERVE_ENGINE_"
