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
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import httpx
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve._private.common import DeploymentID

from benchmarks.cluster.affinity import token_counter
from benchmarks.cluster.dialogue_load import CONNECT_S_MAX, SaidBy, Turn, TurnFailed, answered
from benchmarks.cluster.service import free_port
from benchmarks.machine import describe_machine, require_quiet
from benchmarks.report import RESULTS, Table, settings_of, write_result
from deploy.app import APP_NAME, ENGINE_DEPLOYMENT, build_app
from deploy.handoff.settings import HandoffSettings
from deploy.local import local_cluster
from deploy.settings import DeploySettings
from loopserve.config import BLOCK_TOKENS, DiskSettings, EngineConfig
from loopserve.evaluation.dialogues import RECALL_TASKS
from loopserve.evaluation.items import Dialogue
from loopserve.evaluation.items import Turn as Said
from loopserve.evaluation.scoring import score
from loopserve.evaluation.tasks import Wanted, load_made

_WAIT_S_MAX = 180.0
_SILENCE_S_MAX = 60.0  # a turn that says nothing for so long hangs
_POLL_S = 0.2
_TURNS_BEFORE = 2
_TRIES = 2  # of a turn
_CAUGHT_MIN = 2  # turns of the replica that is killed which are under way, where they are to be
_CAUGHT_POLL_S = 0.002
_ENDED_S_MAX = 30.0  # after the kill: a turn that is neither answered nor told why by then hangs
_RETRY_S = 2.0  # as the server's Retry-After says
_REUSED_SHARE_MIN = 0.95
_NOT_CHOSEN = ("not_worth_it", "over_limit")  # results of a hand-off that was never begun
_WITHOUT_REASON = ("the stream broke off", "the stream ended without")


class Event(StrEnum):
    """What happens between the turns that tell and those that ask."""

    NOTHING = "nothing"
    DRAIN = "drain"
    KILL = "kill"
    KILL_IN_TURNS = "kill in turns"


@dataclass(frozen=True, slots=True)
class Case:
    """One way in which a replica goes."""

    name: str
    event: Event = Event.NOTHING
    hands_off: bool = True
    has_disk: bool = False


UNDISTURBED = Case("undisturbed")
CASES = (
    Case("drained", Event.DRAIN),
    Case("drained alone", Event.DRAIN, hands_off=False),
    Case("killed", Event.KILL),
    Case("killed in turns", Event.KILL_IN_TURNS),
    Case("killed, disk", Event.KILL, has_disk=True),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one client says: the past that it brings, two turns, and two questions after the event."""

    name: str
    session_id: str | None
    past: tuple[tuple[str, str], ...]  # role and text
    texts: tuple[str, ...]
    asked: tuple[Said, ...]  # the last of the texts, with what is accepted


@dataclass(slots=True)
class Talk:
    """One client, as far as it came."""

    plan: Plan
    messages: list[dict[str, str]]
    turns: list[Turn] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # what was said of turns that broke off
    ended_at_s: float = 0.0  # the last try, whatever came of it
    is_open: bool = False  # a turn is under way
    has_failed: bool = False  # a turn was not answered even when it was asked again

    @classmethod
    def of(cls, plan: Plan) -> Talk:
        """Nothing said yet but what the client brings."""
        return cls(plan, [{"role": role, "content": text} for role, text in plan.past])


@dataclass(frozen=True, slots=True)
class Outcome:
    """One case, over."""

    case: Case
    talks: tuple[Talk, ...]
    gone: str  # the replica that went; empty: none
    handoffs: dict[str, int]  # by result
    event_s: float  # a drain's, until its process is gone; of a kill in turns, until all of these were answered
    moved_bytes: int = 0
    moving_s: float = 0.0  # of all hand-offs together, as the new holders saw them
    caught: tuple[str, ...] = ()  # dialogues of the killed replica that were under way
    longest_s: float = 0.0  # from the kill until the last of these was answered or told why


@dataclass(frozen=True, slots=True)
class Check:
    """One claim about a case, and what was found."""

    name: str
    passed: bool
    finding: str


def plans(args: argparse.Namespace) -> list[Plan]:
    """The dialogues, the same for the same seed. Raises ValueError for one that is too short."""
    count = token_counter(args.model)
    wanted = Wanted(RECALL_TASKS, num=args.dialogues, tokens=args.tokens, seed=args.seed, split="validation")
    made = load_made(wanted, lambda text: count(text) + 2)
    return [_plan(dialogue, f"named {number}" if number % 2 == 0 else None) for number, dialogue in enumerate(made)]


def _plan(dialogue: Dialogue, session_id: str | None) -> Plan:
    told = [turn for turn in dialogue.turns if not turn.probe]
    asked = tuple(turn for turn in dialogue.turns if turn.probe)[:2]
    if len(told) < _TURNS_BEFORE:
        raise ValueError(f"Dialogue {dialogue.id} has fewer than {_TURNS_BEFORE} turns: take more tokens.")
    past = [("system", dialogue.system)] if dialogue.system else []
    for turn in told[:-_TURNS_BEFORE]:
        past += [("user", turn.user), ("assistant", turn.answer)]
    texts = tuple(turn.user for turn in (*told[-_TURNS_BEFORE:], *asked))
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
        body = {
            "model": self._model,
            "messages": talk.messages,
            "max_tokens": self._args.answer_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "loopserve": {"mode": "exact"},
        }
        said = SaidBy(talk.plan.name, talk.plan.session_id, number + 1)
        async with gate:
            for number_of_try in range(_TRIES):
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


class Fleet:
    """The service, as it runs."""

    def __init__(self, settings: DeploySettings) -> None:
        self._settings = settings
        self.url = f"http://127.0.0.1:{settings.port}"

    def replicas(self) -> dict[str, int]:
        """The replicas that answer, and their process ids."""
        try:
            ready = httpx.get(f"{self.url}/ready", timeout=5.0, trust_env=False)
            names = set(ready.json().get("replicas", ()))
        except (httpx.HTTPError, ValueError):
            return {}
        details = ray.get(self._controller().get_serve_instance_details.remote(), timeout=_WAIT_S_MAX)
        told = details["applications"][APP_NAME]["deployments"][ENGINE_DEPLOYMENT]["replicas"]
        return {replica["replica_id"]: replica["pid"] for replica in told if replica["replica_id"] in names}

    def wait_for(self, num_replicas: int, *, without: str = "") -> dict[str, int]:
        """Until so many answer, and one of them does not any more. Raises TimeoutError."""
        deadline_s = time.monotonic() + _WAIT_S_MAX
        while time.monotonic() < deadline_s:
            found = self.replicas()
            if len(found) == num_replicas and without not in found:
                return found
            time.sleep(_POLL_S)
        raise TimeoutError(f"not {num_replicas} replicas within {_WAIT_S_MAX:g} s: {self.replicas()}")

    def scale(self, num_replicas: int) -> None:
        """As the autopilot does it."""
        target = DeploymentID(name=ENGINE_DEPLOYMENT, app_name=APP_NAME)
        ray.get(self._controller().update_deployment_replicas.remote(target, num_replicas), timeout=_WAIT_S_MAX)

    def model(self) -> str:
        """The name under which the model is served."""
        models = httpx.get(f"{self.url}/v1/models", timeout=30.0, trust_env=False)
        return str(models.json()["data"][0]["id"])

    def wait_until_gone(self, processes: Mapping[str, int]) -> str:
        """The first of these replicas whose process ends: `/ready` leaves one out before it has given its sessions away."""
        deadline_s = time.monotonic() + _WAIT_S_MAX
        while time.monotonic() < deadline_s:
            gone = [name for name, process in processes.items() if not Path(f"/proc/{process}").exists()]
            if gone:
                return gone[0]
            time.sleep(_POLL_S)
        raise TimeoutError(f"no replica ended within {_WAIT_S_MAX:g} s")

    def counted(self, metric: str, label: str = "") -> dict[str, float]:
        """A metric of all replicas that are there, by one label; without one under the empty name."""
        found: Counter[str] = Counter()
        page = httpx.get(f"{self.url}/metrics", timeout=30.0, trust_env=False).text
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name == metric and sample.value:
                    found[sample.labels[label] if label else ""] += sample.value
        return dict(found)

    def _controller(self) -> Any:
        return ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")


@contextmanager
def fleet(args: argparse.Namespace, case: Case, folder: Path) -> Iterator[Fleet]:
    """The service of one case, until the block ends."""
    settings = DeploySettings(
        port=free_port(),
        replicas=args.replicas,
        ingress_replicas=2,
        model=args.model,
        handoff=HandoffSettings(enabled=case.hands_off),
    )
    disk = DiskSettings(str(folder / "kv"), shared=True, save_after_s=1.0) if case.has_disk else DiskSettings()
    config = EngineConfig(model=args.model, kv_blocks=args.blocks, disk=disk)
    with local_cluster(settings):
        app = build_app(settings, engine_config=config)
        serve.run_many([serve.RunTarget(app, name=APP_NAME, route_prefix="/", external_scaler_enabled=True)])
        yield Fleet(settings)


def run_case(args: argparse.Namespace, case: Case, planned: Sequence[Plan]) -> Outcome:
    """Start, tell, take a replica away, ask, end."""
    talks = [Talk.of(plan) for plan in planned]
    with tempfile.TemporaryDirectory(prefix="replica-loss-") as name, fleet(args, case, Path(name)) as running:
        before = running.wait_for(args.replicas)
        client = Client(running.url, running.model(), args)
        for _ in range(_TURNS_BEFORE):
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


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the dialogues of the replica that went, and of all."""

    held: int  # by the replica that went
    reused: int  # of these: the next turn found all that was said before
    recomputed: int
    held_named: int  # of those held: with a header
    reused_named: int
    failed: int  # of all dialogues
    broke_off: int  # turns that were answered only when they were asked again
    others_reused: int  # dialogues of the other replicas that stayed as they were
    others: int
    other_answers: int  # dialogues whose first answer unlike the undisturbed one came after the event
    other_before: int  # ... or before it, so that the event has nothing to do with it
    right: float  # share of the questions with the answer that is known
    first_token_reused_s: float | None  # median of the next turn
    first_token_recomputed_s: float | None

    @classmethod
    def of(cls, outcome: Outcome, undisturbed: Outcome) -> Tally:
        """Count."""
        held = [talk for talk in outcome.talks if _holder(talk) == outcome.gone != ""]
        others = [talk for talk in outcome.talks if talk not in held]
        next_turns = [(_is_reused(talk), talk.turns[_TURNS_BEFORE].first_token_s) for talk in held if _went_on(talk)]
        named = [talk for talk in held if talk.plan.session_id is not None]
        wanted = {talk.plan.name: talk for talk in undisturbed.talks}
        differing = [_first_other_answer(talk, wanted[talk.plan.name]) for talk in outcome.talks]
        scores = [share for talk in outcome.talks for share in _scores(talk)]
        return cls(
            held=len(held),
            reused=sum(is_reused for is_reused, _ in next_turns),
            recomputed=sum(not is_reused for is_reused, _ in next_turns),
            held_named=len(named),
            reused_named=sum(_went_on(talk) and _is_reused(talk) for talk in named),
            failed=sum(talk.has_failed for talk in outcome.talks),
            broke_off=sum(len(talk.broken) - talk.has_failed * _TRIES for talk in outcome.talks),
            others_reused=sum(_went_on(talk) and _is_reused(talk) for talk in others),
            others=len(others),
            other_answers=sum(index is not None and index >= _TURNS_BEFORE for index in differing),
            other_before=sum(index is not None and index < _TURNS_BEFORE for index in differing),
            right=statistics.fmean(scores) if scores else 0.0,
            first_token_reused_s=_median([seconds for is_reused, seconds in next_turns if is_reused]),
            first_token_recomputed_s=_median([seconds for is_reused, seconds in next_turns if not is_reused]),
        )


def checks(outcome: Outcome, tally: Tally) -> list[Check]:
    """The claims about a case."""
    num = len(outcome.talks)
    comparable = num - tally.other_before
    finding = f"{tally.other_answers} of {comparable} dialogues differ, {tally.other_before} differed before anything happened"
    stayed = f"{tally.others_reused} of {tally.others} dialogues of the other replicas found theirs"
    found = [
        Check("none fails", tally.failed == 0, f"{tally.failed} of {num} dialogues"),
        Check("same answers", tally.other_answers == 0 < comparable, finding),
        Check("others stay", tally.others_reused == tally.others, stayed),
    ]
    if outcome.case.event is Event.DRAIN:
        found += _drain_checks(outcome, tally)
    if outcome.case.event is Event.KILL_IN_TURNS:
        found += _broken_checks(outcome)
    if outcome.case.has_disk:
        share = tally.reused / tally.held if tally.held else 0.0
        finding = (
            f"{tally.reused} of {tally.held} went on with their KV; with a header {tally.reused_named} of {tally.held_named}, "
            f"without {tally.reused - tally.reused_named} of {tally.held - tally.held_named}"
        )
        found.append(Check("saved sessions go on", share >= _REUSED_SHARE_MIN, finding))
    elif outcome.case.event in (Event.KILL, Event.KILL_IN_TURNS):
        finding = f"{tally.recomputed} of {tally.held}"
        found.append(Check("all computed again", tally.recomputed == tally.held > 0, finding))
    return found


def _drain_checks(outcome: Outcome, tally: Tally) -> list[Check]:
    """Chosen is whatever was tried, also where that failed: only then does the share tell what a hand-off is worth."""
    told = sum(outcome.handoffs.values())
    chosen = told - sum(outcome.handoffs.get(result, 0) for result in _NOT_CHOSEN)
    share = tally.reused / chosen if chosen else 0.0
    moving = f"{tally.reused} went on with their KV, {chosen} were to move, {outcome.handoffs.get('moved', 0)} moved"
    if not outcome.case.hands_off:
        return [
            Check("moved sessions go on", share >= _REUSED_SHARE_MIN, moving),
            Check("nothing reused", tally.reused == 0 < tally.held, f"{tally.reused} of {tally.held}"),
        ]
    return [
        Check("moved sessions go on", share >= _REUSED_SHARE_MIN, moving),
        Check("all accounted for", told == tally.held, f"{told} results told of {tally.held} sessions"),
    ]


def _broken_checks(outcome: Outcome) -> list[Check]:
    broken = [text for talk in outcome.talks for text in talk.broken]
    unclear = [text for text in broken if "TurnFailed" not in text or any(part in text for part in _WITHOUT_REASON)]
    num = len(outcome.caught)
    return [
        Check("turns were under way", num > 0, f"{num} at the kill"),
        Check("none hangs", outcome.longest_s <= _ENDED_S_MAX, f"the last was over {outcome.longest_s:.1f} s after it"),
        Check("told why", not unclear, f"{len(broken)} broke off, {len(unclear)} of them without a reason"),
    ]


def _holder(talk: Talk) -> str:
    """The replica that answered last before the event; empty where the dialogue did not come so far."""
    return talk.turns[_TURNS_BEFORE - 1].replica if len(talk.turns) >= _TURNS_BEFORE else ""


def _went_on(talk: Talk) -> bool:
    return len(talk.turns) > _TURNS_BEFORE


def _is_reused(talk: Talk) -> bool:
    """Whether the turn after the event found the whole conversation, but for at most one block."""
    before, after = talk.turns[_TURNS_BEFORE - 1 : _TURNS_BEFORE + 1]
    left = before.prompt_tokens + before.completion_tokens
    return left - after.cached_tokens - after.rectified_tokens <= BLOCK_TOKENS


def _first_other_answer(talk: Talk, wanted: Talk) -> int | None:
    """Of the turns: what follows another answer is another dialogue."""
    pairs = zip(talk.turns, wanted.turns, strict=False)
    return next((index for index, (turn, other) in enumerate(pairs) if not _is_same_answer(turn, other)), None)


def _is_same_answer(turn: Turn, other: Turn) -> bool:
    """By text and number of tokens: the service tells no token ids."""
    return (turn.answer, turn.completion_tokens) == (other.answer, other.completion_tokens)


def _scores(talk: Talk) -> list[float]:
    """Of the questions; one that was not answered is wrong."""
    answers = [turn.answer for turn in talk.turns[_TURNS_BEFORE:]]
    answers += [""] * (len(talk.plan.asked) - len(answers))
    return [score(answer, said.accepted, said.metric) for answer, said in zip(answers, talk.plan.asked, strict=True)]


def _median(seconds: Sequence[float]) -> float | None:
    return statistics.median(seconds) if seconds else None


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


def is_control(case: Case, check: Check) -> bool:
    """Whether a check must fail, or it measures something else."""
    return not case.hands_off and check.name == "moved sessions go on"


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
