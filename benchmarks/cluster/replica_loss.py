"""What becomes of conversations when a replica goes? Starts the whole service, takes one replica away, and checks what clients saw.

    undisturbed        nothing happens: what every answer should be
    drained            one replica less, as the autopilot asks for it: sessions are handed over where that is expected to pay
    drained alone      the same with hand-off switched off: the checks about moving must fail here, or they measure something else
    killed             SIGKILL to one replica's process, while nobody is being answered
    killed in turns    the same while many are: who was told that a turn broke off asks again, once
    killed, disk       as killed; the replicas keep idle sessions in one directory

Every dialogue is told and answered before, and asked two questions with known answers afterwards, in mode exact: computed again or reused,
an answer must be the undisturbed one, word for word. Every second dialogue names its session, the others are found by what was said.

    python -m benchmarks.cluster.replica_loss
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.cluster.affinity import token_counter
from benchmarks.cluster.dialogue_load import CONNECT_S_MAX, SaidBy, TurnFailed, answered, body_of
from benchmarks.cluster.replica_loss_verdict import (
    TRIES,
    TURNS_BEFORE,
    Case,
    Check,
    Event,
    Outcome,
    Plan,
    Talk,
    Tally,
    checks,
    is_control,
)
from benchmarks.cluster.service import free_port
from benchmarks.cluster.steered_fleet import Fleet, running_fleet
from benchmarks.machine import describe_machine, require_quiet
from benchmarks.report import RESULTS, Table, settings_of, write_result
from deploy.handoff.settings import HandoffSettings
from deploy.settings import DeploySettings
from loopserve.config import BLOCK_TOKENS, DiskSettings, EngineConfig
from loopserve.evaluation.dialogues import RECALL_TASKS
from loopserve.evaluation.items import Dialogue
from loopserve.evaluation.tasks import Wanted, load_made

_SILENCE_S_MAX = 60.0  # a turn that says nothing for so long hangs
_CAUGHT_MIN = 2  # turns of the replica that is killed which are under way, where they are to be
_CAUGHT_POLL_S = 0.002
_RETRY_S = 2.0  # as the server's Retry-After says

UNDISTURBED = Case("undisturbed")
CASES = (
    Case("drained", Event.DRAIN),
    Case("drained alone", Event.DRAIN, hands_off=False),
    Case("killed", Event.KILL),
    Case("killed in turns", Event.KILL_IN_TURNS),
    Case("killed, disk", Event.KILL, has_disk=True),
)


def plans(args: argparse.Namespace) -> list[Plan]:
    """The dialogues, the same for the same seed. Raises ValueError for one that is too short."""
    count = token_counter(args.model)
    wanted = Wanted(RECALL_TASKS, num=args.dialogues, tokens=args.tokens, seed=args.seed, split="validation")
    made = load_made(wanted, lambda text: count(text) + 2)
    return [_plan(dialogue, f"named {number}" if number % 2 == 0 else None) for number, dialogue in enumerate(made)]


def _plan(dialogue: Dialogue, session_id: str | None) -> Plan:
    told = [turn for turn in dialogue.turns if not turn.probe]
    asked = tuple(turn for turn in dialogue.turns if turn.probe)[:2]
    if len(told) < TURNS_BEFORE:
        raise ValueError(f"Dialogue {dialogue.id} has fewer than {TURNS_BEFORE} turns: take more tokens.")
    past = [("system", dialogue.system)] if dialogue.system else []
    for turn in told[:-TURNS_BEFORE]:
        past += [("user", turn.user), ("assistant", turn.answer)]
    texts = tuple(turn.user for turn in (*told[-TURNS_BEFORE:], *asked))
    return Plan(dialogue.id, session_id, tuple(past), texts, asked)


class Client:
    """Asks the service as an ordinary client does, for all talks."""

    def __init__(self, url: str, model: str, args: argparse.Namespace) -> None:
        self._url, self._model, self._args = url, model, args

    async def round(self, talks: Sequence[Talk]) -> None:
        """The next turn of every talk that has not failed, some at once."""
        gate = asyncio.Semaphore(self._args.concurrency)
        timeout = httpx.Timeout(_SILENCE_S_MAX, connect=CONNECT_S_MAX)
        async with httpx.AsyncClient(base_url=self._url, timeout=timeout, trust_env=False) as http:
            await asyncio.gather(*(self._turn(http, talk, gate) for talk in talks if not talk.has_failed))

    async def _turn(self, http: httpx.AsyncClient, talk: Talk, gate: asyncio.Semaphore) -> None:
        number = len(talk.turns)
        talk.messages.append({"role": "user", "content": talk.plan.texts[number]})
        body = body_of(self._model, talk.messages, answer_tokens=self._args.answer_tokens, mode="exact")
        said = SaidBy(talk.plan.name, talk.plan.session_id, number + 1)
        async with gate:
            for number_of_try in range(TRIES):
                if number_of_try:
                    await asyncio.sleep(_RETRY_S)
                talk.is_open = True
                try:
                    turn = await answered(http, body, said)
                except TurnFailed as failed:
                    talk.broken.append(str(failed))
                    continue
                finally:
                    talk.is_open = False
                    talk.ended_at_s = talk.ended_at_s or time.perf_counter()
                talk.turns.append(turn)
                talk.messages.append({"role": "assistant", "content": turn.answer})
                return
        talk.has_failed = True


def _settings(args: argparse.Namespace, case: Case) -> DeploySettings:
    return DeploySettings(
        port=free_port(),
        replicas=args.replicas,
        ingress_replicas=2,
        model=args.model,
        handoff=HandoffSettings(enabled=case.hands_off),
    )


def _engine_config(args: argparse.Namespace, case: Case, folder: Path) -> EngineConfig:
    disk = DiskSettings(str(folder / "kv"), shared=True, save_after_s=1.0) if case.has_disk else DiskSettings()
    return EngineConfig(model=args.model, kv_blocks=args.blocks, disk=disk)


def run_case(args: argparse.Namespace, case: Case, planned: Sequence[Plan]) -> Outcome:
    """Start, tell, take a replica away, ask, end."""
    talks = [Talk.of(plan) for plan in planned]
    settings = _settings(args, case)
    with (
        tempfile.TemporaryDirectory(prefix="replica-loss-") as name,
        running_fleet(settings, _engine_config(args, case, Path(name))) as running,
    ):
        before = running.wait_for(args.replicas)
        client = Client(running.url, running.model(), args)
        for _ in range(TURNS_BEFORE):
            asyncio.run(client.round(talks))
        time.sleep(args.settle_s)  # claims are published, and idle sessions saved
        began_s = time.perf_counter()
        loss = asyncio.run(_take_away(running, before, case, talks, client))
        event_s = time.perf_counter() - began_s
        if case.has_disk:
            time.sleep(args.look_s)  # who lives looks at the disk now and then, and learns what nobody holds
        elif case.event is Event.DRAIN:
            time.sleep(args.settle_s)  # claims of the new holders are published
        while any(len(talk.turns) < len(talk.plan.texts) for talk in talks if not talk.has_failed):
            asyncio.run(client.round(talks))
        handoffs = running.counted("loopserve_handoffs_total", "result")
        return Outcome(
            case,
            tuple(talks),
            loss.gone,
            {result: int(count) for result, count in handoffs.items()},
            event_s,
            moved_bytes=int(running.counted("loopserve_handoff_bytes_total").get("", 0)),
            moving_s=running.counted("loopserve_handoff_seconds_sum").get("", 0.0),
            caught=loss.caught,
            longest_s=loss.longest_s,
        )


@dataclass(frozen=True, slots=True)
class Loss:
    """How a replica went."""

    gone: str = ""  # empty: none
    caught: tuple[str, ...] = ()  # dialogues with a turn under way there
    longest_s: float = 0.0  # until the last of these was answered or told why


async def _take_away(
    running: Fleet, before: Mapping[str, int], case: Case, talks: Sequence[Talk], client: Client
) -> Loss:
    """The event of a case."""
    if case.event is Event.NOTHING:
        return Loss()
    if case.event is Event.DRAIN:
        running.scale(len(before) - 1)
        gone = running.wait_until_gone(before)
        running.wait_for(len(before) - 1, without=gone)
        return Loss(gone)
    gone = Counter(talk.turns[-1].replica for talk in talks).most_common(1)[0][0]
    if case.event is Event.KILL:
        os.kill(before[gone], signal.SIGKILL)
        return Loss(gone)
    held = [talk for talk in talks if talk.turns[-1].replica == gone]
    for talk in talks:
        talk.ended_at_s = 0.0
    turns = asyncio.create_task(client.round([*held, *(talk for talk in talks if talk not in held)]))
    while not turns.done() and sum(talk.is_open for talk in held) < min(_CAUGHT_MIN, len(held)):
        await asyncio.sleep(_CAUGHT_POLL_S)
    caught = [talk for talk in held if talk.is_open]
    killed_at_s = time.perf_counter()
    os.kill(before[gone], signal.SIGKILL)
    await turns
    longest_s = max((talk.ended_at_s - killed_at_s for talk in caught), default=0.0)
    return Loss(gone, tuple(talk.plan.name for talk in caught), longest_s)


def run_benchmark(args: argparse.Namespace, command: Sequence[str] = ()) -> tuple[str, bool]:
    """All cases; the result's Markdown, and whether every check that should pass passes and every other one fails."""
    load_before = require_quiet(forced=args.force)
    planned = plans(args)
    outcomes = []
    for case in (UNDISTURBED, *CASES):
        outcomes.append(run_case(args, case, planned))
        print(f"{case.name}: {outcomes[-1].event_s:.1f} s, {outcomes[-1].handoffs}", flush=True)
    undisturbed = outcomes[0]
    tallies = [(outcome, Tally.of(outcome, undisturbed)) for outcome in outcomes]
    found = [(outcome.case, check) for outcome, tally in tallies for check in checks(outcome, tally)]
    passed = all(check.passed is not is_control(case, check) for case, check in found)
    numbers: Mapping[str, Any] = {
        "passed": passed,
        "forced": args.force,
        "settings": settings_of(args),
        "command": shlex.join(["python", "-m", "benchmarks.cluster.replica_loss", *command]),
        "cases": [
            {
                "case": asdict(outcome.case),
                "gone": outcome.gone,
                "event_s": outcome.event_s,
                "moved_bytes": outcome.moved_bytes,
                "moving_s": outcome.moving_s,
                "caught": outcome.caught,
                "longest_s": outcome.longest_s,
                "handoffs": outcome.handoffs,
                "tally": asdict(tally),
                "checks": [asdict(check) for check in checks(outcome, tally)],
                "broken": [text for talk in outcome.talks for text in talk.broken],
                "turns": [asdict(turn) for talk in outcome.talks for turn in talk.turns],
            }
            for outcome, tally in tallies
        ],
    }
    text = write_result(
        args.results,
        args.name,
        title="What becomes of conversations when a replica goes",
        machine=describe_machine(load_before=load_before),
        numbers=numbers,
        tables=[check_table(found, passed=passed), case_table(tallies)],
        notes=notes(args, tallies, str(numbers["command"])),
    )
    return text, passed


def check_table(found: Sequence[tuple[Case, Check]], *, passed: bool) -> Table:
    """Every claim and what was found."""
    rows = tuple(
        (
            case.name,
            check.name,
            ("pass" if check.passed else "FAIL") + (" (must fail)" if is_control(case, check) else ""),
            check.finding,
        )
        for case, check in found
    )
    return Table(f"Verdict: {'pass' if passed else 'FAIL'}", ("case", "check", "", "found"), rows)


def case_table(tallies: Sequence[tuple[Outcome, Tally]]) -> Table:
    """The dialogues of the replica that went, and all others."""
    header = (
        *(
            "case",
            "held by it",
            "reused",
            "computed again",
            "others that stayed",
            "turns asked again",
            "right, per cent",
        ),
        *("ms to first token, reused", "computed again ", "event, s", "MiB moved", "hand-offs"),
    )
    return Table(
        "What became of them",
        header,
        tuple(
            (
                outcome.case.name,
                str(tally.held),
                str(tally.reused),
                str(tally.recomputed),
                f"{tally.others_reused} of {tally.others}",
                str(tally.broke_off),
                f"{100 * tally.right:.1f}",
                _ms(tally.first_token_reused_s),
                _ms(tally.first_token_recomputed_s),
                f"{outcome.event_s:.1f}",
                f"{outcome.moved_bytes / 2**20:.1f}",
                ", ".join(f"{name} {count:g}" for name, count in sorted(outcome.handoffs.items())) or "-",
            )
            for outcome, tally in tallies
        ),
    )


def notes(args: argparse.Namespace, tallies: Sequence[tuple[Outcome, Tally]], command: str) -> list[str]:
    """What a reader must know beside the tables."""
    broken = Counter(
        text.partition(": ")[2][:160] for outcome, _ in tallies for talk in outcome.talks for text in talk.broken
    )
    return [
        f"{args.dialogues} made dialogues of about {args.tokens} tokens with known answers, every second one without any header; two turns "
        "before, two questions afterwards, mode exact, temperature 0. The client brings what was said before, as after an import.",
        f"{args.replicas} replicas, 2 ingresses, model {args.model or 'shipped'}, one machine; at most {args.concurrency} requests "
        "at once.",
        f"Reused: the next turn found all but at most {BLOCK_TOKENS} tokens of what was there. Others that stayed: of the dialogues that "
        "other replicas held, those that found theirs. Same answers: as when nothing happens, word for word.",
        "Drained: one replica less, by the controller's call that the autopilot uses. Killed: SIGKILL to the process that holds most "
        f"dialogues; in turns: as soon as {_CAUGHT_MIN} of its turns are under way. A turn that breaks off is asked once more.",
        f"Disk: idle sessions are saved after 1 s; {args.settle_s:g} s pass before the kill and {args.look_s:g} s after it, in which the "
        "others look at the disk.",
        *(f"Told of a turn that broke off, {count} times: {text}" for text, count in broken.most_common(4)),
        *(["FORCED on a machine that was not quiet: times are not to be published."] if args.force else []),
        f"`{command}`",
    ]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.0f}"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--replicas", type=int, default=3)
    add("--dialogues", type=int, default=60)
    add("--tokens", type=int, default=1000, help="of a dialogue")
    add("--answer-tokens", type=int, default=24)
    add("--concurrency", type=int, default=6, help="requests at once")
    add("--blocks", type=int, default=8192, help="of a replica's device: memory never decides")
    add("--settle-s", type=float, default=5.0, help="before the event")
    add("--look-s", type=float, default=25.0, help="after a kill, where there is a disk")
    add("--model", default="", help="hub id or directory; the shipped model if not given")
    add("--seed", type=int, default=11)
    add("--force", action="store_true", help="run on a busy machine; the result says so")
    add("--results", type=Path, default=RESULTS)
    add("--name", default="replica_loss")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    written, has_passed = run_benchmark(parse_arguments(), sys.argv[1:])
    print(written)
    sys.exit(0 if has_passed else 1)
