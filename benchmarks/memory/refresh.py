"""Refresh policies of compact turns: by what tokens are ranked, when what is newly chosen is read, and how often is chosen again.

Twelve policies (scoring sketch | exact, recall wait | late, refresh after 1, 4 and 16 outputs), each told by

- what is read: of the B tokens that the same query's exact attention makes heaviest, the share that was read, and the attention weight;
- what is moved: bytes from host memory for each decoded token. *Recalled* ones come to places, *staged* ones are whole histories that were
  read to score by keys or to measure coverage;
- the share of decode steps' time that this takes, finding places included, and the time of a step beside a resident turn's;
- what the quality suite says of the answers, compact turns throughout, beside dense and resident ones.

Reads and times are of the same conversations in separate runs: watching what is read takes longer than reading it. For a CPU.

    python -m benchmarks.memory.refresh
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from benchmarks.machine import describe_machine, require_quiet, usable_cores
from benchmarks.memory.copies import computed_once, questions_of, text_ids
from benchmarks.memory.watch import Traffic, watch_reads, watch_traffic
from benchmarks.report import RESULTS, Table, settings_of, write_result
from loopserve.config import BLOCK_TOKENS, DecodeSparsity, EngineConfig
from loopserve.dialogue import Mode, QualityContract, SamplingParams, SessionId, TurnEnded, TurnEvent, TurnRequest
from loopserve.engine import Engine
from loopserve.evaluation.answers import Answer
from loopserve.evaluation.dialogues import RECALL_TASKS
from loopserve.evaluation.outcomes import Estimate, VariantKey, summarize
from loopserve.evaluation.suite import Settings, run
from loopserve.evaluation.tasks import Wanted
from loopserve.evaluation.variants import REFERENCE, Budget, Override, Variant, make_variants
from loopserve.handoff import kv_format
from loopserve.kv.image import SessionImage, encode
from loopserve.loading import LoadedModel, load_model
from loopserve.reads import num_places
from loopserve.stats import StepStats, TurnStats

_METHOD = "loopserve-decode"  # dense prefill: what differs is decode
_PATIENCE_S = 1e9
_SPARE_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class Policy:
    """How a turn decodes; `is_compact` False: all of its KV is on the device, and nothing is recalled."""

    scoring: str = "sketch"
    recall: str = "wait"
    refresh_outputs: int = 1
    is_compact: bool = True

    @property
    def name(self) -> str:
        """For tables."""
        said = f"{self.scoring}, {self.recall}, every {self.refresh_outputs}"
        return said if self.is_compact else f"resident: {self.scoring}, every {self.refresh_outputs}"

    @property
    def overrides(self) -> tuple[Override, ...]:
        """The same for an engine of the quality suite."""
        return (
            ("compact_above_ratio", "0.0" if self.is_compact else "1.0"),
            ("decode.scoring", self.scoring),
            ("decode.recall", self.recall),
            ("decode.refresh_outputs", str(self.refresh_outputs)),
        )

    def decode(self, budget_tokens: int) -> DecodeSparsity:
        """The engine's defaults, but for this."""
        return DecodeSparsity(
            budget_tokens=budget_tokens,
            budget_floor_tokens=min(64, budget_tokens),
            scoring=self.scoring,
            recall=self.recall,
            refresh_outputs=self.refresh_outputs,
        )


RESIDENT = Policy(is_compact=False)


@dataclass(frozen=True, slots=True)
class Decoded:
    """Decode steps of some conversations side by side, after the first ones."""

    step_s: tuple[float, ...]
    traffic: Traffic  # of these steps
    first: (
        Traffic  # of all before: places are filled for the first time, and the questions' prefills read the histories
    )
    conversations: int
    compact_turns: int

    @property
    def tokens(self) -> int:
        """Decoded in the counted steps."""
        return self.conversations * len(self.step_s)


@dataclass(slots=True)
class Found:
    """All that was found of one policy."""

    policy: Policy
    runs: list[Decoded] = field(default_factory=list)
    recall: float | None = None
    weight: float | None = None
    score: Estimate | None = None
    to_dense: Estimate | None = None
    kv_share: float | None = None
    recalled_bytes_an_answer: float | None = None  # of the quality suite


@dataclass(frozen=True, slots=True)
class Row:
    """One policy. None: not watched, or there is nothing to watch."""

    policy: str
    topb_recall: float | None
    weight: float | None
    recalled_kib_a_token: float
    staged_kib_a_token: float
    first_kib: float  # a conversation, recalled once at the beginning
    step_ms: float
    step_ms_rounds: tuple[float, ...]
    recall_time_share: float
    compact_turns: int
    score: float | None
    to_dense: Estimate | None
    kv_share: float | None
    recalled_kib_an_answer: float | None


def policies(scorings: Sequence[str], recalls: Sequence[str], refreshes: Sequence[int]) -> list[Policy]:
    """Every combination, the resident reference first."""
    return [RESIDENT, *(Policy(*each) for each in itertools.product(scorings, recalls, refreshes))]


class Conversations:
    """Histories that are there already, and a question for each; every run is on a fresh engine."""

    def __init__(self, loaded: LoadedModel, histories: Sequence[SessionImage], *, args: argparse.Namespace) -> None:
        self._loaded = loaded
        self._histories = histories
        self._args = args
        self._questions = questions_of(
            loaded, len(histories), args.question_tokens, seed=args.seed + 1, is_random=args.random_text
        )

    def decode(self, policy: Policy) -> Decoded:
        """Let all be answered side by side under a policy. Raises RuntimeError where they are not."""
        engine, log = self._engine(policy)
        num = len(self._histories)
        warm, wanted = self._args.warm_steps, self._args.steps
        step_s: list[float] = []
        with watch_traffic() as traffic:
            before = traffic.copy()
            while len(step_s) < warm + wanted:
                began = time.perf_counter()
                if not engine.step():
                    raise RuntimeError(f"{policy.name}: the answers ended before {warm + wanted} steps of all of them")
                seconds = time.perf_counter() - began
                if log.decoded == num:
                    step_s.append(seconds)
                    if len(step_s) == warm:
                        before = traffic.copy()
                elif step_s:
                    raise RuntimeError(f"{policy.name}: a turn had to wait in its answer")
            found = traffic.since(before)
        compact = engine.memory().num_compact_turns
        if compact != (num if policy.is_compact else 0):
            raise RuntimeError(f"{policy.name}: {compact} of {num} turns were compact")
        return Decoded(tuple(step_s[warm:]), found, before, num, compact)

    def reads(self, policy: Policy) -> tuple[float, float]:
        """Share of the truly heaviest tokens that was read, and attention weight, over the same steps as `decode` counts."""
        engine, log = self._engine(policy)
        args, num_steps = self._args, 0
        with watch_reads(args.budget, policy.decode(args.budget)) as seen:
            while num_steps < args.warm_steps + args.steps:
                if not engine.step():
                    raise RuntimeError(f"{policy.name}: the answers ended too soon")
                num_steps += log.decoded == len(self._histories)
                if num_steps == args.warm_steps and log.decoded:
                    seen.recall.clear()
                    seen.weight.clear()
        return statistics.fmean(seen.recall), statistics.fmean(seen.weight)

    def _engine(self, policy: Policy) -> tuple[Engine, _StepLog]:
        args, num = self._args, len(self._histories)
        decode = policy.decode(args.budget)
        blocks = -(-(args.context_tokens + args.question_tokens + self._answer_tokens) // BLOCK_TOKENS) + _SPARE_BLOCKS
        a_chunk = EngineConfig().prefill.chunk_tokens // BLOCK_TOKENS + num_places(decode) // BLOCK_TOKENS
        config = EngineConfig(
            device="cpu",
            dtype="float32",
            kv_blocks=num * max(blocks, a_chunk + _SPARE_BLOCKS)
            + 1,  # for resident turns as well: room decides nothing
            host_blocks=num * blocks if policy.is_compact else 0,
            compact_above_ratio=0.0 if policy.is_compact else 1.0,
            decode=decode,
            max_running_turns=num,
            lower_after_s=_PATIENCE_S,
            offload_after_s=_PATIENCE_S,
        )
        log = _StepLog()
        engine = Engine(config, loaded=self._loaded, stats=log)
        for index, (history, question) in enumerate(zip(self._histories, self._questions, strict=True)):
            own = replace(history, session_id=SessionId(f"{index}"), salt=f"{index}")
            engine.import_session(encode(own, kv_format(self._loaded)))
            request = TurnRequest(
                own.session_id,
                (*history.branches[0].token_ids, *question),
                SamplingParams(max_tokens=self._answer_tokens, temperature=0.0, ignore_eos=True),
                QualityContract(mode=Mode.SPARSE),
                cache_salt=own.salt,
            )
            engine.submit(request, _refuse_errors)
        return engine, log

    @property
    def _answer_tokens(self) -> int:
        """More than are waited for: who began first does not end before the last has been counted."""
        return int(self._args.warm_steps + self._args.steps + len(self._histories) + 2)


class _StepLog:
    """A stats sink that knows the last step's decode rows."""

    def __init__(self) -> None:
        self.decoded = 0

    def on_step(self, stats: StepStats) -> None:
        """Keep it."""
        self.decoded = stats.num_decode_tokens

    def on_turn(self, stats: TurnStats) -> None:
        """Turns are not looked at."""


def _refuse_errors(events: Sequence[TurnEvent]) -> None:
    errors = [event.error for event in events if isinstance(event, TurnEnded) and event.error]
    assert not errors, f"a turn failed: {errors}"


class _Answers:
    """Listens to the quality suite, and tells the variants' traffic apart: engines answer one after the other."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._before = 0
        self._total = self._done = 0
        self.recalled: dict[str, int] = {}  # bytes, by variant

    def told(self, num_told: int, num_dialogues: int) -> None:
        """Nothing is told anew."""

    def counted(self, num_answers: int, num_before: int) -> None:
        """Remember how many."""
        self._total, self._done = num_answers, num_before

    def answered(self, answer: Answer) -> None:
        """One more."""
        now = self._traffic.recalled_bytes
        self.recalled[answer.variant] = self.recalled.get(answer.variant, 0) + now - self._before
        self._before = now
        self._done += 1
        if self._done % 100 == 0:
            print(f"quality: {self._done} of {self._total} answers", flush=True)


def add_quality(found: Sequence[Found], args: argparse.Namespace, loaded: LoadedModel) -> Estimate:
    """Ask the suite under every policy, and note what it says; gives dense's score. Raises RuntimeError where turns were not compact."""
    by_policy = {each.policy: _variant(each.policy, args.quality_budget) for each in found}
    (dense,) = make_variants([REFERENCE], ())
    wanted = Wanted(
        RECALL_TASKS,
        num=args.quality_dialogues,
        tokens=args.quality_tokens,
        split="validation",
        seed=args.quality_seed,
    )
    settings = Settings(args.model, wanted, (dense, *by_policy.values()), args.work, args.concurrency, max_tokens=32)
    with watch_traffic() as traffic:
        listener = _Answers(traffic)
        log = run(settings, listener=listener, loaded=loaded)
    keys = [VariantKey(each.name, each.label) for each in settings.variants]
    outcomes = {each.key.name: each for each in summarize(log.answers, keys, against=None, seed=args.quality_seed)}
    for each in found:
        variant = by_policy[each.policy]
        outcome, recalled = outcomes[variant.name], listener.recalled.get(variant.name)
        if recalled is not None:  # answered in this start, not in an earlier one
            if (recalled > 0) != each.policy.is_compact:
                raise RuntimeError(f"{each.policy.name}: {recalled} bytes were recalled while the suite was answered")
            each.recalled_bytes_an_answer = recalled / outcome.whole.score.num
        each.score, each.to_dense, each.kv_share = outcome.whole.score, outcome.whole.to_reference, outcome.kv_share
    return outcomes[dense.name].whole.score


def _variant(policy: Policy, budget_tokens: int) -> Variant:
    (variant,) = make_variants([_METHOD], (Budget(tokens=budget_tokens),), overrides=policy.overrides)
    return variant


def row_of(found: Found) -> Row:
    """What one policy comes to."""
    tokens = sum(each.tokens for each in found.runs)
    seconds = sum(sum(each.step_s) for each in found.runs)
    recalled_an_answer = found.recalled_bytes_an_answer
    return Row(
        policy=found.policy.name,
        topb_recall=found.recall,
        weight=found.weight,
        recalled_kib_a_token=_kib(sum(each.traffic.recalled_bytes for each in found.runs), tokens),
        staged_kib_a_token=_kib(sum(each.traffic.staged_bytes for each in found.runs), tokens),
        first_kib=_kib(found.runs[0].first.recalled_bytes, found.runs[0].conversations),
        step_ms=1e3 * statistics.fmean(statistics.fmean(each.step_s) for each in found.runs),
        step_ms_rounds=tuple(1e3 * statistics.fmean(each.step_s) for each in found.runs),
        recall_time_share=sum(each.traffic.seconds for each in found.runs) / seconds,
        compact_turns=found.runs[0].compact_turns,
        score=None if found.score is None else found.score.value,
        to_dense=found.to_dense,
        kv_share=found.kv_share,
        recalled_kib_an_answer=None if recalled_an_answer is None else _kib(recalled_an_answer, 1),
    )


def _kib(num_bytes: float, of: int) -> float:
    return num_bytes / 1024 / of


def run_benchmark(args: argparse.Namespace, command: Sequence[str] = (), *, loaded: LoadedModel | None = None) -> str:
    """All policies; writes the result and gives its Markdown. `loaded` stands for the model where it is in memory already."""
    load = require_quiet(forced=args.force)
    torch.set_num_threads(args.threads)
    loaded = load_model(EngineConfig(model=args.model, device="cpu", dtype="float32")) if loaded is None else loaded
    texts = (
        text_ids(loaded, args.context_tokens, seed=args.seed + 10 + index, is_random=args.random_text)
        for index in range(args.conversations)
    )
    conversations = Conversations(loaded, [computed_once(loaded, ids) for ids in texts], args=args)
    found = [Found(policy) for policy in policies(args.scorings, args.recalls, args.refreshes)]
    for number in range(args.rounds):
        for each in found if number % 2 == 0 else reversed(found):
            each.runs.append(conversations.decode(each.policy))
        print(f"round {number + 1}: timed", flush=True)
    for each in found:
        if each.policy.is_compact:
            each.recall, each.weight = conversations.reads(each.policy)
            print(f"{each.policy.name}: {each.recall:.3f} of the heaviest read", flush=True)
    dense = add_quality(found, args, loaded) if args.quality_dialogues else None
    rows = [row_of(each) for each in found]
    said = shlex.join(["python", "-m", "benchmarks.memory.refresh", *command])
    return write_result(
        args.results,
        args.name,
        title="Refresh policies of compact turns",
        machine=describe_machine(load_before=load),
        numbers={
            "forced": args.force,
            "settings": settings_of(args),
            "command": said,
            "dense_score": None if dense is None else asdict(dense),
            "rows": [asdict(row) for row in rows],
        },
        tables=[table(rows)],
        notes=[*notes(args, loaded, dense), f"`{said}`"],
    )


def table(rows: Sequence[Row]) -> Table:
    """A line a policy."""
    header = (
        *("policy", "top B read", "weight read", "recalled KiB a token", "staged KiB a token", "at first, KiB"),
        *("ms a step", "of it, from host memory", "score", "to dense, points", "KV read in the suite"),
    )
    return Table(
        "Scoring, recall, and after how many outputs is chosen again",
        header,
        tuple(
            (
                row.policy,
                _share(row.topb_recall),
                _share(row.weight),
                f"{row.recalled_kib_a_token:.1f}",
                f"{row.staged_kib_a_token:.1f}",
                f"{row.first_kib:.0f}",
                f"{row.step_ms:.1f}",
                f"{row.recall_time_share:.0%}",
                "-" if row.score is None else f"{100 * row.score:.1f}",
                _points(row.to_dense),
                "-" if row.kv_share is None else f"{row.kv_share:.0%}",
            )
            for row in rows
        ),
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _points(difference: Estimate | None) -> str:
    if difference is None:
        return "-"
    return f"{100 * difference.value:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"


def notes(args: argparse.Namespace, loaded: LoadedModel, dense: Estimate | None) -> list[str]:
    """What a reader must know beside the table."""
    head_bytes = 2 * loaded.head_dim * loaded.dtype.itemsize
    a_token = loaded.num_layers * loaded.num_kv_heads * head_bytes
    suite = (
        []
        if dense is None
        else [
            f"Score: `loopserve eval`'s, in per cent, {_METHOD} at B {args.quality_budget}, {dense.num} questions over "
            f"{args.quality_dialogues} dialogues of the validation split, seed {args.quality_seed}, {args.quality_tokens} tokens "
            f"each; dense has {100 * dense.value:.1f}. Differences are paired, with their 95 % interval.",
        ]
    )
    return [
        f"Model: {loaded.name}, {loaded.num_layers} layers, {loaded.num_heads} query heads over {loaded.num_kv_heads} KV heads of "
        f"{loaded.head_dim}, {loaded.dtype}: a token's KV is {a_token / 1024:.1f} KiB.",
        f"{args.conversations} conversations of {args.context_tokens} tokens side by side, B {args.budget}, {args.steps} decode "
        f"steps after {args.warm_steps} that do not count, {args.rounds} rounds, in turns. A policy that chooses every 4 or 16 outputs "
        "also does so after "
        f"{' and '.join(map(str, DecodeSparsity().early_refreshes))}.",
        "Top B read: of the B tokens, sinks and the newest left aside, that the query's exact attention makes heaviest for the KV "
        "head, the share that it read. What each read is watched in a run of its own.",
        "Staged: keys and values of whole histories, read to score by keys or, after every 64th output, to measure coverage; values "
        "come along. A CPU brings while nothing else is computed: what late recall hides behind the step's work does not show here.",
        *suite,
        *(["FORCED on a machine that was not quiet: not to be published."] if args.force else []),
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scorings", nargs="+", choices=("sketch", "exact"), default=["sketch", "exact"])
    parser.add_argument("--recalls", nargs="+", choices=("wait", "late"), default=["wait", "late"])
    parser.add_argument("--refreshes", type=int, nargs="+", default=[1, 4, 16], help="outputs")
    parser.add_argument("--conversations", type=int, default=4)
    parser.add_argument("--context-tokens", type=int, default=8192, help="of a history")
    parser.add_argument("--budget", type=int, default=512, help="B of what is timed and watched")
    parser.add_argument("--question-tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=64, help="counted; 64, the period of what is measured")
    parser.add_argument("--warm-steps", type=int, default=2, help="decode steps that are not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--quality-dialogues", type=int, default=40, help="of three questions each; 0: the suite is not asked"
    )
    parser.add_argument("--quality-tokens", type=int, default=2048, help="of a dialogue")
    parser.add_argument("--quality-budget", type=int, default=128, help="B while the suite is answered")
    parser.add_argument("--quality-seed", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=16, help="turns in the suite's batch")
    parser.add_argument("--model", default="", help="hub id or directory; the shipped model if not given")
    parser.add_argument(
        "--random-text", action="store_true", help="histories of random tokens, for models of any vocabulary"
    )
    parser.add_argument("--work", type=Path, default=Path("build/memory/refresh"), help="keeps the suite's answers")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="run on a busy machine; the result says so")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="memory_refresh")
    args = parser.parse_args(arguments)
    if args.warm_steps < 1 or args.steps < 1 or args.rounds < 1:
        parser.error("--warm-steps, --steps and --rounds must be positive")
    return args


if __name__ == "__main__":
    print(run_benchmark(parse_arguments(), sys.argv[1:]))
