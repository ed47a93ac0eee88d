"""Owns what is seen of an engine after every step of a live run, and what a run is made of. Plain records; knows no engine."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Phase:
    """So many steps under one budget."""

    budget_tokens: int
    steps: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The engine after one step."""

    step: int
    seconds: float  # since the load began
    phase: int
    ceiling_tokens: int  # in force in this step
    active_blocks: int  # of the device, held by turns in the batch
    used_blocks: int  # of the device, held by any conversation
    total_blocks: int
    host_blocks: int  # of host memory, held by any conversation
    running: int
    waiting: int
    compact: int
    decoded: int
    prefilled: int
    computed_tokens: int  # of the turns in the batch, on whichever tier
    preempted: int
    duration_s: float
