"""Owns runs in pairs and what two sides have in common: ratios of time, and whether their greedy answers are the same.

Knows nothing about how a side answers (`sides.py`) nor about what is published.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.engine.sides import Run, Side, Turns, Workload, make_prompts

NEAR_TIE = 1e-3  # logits closer than this swap places with the order of float32 sums; the mean gap of the model is 0.2
TARGETS = {("generate", 8): 5.0, ("generate", 1): 1.2, ("continuous batching", 8): 1.5}


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two sides' greedy answers are the same."""

    dialogues: int
    identical: int
    near_ties: int  # dialogues that part where the two best logits are closer than NEAR_TIE
    unexplained: int  # dialogues that part elsewhere: an error of one side


@dataclass(frozen=True, slots=True)
class Pairs:
    """Our engine against one peer on one workload, run for run."""

    peer: str
    workload: Workload
    seconds: tuple[float, ...]
    peer_seconds: tuple[float, ...]
    agreement: Agreement

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times the peer's tokens per second we make, in each pair."""
        return tuple(theirs / ours for ours, theirs in zip(self.seconds, self.peer_seconds, strict=True))

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def target(self) -> float | None:
        """What the median ratio should reach, where we have set ourselves a mark."""
        return TARGETS.get((self.peer, self.workload.dialogues))


def measure(
    ours: Side, peers: Sequence[Side], workload: Workload, *, pairs: int, vocab: int, reference: Any, seed: int
) -> list[Pairs]:
    """Runs A B C, A B C, ...: every round fresh dialogues, the same for all sides. Raises ValueError on a short answer."""
    sides = [ours, *peers]
    runs: dict[str, list[Run]] = {side.name: [] for side in sides}
    rounds = [make_prompts(workload, vocab=vocab, seed=seed + index) for index in range(pairs)]
    for prompts in rounds:
        for side in sides:
            gc.collect()  # nobody pays for another's garbage
            run = side.run(prompts, answer_tokens=workload.answer_tokens)
            check_complete(run, workload, side.name)
            runs[side.name].append(run)
    return [
        Pairs(
            peer=peer.name,
            workload=workload,
            seconds=tuple(run.seconds for run in runs[ours.name]),
            peer_seconds=tuple(run.seconds for run in runs[peer.name]),
            agreement=compare(rounds, runs[ours.name], runs[peer.name], reference),
        )
        for peer in peers
    ]


def check_complete(run: Run, workload: Workload, name: str) -> None:
    """Raise ValueError unless the side answered every turn with the full number of tokens."""
    wanted = [[workload.answer_tokens] * workload.turns] * workload.dialogues
    if [[len(answer) for answer in turns] for turns in run.answers] != wanted:
        raise ValueError(f"{name} did not answer every turn with {workload.answer_tokens} tokens")


def compare(
    rounds: Sequence[tuple[Turns, ...]], ours: Sequence[Run], theirs: Sequence[Run], reference: Any
) -> Agreement:
    """Count identical dialogues; where two part, the reference model judges whether the place was a near tie."""
    identical = near_ties = unexplained = 0
    for prompts, mine, other in zip(rounds, ours, theirs, strict=True):
        for turns, answers, other_answers in zip(prompts, mine.answers, other.answers, strict=True):
            gap = parting_gap(turns, answers, other_answers, reference)
            identical += gap is None
            near_ties += gap is not None and gap < NEAR_TIE
            unexplained += gap is not None and gap >= NEAR_TIE
    return Agreement(identical + near_ties + unexplained, identical, near_ties, unexplained)


@torch.inference_mode()
def parting_gap(prompts: Turns, answers: Turns, others: Turns, reference: Any) -> float | None:
    """How far the worse of the two tokens at the first difference is below the best logit; None if nothing differs."""
    known: list[int] = []
    for prompt, answer, other in zip(prompts, answers, others, strict=True):
        known.extend(prompt)
        for mine, theirs in zip(answer, other, strict=True):
            if mine != theirs:
                logits = reference(torch.tensor([known])).logits[0, -1]
                return float(logits.max() - logits[[mine, theirs]].min())
            known.append(mine)
    return None
