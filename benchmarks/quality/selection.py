"""What sparsity does to answers: the shipped model on held-out dialogues, dense against both sparse phases at several budgets.

Every variant meets the same dialogues. The history of a dialogue is told in a few long turns, each over the cached prefix of those
before, with the right answers in it; then every question still open is a turn of its own, and the conversation goes on with the
answers that the variant gave. Measures whether the value asked for is in the answer, and what the engine reports of its sparsity.
Measures no time. Knows nothing about how a selection is made.

    python -m benchmarks.quality.selection
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks import dialogues as made
from benchmarks.drive import drive
from benchmarks.machine import describe_machine, require_quiet
from benchmarks.quality.outcomes import BOOTSTRAP_DRAWS, Answered, Outcome, outcome_table, summarize
from benchmarks.quality.scenarios import Prompter, Scenario, holds_value, make_scenario
from benchmarks.report import RESULTS, settings_of, write_result
from loopserve.config import BLOCK_TOKENS, DecodeSparsity, EngineConfig, PrefillSparsity
from loopserve.dialogue import Mode, QualityContract, SamplingParams, SessionId, TurnEnded, TurnRequest
from loopserve.engine import Engine
from loopserve.loading import load_model


@dataclass(frozen=True, slots=True)
class Variant:
    """A row of the table."""

    name: str
    mode: Mode
    decode_method: str = "progressive"
    kept_share: float | None = None  # sinks, chosen and window over N; None: everything
    alpha: float = 1.0


@dataclass(slots=True)
class _User:
    """Tells the history and asks the questions of one scenario."""

    scenario: Scenario
    variant: Variant
    prompter: Prompter
    max_answer_tokens: int
    answered: list[Answered] = field(default_factory=list)
    _known: tuple[int, ...] = ()

    def next_request(self) -> TurnRequest | None:
        index, num_history = len(self.answered), len(self.scenario.history)
        if index < num_history:
            self._known += self.scenario.history[index]
            return self._request(max_tokens=1)  # its answer is known; only the prompt is to be computed
        if index == num_history:
            self._known += self.scenario.tail
        if index == num_history + len(self.scenario.questions):
            return None
        question = self.scenario.questions[index - num_history]
        self._known += self.prompter.message("user", question.text) + self.prompter.ids("<|assistant|>")
        return self._request(max_tokens=self.max_answer_tokens)

    def turn_ended(self, ended: TurnEnded) -> None:
        index = len(self.answered) - len(self.scenario.history)
        if index < 0:
            self.answered.append(Answered(None, "", "", ended.usage))
            return
        question = self.scenario.questions[index]
        text = str(self.prompter.loaded.tokenizer.decode(list(ended.token_ids), skip_special_tokens=True))
        self.answered.append(Answered(holds_value(text, question.value), question.third, text, ended.usage))
        end = self.prompter.ids("<|end|>")
        self._known += ended.token_ids
        if self._known[-len(end) :] != end:
            self._known += end  # the answer was cut off; the template still closes the message

    def _request(self, *, max_tokens: int) -> TurnRequest:
        return TurnRequest(
            SessionId(self.scenario.name),
            self._known,
            SamplingParams(max_tokens=max_tokens, temperature=0.0),
            QualityContract(mode=self.variant.mode),
        )


def run_variant(
    variant: Variant, scenarios: Sequence[Scenario], prompter: Prompter, args: argparse.Namespace
) -> list[list[Answered]]:
    """All dialogues under one variant, on an engine of its own; [dialogue][turn]."""
    engine = Engine(engine_config(variant, scenarios, args), loaded=prompter.loaded)
    users = [_User(scenario, variant, prompter, args.max_answer_tokens) for scenario in scenarios]
    drive(engine, users)
    engine.check()
    return [user.answered for user in users]


def engine_config(variant: Variant, scenarios: Sequence[Scenario], args: argparse.Namespace) -> EngineConfig:
    """The engine of a variant; the budget is what is left of its share of N beside sinks and window."""
    prefill = PrefillSparsity(
        chunk_tokens=args.chunk_tokens,
        sampled_rows=args.sampled_rows,
        heldout_rows=args.heldout_rows,
        alpha=variant.alpha,
        tile_tokens=args.tile_tokens,
        sink_tokens=args.sink_tokens,
        local_tokens=args.local_tokens,
        dense_last_rows=args.dense_last_rows,
        dense_head_share=1.0
        if variant.alpha >= 1.0
        else PrefillSparsity().dense_head_share,  # no way round the sparse path
    )
    budget = budget_tokens(variant, args)
    decode = DecodeSparsity(
        method=variant.decode_method,
        budget_tokens=budget,
        budget_floor_tokens=min(budget, DecodeSparsity().budget_floor_tokens),
        refresh_outputs=args.refresh_outputs,
        early_refreshes=tuple(args.early_refreshes),
        sink_tokens=args.sink_tokens,
        window_tokens=args.window_tokens,
        pooling_tokens=args.pooling_tokens,
    )
    return EngineConfig(
        device="cpu",
        dtype="float32",
        kv_blocks=1 + 2 * len(scenarios) * (2 * args.tokens // BLOCK_TOKENS),
        max_waiting_turns=max(256, len(scenarios)),
        max_step_prefill_tokens=max(1024, args.chunk_tokens),
        prefill=prefill,
        decode=decode,
        seed=args.seed,
    )


def budget_tokens(variant: Variant, args: argparse.Namespace) -> int:
    """Tokens to choose per KV head. Raises ValueError when sinks and window alone exceed the share."""
    if variant.kept_share is None:
        return max(DecodeSparsity().budget_tokens, 4 * int(args.tokens))
    budget = round(variant.kept_share * int(args.tokens)) - int(args.sink_tokens) - int(args.window_tokens)
    if budget < 1:
        raise ValueError(
            f"{variant.kept_share:.0%} of {args.tokens} tokens leave none to choose beside sinks and window"
        )
    return budget


def variants(args: argparse.Namespace) -> list[Variant]:
    """The rows: dense, the sparse path over everything, sparse prefill alone, then every method at every share."""
    rows = [
        Variant("dense", Mode.EXACT),
        Variant("sparse path, everything kept", Mode.SPARSE),
        Variant("sparse prefill, all tokens in decode", Mode.SPARSE, alpha=args.alpha),
    ]
    for method in args.methods:
        for share in args.shares:
            name = f"{method}, {share:.0%} of N"
            rows.append(Variant(name, Mode.SPARSE, decode_method=method, kept_share=share, alpha=args.alpha))
    return rows


def run_benchmark(args: argparse.Namespace) -> str:
    """All variants over the same dialogues; writes the result and gives its Markdown."""
    torch.set_num_threads(args.threads)
    machine = describe_machine(load_before=require_quiet(forced=True))  # counts, not times: a busy machine does no harm
    loaded = load_model(EngineConfig(model=args.model, device="cpu", dtype="float32"))
    prompter = Prompter(loaded)
    dialogues = list(made.make_dialogues(args.seed, made.heldout_spec(args.tokens), args.dialogues, prompter.count))
    cut = [make_scenario(dialogue, prompter, history_turns=args.history_turns) for dialogue in dialogues]
    scenarios = [scenario for scenario in cut if scenario is not None]
    outcomes: list[Outcome] = []
    dense: list[list[Answered]] = []
    examples: dict[str, list[str]] = {}
    for variant in variants(args):
        answered = run_variant(variant, scenarios, prompter, args)
        dense = dense or answered
        outcomes.append(summarize(variant.name, answered, dense, seed=args.seed))
        examples[variant.name] = [turn.answer for turn in answered[0] if turn.is_right is not None]
        print(f"{variant.name}: {outcomes[-1].accuracy:.3f}", flush=True)
    return write_result(
        args.results,
        args.name,
        title=f"{loaded.name} under sparsity, held-out dialogues of about {args.tokens} tokens",
        machine=machine,
        numbers={
            "settings": settings_of(args),
            "dialogues": len(scenarios),
            "dialogues_without_closing_question": args.dialogues - len(scenarios),
            "outcomes": [asdict(outcome) for outcome in outcomes],
            "answers_of_the_first_dialogue": examples,
        },
        tables=[outcome_table(outcomes)],
        notes=_notes(args, len(scenarios), outcomes[0].questions),
    )


def _notes(args: argparse.Namespace, num_dialogues: int, num_questions: int) -> list[str]:
    early = ", ".join(map(str, args.early_refreshes))
    return [
        f"{num_dialogues} of the {args.dialogues} dialogues made for this run (seed {args.seed}) end with questions, "
        f"{num_questions} in all. The number was fixed before the run. Values, sentences and words are held out from training.",
        f"History: {args.history_turns} turns with the right answers in them, each over the cached prefix of those before; "
        "then a turn for each question, continued with the variant's own answers. Greedy.",
        f"Kept share: sinks ({args.sink_tokens}), chosen, window ({args.window_tokens}) and everything since the choice, "
        "over what dense reads, mean over decode steps. The shares of N are set at the choice, with "
        f"N = {args.tokens}. Scoring reads all keys at each choice; that is not counted.",
        f"Prefill: lines with alpha {args.alpha}, tiles of {args.tile_tokens}, {args.local_tokens} local tokens, "
        f"{args.dense_last_rows} dense last rows, {args.sampled_rows} sampled and {args.heldout_rows} held-out rows of a chunk "
        f"of {args.chunk_tokens}. This is finer than the engine's defaults, which are made for thousands of tokens and would "
        "keep nearly everything here. Cells: causal cells computed over all.",
        f"Decode: a choice at the first step, after {early} outputs and every {args.refresh_outputs}; first_block keeps its "
        "first choice for the turn.",
        "Coverage: mean over turns of what the engine reports (prefill: rows that chose nothing; decode: queries that used "
        "the choice), and the worst head of any layer, dialogue and measurement.",
        "Interval: 95% bootstrap of the paired difference, whole dialogues drawn with replacement, "
        f"{BOOTSTRAP_DRAWS} draws, seeded.",
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    prefill, decode = PrefillSparsity(), DecodeSparsity()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="", help="directory of a model with the shipped template; empty: the shipped one"
    )
    parser.add_argument("--dialogues", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=512, help="N")
    parser.add_argument("--history-turns", type=int, default=3)
    parser.add_argument("--max-answer-tokens", type=int, default=24)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.1], help="of N, kept in decode")
    parser.add_argument("--methods", nargs="+", default=["first_block", "progressive"])
    parser.add_argument("--alpha", type=float, default=prefill.alpha)
    parser.add_argument("--chunk-tokens", type=int, default=prefill.chunk_tokens)
    parser.add_argument("--sampled-rows", type=int, default=32)
    parser.add_argument("--heldout-rows", type=int, default=16)
    parser.add_argument("--tile-tokens", type=int, default=16)
    parser.add_argument("--local-tokens", type=int, default=16)
    parser.add_argument("--dense-last-rows", type=int, default=4)
    parser.add_argument("--sink-tokens", type=int, default=prefill.sink_tokens)
    parser.add_argument("--window-tokens", type=int, default=16)
    parser.add_argument("--pooling-tokens", type=int, default=decode.pooling_tokens)
    parser.add_argument("--refresh-outputs", type=int, default=decode.refresh_outputs)
    parser.add_argument("--early-refreshes", type=int, nargs="*", default=list(decode.early_refreshes))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="selection")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(run_benchmark(parse_arguments()))
