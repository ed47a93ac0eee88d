"""Does a conversation stay where its KV is? Starts the whole service, holds many dialogues, and checks what their clients saw.

    python -m benchmarks.cluster.affinity            three replicas behind two ingresses, 50 dialogues of 8 turns

Three checks, of which each must be able to fail: the same load runs a second time with the engine's reuse switched off, and the verdict
is "pass" only if the first run passes all checks and the second fails the two that are about reuse. What an earlier turn left is worth
`prompt_tokens + completion_tokens` of that turn, as its own usage reported them; a part block may be missing.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.cluster.dialogue_load import Dialogue, Load, Pace, Turn, drive, made_dialogues
from benchmarks.cluster.service import running_service
from benchmarks.machine import describe_machine, require_quiet
from benchmarks.report import RESULTS, Table, write_result
from loopserve.config import BLOCK_TOKENS
from loopserve.loading import shipped_model_dir

TTFT_RATIO_MAX = 1.5
_TEMPLATE_TOKENS = 16  # a generous allowance for what a chat template puts around a turn
_SPARE_BLOCKS = 64  # for turns in flight and the block that every pool keeps for itself
_REPORTS_PER_RUN = 10


@dataclass(frozen=True, slots=True)
class Fleet:
    """What is started."""

    replicas: int = 3
    ingresses: int = 2
    model: str = ""  # hub id or directory; empty: the shipped model
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Check:
    """One claim about a run, and what was found."""

    name: str
    passed: bool
    finding: str


@dataclass(frozen=True, slots=True)
class Run:
    """One load against one service."""

    reuse: bool
    replicas: tuple[str, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Both runs held against the claim."""

    with_reuse: tuple[Check, ...]
    without_reuse: tuple[Check, ...]
    passed: bool


def check_placement(turns: Sequence[Turn]) -> Check:
    """Every dialogue was answered by one replica, over all its turns."""
    dialogues = _by_dialogue(turns)
    moved = sorted(name for name, held in dialogues.items() if len({turn.replica for turn in held}) > 1)
    spread = "/".join(str(count) for count in sorted(Counter(held[0].replica for held in dialogues.values()).values()))
    finding = f"{len(dialogues) - len(moved)} of {len(dialogues)} dialogues stayed; first turns by replica: {spread}"
    return Check("placement", not moved, finding + (f"; moved: {', '.join(moved[:5])}" if moved else ""))


def check_cached(turns: Sequence[Turn]) -> Check:
    """Every turn but the first found the whole earlier conversation, but for at most one block."""
    missing = [_missing_tokens(before, turn) for before, turn in _followed(turns)]
    whole = sum(tokens <= BLOCK_TOKENS for tokens in missing)
    finding = f"{whole} of {len(missing)} later turns; at most {max(missing)} tokens were missing"
    return Check("cached", whole == len(missing), finding)


def check_first_token(turns: Sequence[Turn]) -> Check:
    """The last turn's first token comes about as soon as the second's, in the median, for equally long new input."""
    last = max(turn.number for turn in turns)
    new_tokens = {number: _median_new_tokens(turns, number) for number in (2, last)}
    if abs(new_tokens[2] - new_tokens[last]) > BLOCK_TOKENS:
        return Check("first token", False, f"turns 2 and {last} had different new input: {new_tokens} tokens")
    second_s, last_s = (statistics.median(_first_tokens_s(turns, number)) for number in (2, last))
    ratio = last_s / second_s
    finding = f"turn {last} took {ratio:.2f} times turn 2 ({last_s * 1e3:.0f} ms, {second_s * 1e3:.0f} ms; median)"
    return Check("first token", ratio <= TTFT_RATIO_MAX, finding)


def verdict(with_reuse: Sequence[Turn], without_reuse: Sequence[Turn]) -> Verdict:
    """Pass only where reuse makes the difference: a check that passes without reuse has measured something else."""
    on, off = (
        (check_placement(turns), check_cached(turns), check_first_token(turns)) for turns in (with_reuse, without_reuse)
    )
    about_reuse = [check for check in off if check.name in ("cached", "first token")]
    return Verdict(on, off, all(check.passed for check in on) and not any(check.passed for check in about_reuse))


def run_load(
    fleet: Fleet,
    load: Load,
    dialogues: Sequence[Dialogue],
    *,
    reuse: bool,
    log: Path,
    say: Callable[[str], None],
) -> Run:
    """Start the service, hold the dialogues, end the service. Raises ServiceFailed, TurnFailed, ValueError where a dialogue cannot fit."""
    say(f"reuse {'on' if reuse else 'off'}: starting {fleet.replicas} replicas and {fleet.ingresses} ingresses")
    settings = service_settings(fleet, load, reuse=reuse)
    with running_service(settings, num_replicas=fleet.replicas, log=log) as service:
        if _tokens_per_dialogue(load) > service.max_session_tokens:
            raise ValueError(
                f"A dialogue grows to about {_tokens_per_dialogue(load)} tokens; {service.model} serves at most "
                f"{service.max_session_tokens}: take fewer or shorter turns."
            )
        say(f"ready: {service.model} at {service.url}")
        progress = _Progress(load.num_dialogues * load.num_turns, say)
        turns = asyncio.run(drive(service.url, service.model, dialogues, load=load, on_turn=progress.add))
        return Run(reuse, service.replicas, turns)


def service_settings(fleet: Fleet, load: Load, *, reuse: bool) -> dict[str, str]:
    """The service's environment. Every replica has room for all dialogues, so that memory never decides a result."""
    blocks = load.num_dialogues * math.ceil(_tokens_per_dialogue(load) / BLOCK_TOKENS) + _SPARE_BLOCKS
    return {
        "MODEL": fleet.model,
        "DEVICE": fleet.device,
        "LOOPSERVE_INGRESS_REPLICAS": str(fleet.ingresses),
        "LOOPSERVE_ENGINE_REUSE": "true" if reuse else "false",
        "LOOPSERVE_ENGINE_KV_BLOCKS": str(blocks),
    }


def turn_table(title: str, turns: Sequence[Turn]) -> Table:
    """What each turn number cost and found."""
    found: dict[int, list[float]] = {}
    for before, turn in _followed(turns):
        found.setdefault(turn.number, []).append((turn.cached_tokens + turn.rectified_tokens) / _left_tokens(before))
    rows = []
    for number in range(1, max(turn.number for turn in turns) + 1):
        waits_ms = sorted(wait_s * 1e3 for wait_s in _first_tokens_s(turns, number))
        prompts = [turn.prompt_tokens for turn in turns if turn.number == number]
        shares = found.get(number)
        rows.append(
            (
                str(number),
                f"{statistics.median(prompts):.0f}",
                f"{_median_new_tokens(turns, number):.0f}",
                f"{statistics.median(waits_ms):.0f}",
                f"{waits_ms[math.ceil(0.9 * len(waits_ms)) - 1]:.0f}",
                f"{statistics.median(shares):.3f}" if shares else "-",
                f"{min(shares):.3f}" if shares else "-",
            )
        )
    header = (
        "turn",
        "prompt tokens",
        "of them new",
        "TTFT median, ms",
        "TTFT p90, ms",
        "found, median",
        "found, least",
    )
    return Table(title, header, tuple(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Both runs, the tables, the verdict and the result files; 0 if the claim holds."""
    options = _options(arguments)
    load_before = require_quiet(forced=options.force)
    fleet = Fleet(**{field.name: getattr(options, field.name) for field in fields(Fleet)})
    load = Load(**{field.name: getattr(options, field.name) for field in fields(Load)})
    dialogues = made_dialogues(load, token_counter(fleet.model))
    with tempfile.TemporaryDirectory(prefix="affinity-") as folder:
        runs = {
            reuse: run_load(fleet, load, dialogues, reuse=reuse, log=Path(folder) / f"reuse-{reuse}.log", say=_say)
            for reuse in (True, False)
        }
    found = verdict(runs[True].turns, runs[False].turns)
    print(_written(options, fleet, load, runs, found, load_before))
    return 0 if found.passed else 1


def token_counter(model: str) -> Callable[[str], int]:
    """Counts the tokens of a text as the model's tokenizer does, special tokens left out."""
    tokenizer = AutoTokenizer.from_pretrained(model or str(shipped_model_dir()))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False, verbose=False))


class _Progress:
    """Says now and then how far a run is."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self._total, self._say = total, say
        self._num = 0

    def add(self, turn: Turn) -> None:
        """One more turn is over."""
        self._num += 1
        if self._num % math.ceil(self._total / _REPORTS_PER_RUN) == 0 or self._num == self._total:
            self._say(f"  {self._num}/{self._total} turns; turn {turn.number} waited {turn.first_token_s * 1e3:.0f} ms")


def _written(
    options: argparse.Namespace,
    fleet: Fleet,
    load: Load,
    runs: Mapping[bool, Run],
    found: Verdict,
    load_before: float,
) -> str:
    checks = Table(
        f"Verdict: {'pass' if found.passed else 'FAIL'}",
        ("check", "with reuse", "found", "without reuse", "found "),
        tuple(
            (on.name, _word(on), on.finding, _word(off) + _wanted(off), off.finding)
            for on, off in zip(found.with_reuse, found.without_reuse, strict=True)
        ),
    )
    numbers: dict[str, Any] = {
        "passed": found.passed,
        "fleet": asdict(fleet),
        "load": asdict(load),
        "service_settings": service_settings(fleet, load, reuse=True),
        "inherited_settings": {name: text for name, text in os.environ.items() if name.startswith("LOOPSERVE_")},
        "with_reuse": [asdict(check) for check in found.with_reuse],
        "without_reuse": [asdict(check) for check in found.without_reuse],
        "runs": [asdict(run) for run in runs.values()],
    }
    return write_result(
        options.out,
        options.name,
        title=f"{load.num_dialogues} dialogues of {load.num_turns} turns over {fleet.replicas} replicas",
        machine=describe_machine(load_before=load_before),
        numbers=numbers,
        tables=[checks, *(turn_table(f"Reuse {'on' if r.reuse else 'off'}", r.turns) for r in runs.values())],
        notes=[
            f"{load.num_dialogues} dialogues, every second one without any header, {load.num_common_opening} with a common opening; "
            f"{load.turn_tokens} new tokens of plain text a turn, at most {load.answer_tokens} tokens of answer, temperature 0.",
            f"{fleet.replicas} replicas, {fleet.ingresses} ingresses, model {fleet.model or 'shipped'}, device {fleet.device}; "
            "a replica computes with its share of the cores, at least one; the client runs on the same machine.",
            f"At most {load.concurrency} requests at once, pace {load.pace}: waiting for a place is not measured, but a turn shares the "
            "cores with the others.",
            f"`found` is (cached_tokens + rectified_tokens) over the tokens that the turn before had left; at most {BLOCK_TOKENS} tokens "
            "of these may be missing. TTFT is from sending the request to its first text.",
            f"The verdict needs all checks with reuse, and a failure of `cached` and of `first token` (at most {TTFT_RATIO_MAX} times) "
            "without.",
        ],
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    fleet, load = Fleet(), Load()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--replicas", type=int, default=fleet.replicas)
    add("--ingresses", type=int, default=fleet.ingresses)
    add("--model", default=fleet.model, help="hub id or directory; the shipped model if not given")
    add("--device", default=fleet.device)
    add("--num-dialogues", type=int, default=load.num_dialogues)
    add("--num-turns", type=int, default=load.num_turns)
    add("--turn-tokens", type=int, default=load.turn_tokens, help="new user text of a turn")
    add("--answer-tokens", type=int, default=load.answer_tokens)
    add("--num-common-opening", type=int, default=load.num_common_opening)
    add("--concurrency", type=int, default=load.concurrency, help="requests at once")
    add("--pace", type=Pace, choices=list(Pace), default=load.pace, help="when a dialogue goes on after an answer")
    add("--mode", default=load.mode, help="loopserve.mode of every request; none if not given")
    add("--seed", type=int, default=load.seed)
    add("--out", type=Path, default=RESULTS, help="folder of the result files")
    add("--name", default="cluster_affinity", help="of the result files")
    add("--force", action="store_true", help="run on a busy machine")
    return parser.parse_args(arguments)


def _by_dialogue(turns: Sequence[Turn]) -> dict[str, list[Turn]]:
    """Turns of each dialogue, in order."""
    dialogues: dict[str, list[Turn]] = {}
    for turn in sorted(turns, key=lambda turn: turn.number):
        dialogues.setdefault(turn.dialogue, []).append(turn)
    return dialogues


def _followed(turns: Sequence[Turn]) -> list[tuple[Turn, Turn]]:
    """Every turn but first ones, behind the one before it."""
    pairs = [pair for held in _by_dialogue(turns).values() for pair in pairwise(held)]
    assert pairs, "a run without a second turn says nothing"
    return pairs


def _left_tokens(turn: Turn) -> int:
    """How long the conversation was when a turn had ended."""
    return turn.prompt_tokens + turn.completion_tokens


def _missing_tokens(before: Turn, turn: Turn) -> int:
    return _left_tokens(before) - turn.cached_tokens - turn.rectified_tokens


def _median_new_tokens(turns: Sequence[Turn], number: int) -> float:
    """Prompt tokens that the turn before had not left; of first turns all."""
    if number == 1:
        return statistics.median(turn.prompt_tokens for turn in turns if turn.number == 1)
    return statistics.median(
        turn.prompt_tokens - _left_tokens(before) for before, turn in _followed(turns) if turn.number == number
    )


def _first_tokens_s(turns: Sequence[Turn], number: int) -> list[float]:
    return [turn.first_token_s for turn in turns if turn.number == number]


def _tokens_per_dialogue(load: Load) -> int:
    """At most, by the load's own numbers; the system message counts as one more turn."""
    return (load.num_turns + 1) * (load.turn_tokens + load.answer_tokens + _TEMPLATE_TOKENS)


def _word(check: Check) -> str:
    return "pass" if check.passed else "fail"


def _wanted(check: Check) -> str:
    return "" if check.name == "placement" else " (must fail)"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the service ends with this process
    sys.exit(main())
