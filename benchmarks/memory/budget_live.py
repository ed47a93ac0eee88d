"""What a budget does to a running engine: continuous load, and `set_budget` from the full budget down and up again in the middle of it.

Readers hold made dialogues with known answers, all compact: each asks its dialogue's questions one after the other, over the past that
was told, and takes the next dialogue; nobody pauses. Occupancy is sampled after every step. After a phase's steps the budget's ceiling is
lowered, after another's lifted again. Every turn must end with the answer's full length, whatever the budget did meanwhile; what it
answered is scored, by the budget in force while it was answered. Answers go on after their end-of-sequence token, so that there is
decode to steer; only what stands before it is scored.

    python -m benchmarks.memory.budget_live
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from benchmarks.drive import drive
from benchmarks.machine import describe_machine, require_quiet, usable_cores
from benchmarks.memory.budget_plot import draw
from benchmarks.memory.samples import Phase, Sample
from benchmarks.report import RESULTS, Table, settings_of, write_result
from loopserve.config import BLOCK_TOKENS, DecodeSparsity, EngineConfig, PrefillSparsity
from loopserve.dialogue import FinishReason, Mode, QualityContract, SamplingParams, SessionId, TurnEnded, TurnRequest
from loopserve.engine import Engine
from loopserve.evaluation.dialogues import RECALL_TASKS
from loopserve.evaluation.prompts import Prompter, Question, Script
from loopserve.evaluation.scoring import score
from loopserve.evaluation.tasks import Wanted, load_made
from loopserve.loading import LoadedModel, load_model
from loopserve.reads import num_places
from loopserve.stats import StepStats, TurnStats

_PATIENCE_S = 1e9
_NEWEST_BLOCKS = 6  # of a compact turn, at the most: a part block, two that are about to leave, and some to spare
_SETTLED_SHARE = 0.5  # of a phase: its second half is what the budget comes to


@dataclass(frozen=True, slots=True)
class TurnResult:
    """One ended turn."""

    session_id: str
    reason: FinishReason
    is_whole: bool  # as many tokens as were asked for
    score: float
    ceiling_first: int  # in force when it was submitted
    ceiling_last: int  # and when it ended
    budget_tokens: int | None  # of its last choice
    coverage: float | None
    cached_tokens: int
    num_preemptions: int

    @property
    def budget(self) -> str:
        """What it was answered under."""
        return str(self.ceiling_last) if self.ceiling_first == self.ceiling_last else "changed"


class Live:
    """The engine's stats sink: counts steps, sets budgets, samples, and puts each turn's account together. Caller's thread only."""

    def __init__(self, phases: Sequence[Phase], *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._phases = tuple(phases)
        self._clock = clock
        self._began_s = clock()
        self._engine: Engine | None = None
        self._answers: dict[str, TurnResult] = {}  # of turns whose stats are not here yet
        self.samples: list[Sample] = []
        self.turns: list[TurnResult] = []

    def attach(self, engine: Engine) -> None:
        """Begin with the first budget."""
        self._engine = engine
        self._began_s = self._clock()
        engine.set_budget(self.ceiling)

    @property
    def is_over(self) -> bool:
        """Whether no turn is to begin any more."""
        return len(self.samples) >= sum(phase.steps for phase in self._phases)

    @property
    def phase(self) -> int:
        """The phase of the next step; the last one, when all are over."""
        ends = itertools.accumulate(phase.steps for phase in self._phases)
        return next((i for i, end in enumerate(ends) if len(self.samples) < end), len(self._phases) - 1)

    @property
    def ceiling(self) -> int:
        """The budget of that phase, in tokens."""
        return self._phases[self.phase].budget_tokens

    def on_step(self, stats: StepStats) -> None:
        """Sample, and go on to the next phase where it begins."""
        assert self._engine is not None, "the engine is attached before it steps"
        before, memory = self.phase, self._engine.memory()
        self.samples.append(
            Sample(
                step=len(self.samples),
                seconds=self._clock() - self._began_s,
                phase=before,
                ceiling_tokens=self.ceiling,
                active_blocks=memory.blocks.active + memory.blocks.shared_active,
                used_blocks=memory.blocks.total - memory.blocks.free - memory.blocks.cached,
                total_blocks=memory.blocks.total,
                host_blocks=memory.host_blocks.total - memory.host_blocks.free - memory.host_blocks.cached,
                running=stats.num_running,
                waiting=stats.num_waiting,
                compact=memory.num_compact_turns,
                decoded=stats.num_decode_tokens,
                prefilled=stats.num_prefill_tokens,
                computed_tokens=memory.computed_tokens,
                preempted=stats.num_preempted,
                duration_s=stats.duration_s,
            )
        )
        if self.phase != before:
            self._engine.set_budget(self.ceiling)

    def note_answer(self, result: TurnResult) -> None:
        """What a turn answered; its stats follow within the same step."""
        self._answers[result.session_id] = result

    def on_turn(self, stats: TurnStats) -> None:
        """Put both together."""
        answer = self._answers.pop(stats.session_id)
        own = {"budget_tokens": stats.budget_tokens, "num_preemptions": stats.num_preemptions}
        self.turns.append(TurnResult(**{f.name: own.get(f.name, getattr(answer, f.name)) for f in fields(answer)}))


class Reader:
    """Asks one dialogue's questions after another's, see `benchmarks.drive.Script`."""

    def __init__(
        self, live: Live, engine: Engine, scripts: Iterator[tuple[str, Script]], *, answer_tokens: int
    ) -> None:
        """`scripts` is shared by all readers, and endless; each comes with a name for its session."""
        self._live = live
        self._engine = engine
        self._scripts = scripts
        self._answer_tokens = answer_tokens
        self._eos_ids = set(engine._loaded.eos_ids)
        self._name = ""
        self._questions: list[Question] = []
        self._asked: Question | None = None
        self._ceiling = 0

    def next_request(self) -> TurnRequest | None:
        """The dialogue's next question, or the first of the next dialogue; None when the load is over."""
        if self._live.is_over:
            return None
        if not self._questions:
            if self._name:
                self._engine.release(SessionId(self._name))
            self._name, script = next(self._scripts)
            self._questions = [question for stop in script.stops for question in stop.questions]
        self._asked, self._ceiling = self._questions.pop(0), self._live.ceiling
        sampling = SamplingParams(max_tokens=self._answer_tokens, temperature=0.0, ignore_eos=True)
        contract = QualityContract(mode=Mode.SPARSE, prefill_method="dense")
        # A salt of its own: a dialogue that comes again is computed again.
        return TurnRequest(SessionId(self._name), self._asked.prompt_ids, sampling, contract, cache_salt=self._name)

    def turn_ended(self, ended: TurnEnded) -> None:
        """Score what stands before the end-of-sequence token."""
        assert self._asked is not None, "who is answered has asked"
        said = list(itertools.takewhile(lambda token_id: token_id not in self._eos_ids, ended.token_ids))
        text = str(self._engine.tokenizer.decode(said, skip_special_tokens=True))
        turn, usage = self._asked.turn, ended.usage
        self._live.note_answer(
            TurnResult(
                session_id=self._name,
                reason=ended.reason,
                is_whole=ended.reason is FinishReason.LENGTH and len(ended.token_ids) == self._answer_tokens,
                score=score(text, turn.accepted, turn.metric),
                ceiling_first=self._ceiling,
                ceiling_last=self._live.ceiling,
                budget_tokens=None,
                coverage=usage.quality.coverage_mean,
                cached_tokens=usage.cached_tokens,
                num_preemptions=0,
            )
        )


def make_scripts(loaded: LoadedModel, args: argparse.Namespace) -> list[Script]:
    """The dialogues, each of which ends in questions over one past."""

    def count(text: str) -> int:
        return len(loaded.tokenizer.encode(text, add_special_tokens=False)) + 2

    wanted = Wanted(RECALL_TASKS, num=args.dialogues, tokens=args.context_tokens, seed=args.seed, split="validation")
    prompter = Prompter(loaded.tokenizer)
    scripts = []
    for dialogue in load_made(wanted, count):
        script = prompter.script(dialogue)
        probes = tuple(stop for stop in script.stops if any(q.turn.probe for q in stop.questions))
        scripts.append(Script(dialogue, probes))
    return scripts


def named(scripts: Sequence[Script]) -> Iterator[tuple[str, Script]]:
    """All dialogues again and again, each time in a session of its own."""
    for number, script in enumerate(itertools.cycle(scripts)):
        yield f"session {number}", script


def settings_of_engine(scripts: Sequence[Script], args: argparse.Namespace) -> EngineConfig:
    """An engine on whose device all readers' turns fit at the largest budget, compact, and no more; host memory holds everything."""
    decode = DecodeSparsity(
        budget_tokens=max(args.budgets),
        budget_floor_tokens=min(DecodeSparsity().budget_floor_tokens, *args.budgets),
        measure_outputs=args.measure_outputs,
    )
    longest = max(script.prompt_tokens_max for script in scripts) + args.answer_tokens
    chunk = PrefillSparsity(chunk_tokens=args.chunk_tokens)
    a_turn = max(-(-num_places(decode) // BLOCK_TOKENS) + _NEWEST_BLOCKS, args.chunk_tokens // BLOCK_TOKENS + 1) + 1
    # A conversation is no longer than the device's pool, even if it never lies there.
    device_blocks = max(args.readers * a_turn, -(-longest // BLOCK_TOKENS) + 1)
    return EngineConfig(
        device="cpu",
        dtype="float32",
        kv_blocks=device_blocks + 1,
        host_blocks=2 * args.readers * (-(-longest // BLOCK_TOKENS) + _NEWEST_BLOCKS),
        compact_above_ratio=0.0,
        max_running_turns=args.readers,
        lower_after_s=_PATIENCE_S,  # nobody but `set_budget` changes budgets
        max_queue_s=_PATIENCE_S,
        decode=decode,
        prefill=chunk,
        max_step_prefill_tokens=max(args.chunk_tokens, EngineConfig().max_step_prefill_tokens),
    )


def run_load(loaded: LoadedModel, args: argparse.Namespace) -> tuple[Live, Engine]:
    """All phases, and then what was begun in them to its end. Raises RuntimeError where a turn fails."""
    scripts = make_scripts(loaded, args)
    live = Live([Phase(budget, args.phase_steps) for budget in args.budgets])
    engine = Engine(settings_of_engine(scripts, args), loaded=loaded, stats=live)
    live.attach(engine)
    dialogues = named(scripts)
    drive(engine, [Reader(live, engine, dialogues, answer_tokens=args.answer_tokens) for _ in range(args.readers)])
    engine.check()
    return live, engine


@dataclass(frozen=True, slots=True)
class PhaseRow:
    """One phase, its second half."""

    phase: int
    budget_tokens: int
    steps: int
    active_blocks: float  # of the device, mean
    active_blocks_a_turn: float
    used_ratio: float  # of the pool, by active and idle conversations
    running: float
    decode_only_ms: float | None  # median of steps without prefill
    tokens_per_s: float  # decoded, over all of its steps' time
    followed_after_steps: (
        int | None
    )  # of its own, until blocks a turn were nearer to its level than to the one before; None: never


def phase_rows(samples: Sequence[Sample], phases: Sequence[Phase]) -> list[PhaseRow]:
    """What each budget comes to."""
    rows: list[PhaseRow] = []
    for number, phase in enumerate(phases):
        own = [sample for sample in samples if sample.phase == number][: phase.steps]
        if not own:
            continue
        settled = own[int(len(own) * (1 - _SETTLED_SHARE)) :]
        a_turn = statistics.fmean(map(_blocks_a_turn, settled))
        followed = None
        if rows:
            before = rows[-1].active_blocks_a_turn
            nearer = (abs(_blocks_a_turn(s) - a_turn) < abs(_blocks_a_turn(s) - before) for s in own)
            followed = next((step for step, is_nearer in enumerate(nearer, start=1) if is_nearer), None)
        plain = [sample.duration_s for sample in settled if not sample.prefilled]
        rows.append(
            PhaseRow(
                phase=number,
                budget_tokens=phase.budget_tokens,
                steps=len(own),
                active_blocks=statistics.fmean(sample.active_blocks for sample in settled),
                active_blocks_a_turn=a_turn,
                used_ratio=statistics.fmean(sample.used_blocks / sample.total_blocks for sample in settled),
                running=statistics.fmean(sample.running for sample in settled),
                decode_only_ms=1e3 * statistics.median(plain) if plain else None,
                tokens_per_s=sum(s.decoded for s in settled) / sum(s.duration_s for s in settled),
                followed_after_steps=followed,
            )
        )
    return rows


def _blocks_a_turn(sample: Sample) -> float:
    return sample.active_blocks / max(1, sample.running)


@dataclass(frozen=True, slots=True)
class QualityRow:
    """The turns that were answered under one budget; "changed": under more than one."""

    budget: str
    turns: int
    score: float  # 0 to 1
    coverage: float | None


def quality_rows(turns: Sequence[TurnResult]) -> list[QualityRow]:
    """What turns answered, by the budget in force."""
    groups: dict[str, list[TurnResult]] = {}
    for turn in turns:
        groups.setdefault(turn.budget, []).append(turn)
    rows = []
    for budget in sorted(groups, key=lambda name: (not name.isdigit(), -int(name) if name.isdigit() else 0)):
        own = groups[budget]
        coverages = [turn.coverage for turn in own if turn.coverage is not None]
        mean = statistics.fmean(coverages) if coverages else None
        rows.append(QualityRow(budget, len(own), statistics.fmean(turn.score for turn in own), mean))
    return rows


def broken(turns: Sequence[TurnResult]) -> list[TurnResult]:
    """Turns that did not end as they should."""
    return [turn for turn in turns if not turn.is_whole]


def run_benchmark(args: argparse.Namespace, command: Sequence[str] = (), *, loaded: LoadedModel | None = None) -> str:
    """The whole run; writes result and picture, and gives the Markdown. `loaded` stands for the model where it is in memory already."""
    load = require_quiet(forced=args.force)
    torch.set_num_threads(args.threads)
    loaded = load_model(EngineConfig(model=args.model, device="cpu", dtype="float32")) if loaded is None else loaded
    live, engine = run_load(loaded, args)
    phases = [Phase(budget, args.phase_steps) for budget in args.budgets]
    rows, answered, pressure = phase_rows(live.samples, phases), quality_rows(live.turns), engine.memory().pressure
    picture = f"{args.name}.svg"
    args.results.mkdir(parents=True, exist_ok=True)
    draw(args.results / picture, title=f"Budget {' to '.join(map(str, args.budgets))} under load", samples=live.samples)
    said = shlex.join(["python", "-m", "benchmarks.memory.budget_live", *command])
    return write_result(
        args.results,
        args.name,
        title="A budget that changes under load",
        machine=describe_machine(load_before=load),
        numbers={
            "forced": args.force,
            "settings": settings_of(args),
            "command": said,
            "phases": [asdict(row) for row in rows],
            "quality": [asdict(row) for row in answered],
            "broken_turns": [asdict(turn) for turn in broken(live.turns)],
            "pressure": asdict(pressure),
            "device_bytes": engine.memory().device_bytes,
            "turns": [asdict(turn) for turn in live.turns],
            "samples": {f.name: [getattr(s, f.name) for s in live.samples] for f in fields(Sample)},  # a list a series
        },
        tables=[phase_table(rows), quality_table(answered)],
        notes=[*notes(args, loaded, live, engine), f"![occupancy over time]({picture})", f"`{said}`"],
    )


def phase_table(rows: Sequence[PhaseRow]) -> Table:
    """A line a phase."""
    header = (
        *(
            "phase",
            "budget",
            "steps",
            "active device blocks",
            "a turn",
            "pool used",
            "turns running",
            "ms a decode step",
        ),
        *("tokens/s", "followed in step"),
    )
    return Table(
        "What the device holds, in each phase's second half",
        header,
        tuple(
            (
                str(row.phase + 1),
                str(row.budget_tokens),
                str(row.steps),
                f"{row.active_blocks:.0f}",
                f"{row.active_blocks_a_turn:.1f}",
                f"{row.used_ratio:.0%}",
                f"{row.running:.1f}",
                "-" if row.decode_only_ms is None else f"{row.decode_only_ms:.1f}",
                f"{row.tokens_per_s:.1f}",
                "-" if row.followed_after_steps is None else str(row.followed_after_steps),
            )
            for row in rows
        ),
    )


def quality_table(rows: Sequence[QualityRow]) -> Table:
    """A line a budget."""
    return Table(
        "What was answered, by the budget in force",
        ("budget", "turns", "right, per cent", "coverage"),
        tuple(
            (
                row.budget,
                str(row.turns),
                f"{100 * row.score:.1f}",
                "-" if row.coverage is None else f"{row.coverage:.3f}",
            )
            for row in rows
        ),
    )


def notes(args: argparse.Namespace, loaded: LoadedModel, live: Live, engine: Engine) -> list[str]:
    """What a reader must know beside the tables."""
    bad, preempted = broken(live.turns), sum(turn.num_preemptions for turn in live.turns)
    pressure = engine.memory().pressure
    return [
        f"Broken turns: {len(bad)} of {len(live.turns)}. Preempted: {preempted}. Budgets lowered by the engine itself: "
        f"{pressure.lowered_budgets}.",
        f"Model: {loaded.name}, {loaded.num_layers} layers. {args.readers} readers without a pause, dialogues of "
        f"{args.context_tokens} tokens of the validation split with known answers, three questions each, {args.answer_tokens} tokens "
        "answered, end-of-sequence ignored; dense prefill, compact turns throughout.",
        f"The device has {live.samples[0].total_blocks} blocks of {BLOCK_TOKENS} tokens: enough for all readers at the largest budget, "
        "or for one whole conversation. Active: held by turns in the batch, chunks of their prefill included.",
        f"Coverage is measured after every {args.measure_outputs} outputs, by all keys: a step that measures takes longer.",
        "A turn whose budget changed while it waited or was answered counts as changed. Few turns a budget: their scores are no "
        "quality result, see `quality/run.py`.",
        *(["FORCED on a machine that was not quiet: not to be published."] if args.force else []),
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=[2048, 512, 2048], help="tokens, a phase each")
    parser.add_argument("--phase-steps", type=int, default=400)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--dialogues", type=int, default=24, help="different ones")
    parser.add_argument("--context-tokens", type=int, default=8192, help="of a dialogue")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--measure-outputs", type=int, default=16, help="coverage is measured after so many")
    parser.add_argument(
        "--chunk-tokens", type=int, default=PrefillSparsity().chunk_tokens, help="rows of a prefill chunk"
    )
    parser.add_argument("--model", default="", help="hub id or directory; the shipped model if not given")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--force", action="store_true", help="run on a busy machine; the result says so")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="memory_budget_live")
    args = parser.parse_args(arguments)
    if min(args.budgets) < 1 or args.phase_steps < 2 or args.readers < 1 or args.dialogues < 1:
        parser.error("--budgets, --readers and --dialogues must be positive, --phase-steps at least 2")
    return args


if __name__ == "__main__":
    print(run_benchmark(parse_arguments(), sys.argv[1:]))
