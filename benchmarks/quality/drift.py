"""Does it add up over many turns that sparse decode writes its KV from what it read? `python -m benchmarks.quality.drift`.

Dialogues of the validation split are gone through turn by turn on the model's own answers, as a client would: every answer stays in the
past of the next turn, with the KV that the variant wrote. With rectification the last answer is prefilled again, densely, together with
the next prompt; without it the KV of a sparse decode stays. Questions are told apart by how many turns went before them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.machine import describe_machine
from benchmarks.report import RESULTS, Table, settings_of, write_result
from loopserve.chat import ChatService
from loopserve.cli.dialogue_file import ScriptedDialogue, ScriptedTurn
from loopserve.cli.player import PlayedDialogue, Terms, play_all
from loopserve.config import DecodeSparsity, EngineConfig
from loopserve.dialogue import Mode, QualityContract, SamplingParams
from loopserve.engine import Engine
from loopserve.evaluation.dialogues import Shape, Split, make_past
from loopserve.evaluation.items import Dialogue
from loopserve.evaluation.outcomes import paired_interval
from loopserve.evaluation.scoring import score
from loopserve.loading import LoadedModel, load_model

BUCKETS = ((1, 5), (6, 10), (11, 15), (16, 20), (21, 50))


@dataclass(frozen=True, slots=True)
class Variant:
    """How the answers of a run are decoded; `budget_tokens` None: dense."""

    name: str
    budget_tokens: int | None = None
    rectify: bool = True


def make_scripts(num: int, tokens: int, seed: int, loaded: LoadedModel) -> list[Dialogue]:
    """Dialogues in which every puzzle is asked about on the way."""
    shape = Shape(tokens, turns=(30, 40), tokens_a_puzzle=(40, 80), asked=1.0, asked_again=0.5, surrounded=0.3)

    def count(text: str) -> int:
        return len(loaded.tokenizer.encode(text, add_special_tokens=False)) + 2

    return [
        make_past(random.Random(f"{seed}:{index}"), Split.VALIDATION, shape, count_tokens=count, id_=f"drift-{index}")
        for index in range(num)
    ]


def play(
    variant: Variant, dialogues: Sequence[Dialogue], loaded: LoadedModel, concurrency: int
) -> list[PlayedDialogue]:
    """All dialogues under one variant, on an engine of its own."""
    decode = DecodeSparsity(budget_floor_tokens=1, rectify=variant.rectify)
    engine = Engine(EngineConfig(decode=decode, max_running_turns=concurrency), loaded=loaded)
    contract = QualityContract(
        mode=Mode.EXACT if variant.budget_tokens is None else Mode.SPARSE,
        budget_tokens=variant.budget_tokens,
        prefill_method="dense",
        decode_method="dense" if variant.budget_tokens is None else "progressive",
    )
    engine.start()
    chat = ChatService(engine)
    try:
        return asyncio.run(
            play_all(
                chat,
                [_scripted(dialogue) for dialogue in dialogues],
                terms=Terms(SamplingParams(temperature=0.0, max_tokens=48), contract),
                concurrency=concurrency,
                on_turn=lambda: None,
                on_end=lambda session_id, _: chat.forget(session_id),
            )
        )
    finally:
        engine.stop()


def _scripted(dialogue: Dialogue) -> ScriptedDialogue:
    turns = tuple(ScriptedTurn(user=turn.user) for turn in dialogue.turns)
    return ScriptedDialogue(id=dialogue.id, system=dialogue.system or None, turns=turns)


def scores(dialogues: Sequence[Dialogue], played: Sequence[PlayedDialogue]) -> list[dict[int, float]]:
    """Scores by turn number, dialogue by dialogue. Raises RuntimeError where a dialogue broke off."""
    found = []
    for dialogue, went in zip(dialogues, played, strict=True):
        if went.error is not None:
            raise RuntimeError(f"{dialogue.id}: {went.error}")
        pairs = zip(dialogue.turns, went.turns, strict=True)
        found.append({t.number: score(t.answer, turn.accepted, turn.metric) for turn, t in pairs if turn.is_scored})
    return found


def bucket(scored: Sequence[dict[int, float]], low: int, high: int) -> list[list[float]]:
    """The scores of the questions asked in turns `low` to `high`, dialogue by dialogue."""
    return [[value for number, value in each.items() if low <= number <= high] for each in scored]


def table(variants: Sequence[Variant], scored: Sequence[list[dict[int, float]]], seed: int) -> Table:
    """Score of each variant by turn number, and the paired difference to dense."""
    header = ("variant", *(f"turns {low} to {high}" for low, high in BUCKETS), "all")
    bounds = (*BUCKETS, (1, sys.maxsize))
    rows = []
    for variant, own in zip(variants, scored, strict=True):
        cells = [variant.name]
        for low, high in bounds:
            ours, dense = bucket(own, low, high), bucket(scored[0], low, high)
            num = sum(len(each) for each in ours)
            mean = sum(map(sum, ours)) / max(1, num)
            gain = mean - sum(map(sum, dense)) / max(1, num)
            interval = paired_interval(ours, dense, seed=seed)
            cells.append(f"{mean:.1%} ({gain:+.1%}, 95%: {interval[0]:+.1%} to {interval[1]:+.1%}; {num})")
        rows.append(tuple(cells))
    return Table("Own answers, turn after turn: score (difference to dense; questions)", header, tuple(rows))


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogues", type=int, default=80)
    parser.add_argument("--tokens", type=int, default=1800)
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 24])
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Dense, and every budget with and without rectification."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    loaded = load_model(EngineConfig())
    dialogues = make_scripts(args.dialogues, args.tokens, args.seed, loaded)
    variants = [Variant("dense")]
    for budget in args.budgets:
        variants += [
            Variant(f"{budget} tokens, {how}", budget, how == "rectified") for how in ("rectified", "as written")
        ]
    scored, reprefilled = [], {}
    for variant in variants:
        played = play(variant, dialogues, loaded, args.concurrency)
        scored.append(scores(dialogues, played))
        usages = [turn.usage for dialogue in played for turn in dialogue.turns]
        reprefilled[variant.name] = sum(usage.quality.rectified_tokens for usage in usages)
        print(variant.name, json.dumps(reprefilled[variant.name]), flush=True)
    text = write_result(
        args.results,
        "quality_drift",
        title="Drift over many turns, with and without rectification",
        machine=describe_machine(load_before=os.getloadavg()[0]),
        numbers={
            "settings": settings_of(args),
            "scores": [list(each) for each in scored],
            "rectified_tokens": reprefilled,
        },
        tables=[table(variants, scored, args.seed)],
        notes=[f"{variant.name}: {reprefilled[variant.name]} tokens prefilled again" for variant in variants],
    )
    print(text)


if __name__ == "__main__":
    main()
