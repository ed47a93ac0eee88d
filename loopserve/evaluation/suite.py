"""A run of the quality suite: settings to answers on disk. Everything that can be wrong is found before the first answer.

Owns the order of things; what is asked is `tasks.py`, what is compared `variants.py`, how it is asked `driver.py`. Knows no terminal.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loopserve.config import BLOCK_TOKENS, EngineConfig
from loopserve.dialogue import FinishReason
from loopserve.engine import Engine
from loopserve.errors import ContextLengthExceeded
from loopserve.evaluation.answers import Answer, AnswerLog, Key, cut_broken_line
from loopserve.evaluation.driver import Answered, Asking, Driver, num_blocks
from loopserve.evaluation.engines import (
    build_config,
    by_engine,
    check_methods,
    contract_of,
    fit_pool,
    settings_of,
    weights_digest,
)
from loopserve.evaluation.items import Dialogue
from loopserve.evaluation.loaders import line_of, read_dialogues
from loopserve.evaluation.machine import describe_machine
from loopserve.evaluation.own_past import with_own_answers
from loopserve.evaluation.prompts import Prompter
from loopserve.evaluation.scoring import score
from loopserve.evaluation.tasks import OWN, Wanted, as_asked, check_dialogues, dialogues_digest, load_given, load_made
from loopserve.evaluation.variants import Override, Variant
from loopserve.loading import LoadedModel, load_model

TOLD = "told.jsonl"  # of a run's directory: the dialogues with the model's own answers in them
_POOL_DIALOGUES = 4  # of the largest that the pool holds where memory allows: one is told while others are asked


@dataclass(frozen=True, slots=True)
class Settings:
    """All of a run."""

    model: str
    wanted: Wanted
    variants: tuple[Variant, ...]
    out: Path
    concurrency: int = 16  # turns in the batch
    max_tokens: int = 64  # longest answer


class Listener(Protocol):
    """Is told how a run goes on."""

    def told(self, num_told: int, num_dialogues: int) -> None:
        """So many dialogues have the model's own answers in their past by now."""

    def counted(self, num_answers: int, num_before: int) -> None:
        """So many answers there will be, and so many there were before this start."""

    def answered(self, answer: Answer) -> None:
        """One more, on disk already."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Of the largest dialogue."""

    prompt_tokens: int
    blocks: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """A run that can be begun: everything that could be wrong with it was looked at."""

    settings: Settings
    loaded: LoadedModel
    dialogues: Sequence[Dialogue]
    prompter: Prompter
    configs: Mapping[tuple[Override, ...], EngineConfig]

    def open_log(self) -> AnswerLog:
        return AnswerLog.open(
            self.settings.out,
            _manifest(self.settings, self.loaded, self.dialogues, self.configs),
            start=describe_machine(self.loaded.device),
        )


def run(settings: Settings, *, listener: Listener, loaded: LoadedModel | None = None) -> AnswerLog:
    """Answer everything that is not answered yet. `loaded` stands for the settings' model where it is in memory already.

    Raises errors of `loopserve.errors` for what cannot be run, before anything long begins.
    """
    plan = _plan(settings, loaded)
    dialogues, configs = plan.dialogues, plan.configs
    log = plan.open_log()
    with log:
        if settings.wanted.past == OWN:
            dialogues = _told(plan, listener)
            configs = _fitted(configs, plan.loaded, _measure(dialogues, plan.prompter, settings), settings)
        done = {answer.key for answer in log.answers}
        listener.counted(_num_answers(dialogues, settings.variants), len(done))
        for overrides, variants in by_engine(settings.variants).items():
            askings = _askings(dialogues, variants, plan.prompter, done)
            for answered in _answer(askings, configs[overrides], plan.loaded, settings):
                answer = _judged(answered, plan.loaded)
                log.add(answer)
                listener.answered(answer)
    return log


def tell(settings: Settings, *, listener: Listener, loaded: LoadedModel | None = None) -> None:
    """Write the past in the model's own answers (`TOLD`) and ask nothing: for several runs over the same past. Raises as `run` does."""
    plan = _plan(settings, loaded)
    with plan.open_log():
        _told(plan, listener)


def _plan(settings: Settings, loaded: LoadedModel | None) -> _Plan:
    configs = {
        o: build_config(settings.model, o, concurrency=settings.concurrency) for o in by_engine(settings.variants)
    }
    check_methods(settings.variants)
    dialogues = load_given(settings.wanted)
    loaded = loaded or load_model(next(iter(configs.values())))
    dialogues = [as_asked(d, settings.wanted) for d in (*load_made(settings.wanted, _counter(loaded)), *dialogues)]
    check_dialogues(dialogues)
    prompter = Prompter(loaded.tokenizer)
    configs = _fitted(configs, loaded, _measure(dialogues, prompter, settings), settings)
    return _Plan(settings, loaded, dialogues, prompter, configs)


def _answer(
    askings: Iterator[Asking], config: EngineConfig, loaded: LoadedModel, settings: Settings
) -> Iterator[Answered]:
    first = next(askings, None)
    if first is None:
        return
    driver = Driver(
        Engine(config, loaded=loaded),
        concurrency=settings.concurrency,
        max_tokens=settings.max_tokens,
        seed=settings.wanted.seed,
        contract_of=lambda variant, question: contract_of(variant, question, config, loaded.shape),
    )
    yield from driver.run(_with_first(first, askings))


def _with_first(first: Asking, rest: Iterator[Asking]) -> Iterator[Asking]:
    yield first
    yield from rest


def _told(plan: _Plan, listener: Listener) -> Sequence[Dialogue]:
    """The dialogues with the model's own answers in them; each is on disk as soon as it is told, and is not told again."""
    settings, loaded, dialogues = plan.settings, plan.loaded, plan.dialogues
    path = settings.out / TOLD
    told = {dialogue.id: dialogue for dialogue in _read_told(path)}
    left = [dialogue for dialogue in dialogues if dialogue.id not in told]
    if left:
        most = max(_tokens_told(dialogue, loaded, settings.max_tokens) for dialogue in left)
        blocks = -(-most // BLOCK_TOKENS) + 1
        config = build_config(settings.model, (), concurrency=settings.concurrency)
        engine = Engine(fit_pool(config, loaded, blocks=settings.concurrency * blocks), loaded=loaded)
        fitting = max(1, min(settings.concurrency, engine.memory().blocks.total // blocks))
        with path.open("a", encoding="utf-8") as file:
            for dialogue in with_own_answers(left, engine, concurrency=fitting, max_tokens=settings.max_tokens):
                file.write(line_of(dialogue))
                file.flush()
                told[dialogue.id] = dialogue
                listener.told(len(told), len(dialogues))
    return [told[dialogue.id] for dialogue in dialogues]


def _read_told(path: Path) -> Sequence[Dialogue]:
    """What was told before."""
    cut_broken_line(path)
    return read_dialogues(path) if path.exists() and path.stat().st_size else ()


def _tokens_told(dialogue: Dialogue, loaded: LoadedModel, max_tokens: int) -> int:
    """The most that a dialogue may come to be, about."""
    count = _counter(loaded)
    return sum(count(turn.user) + max_tokens + 2 for turn in dialogue.turns) + count(dialogue.system)


def _askings(
    dialogues: Sequence[Dialogue], variants: Sequence[Variant], prompter: Prompter, done: set[Key]
) -> Iterator[Asking]:
    """What is left to ask, dialogue by dialogue; rendered when its turn comes."""
    prefills = dict.fromkeys(variant.method.prefill for variant in variants)
    for dialogue in dialogues:
        scored = [index for index, turn in enumerate(dialogue.turns) if turn.is_scored]
        left = {
            prefill: {
                index: tuple(
                    v for v in variants if v.method.prefill == prefill and (dialogue.id, index, v.name) not in done
                )
                for index in scored
            }
            for prefill in prefills
        }
        wanted = {prefill: by_turn for prefill, by_turn in left.items() if any(by_turn.values())}
        script = prompter.script(dialogue) if wanted else None
        for prefill, by_turn in wanted.items():
            assert script is not None
            yield Asking(script, prefill, by_turn)


def _num_answers(dialogues: Sequence[Dialogue], variants: Sequence[Variant]) -> int:
    return sum(turn.is_scored for dialogue in dialogues for turn in dialogue.turns) * len(variants)


def _judged(answered: Answered, loaded: LoadedModel) -> Answer:
    question, usage, turn = answered.question, answered.ended.usage, answered.question.turn
    quality = usage.quality
    text = str(loaded.tokenizer.decode(list(answered.ended.token_ids), skip_special_tokens=True))
    return Answer(
        dialogue=answered.script.dialogue.id,
        turn=question.turn_index,
        variant=answered.variant.name,
        task=turn.task,
        question_at=turn.question_at,
        about=turn.about,
        score=score(text, turn.accepted, turn.metric),
        text=text,
        answer_tokens=usage.completion_tokens,
        is_cut_off=answered.ended.reason is FinishReason.LENGTH,
        prompt_tokens=usage.prompt_tokens,
        past_tokens=question.past_tokens,
        cached_tokens=usage.cached_tokens,
        kv_share=quality.read_tokens / quality.context_tokens if quality.context_tokens else None,
        coverage=quality.coverage_mean,
        cells_share=quality.prefill_cells_computed_share,
        past_coverage=answered.past.coverage,
        past_cells_share=answered.past.cells_share,
        budget_tokens=answered.contract.budget_tokens,
        dense_fallbacks=quality.dense_fallbacks,
    )


def _counter(loaded: LoadedModel) -> Callable[[str], int]:
    """Counts the tokens of one message as the model's template writes it, about: its text and the two markers around it."""
    return lambda text: len(loaded.tokenizer.encode(text, add_special_tokens=False)) + 2


def _measure(dialogues: Sequence[Dialogue], prompter: Prompter, settings: Settings) -> _Sizes:
    """The largest dialogue; every one is rendered once, so that a template that refuses one is met now."""
    tokens = blocks = 0
    for dialogue in dialogues:
        script = prompter.script(dialogue)
        tokens = max(tokens, script.prompt_tokens_max)
        blocks = max(blocks, num_blocks(script, concurrency=settings.concurrency, max_tokens=settings.max_tokens))
    return _Sizes(tokens, blocks)


def _fitted(
    configs: Mapping[tuple[Override, ...], EngineConfig], loaded: LoadedModel, sizes: _Sizes, settings: Settings
) -> dict[tuple[Override, ...], EngineConfig]:
    return {overrides: _fit(config, loaded, sizes, settings) for overrides, config in configs.items()}


def _fit(config: EngineConfig, loaded: LoadedModel, sizes: _Sizes, settings: Settings) -> EngineConfig:
    """The settings with a pool for the dialogues. Raises ContextLengthExceeded where the longest does not fit the model or the pool."""
    limit = min(config.max_session_tokens or loaded.max_positions, loaded.max_positions)
    needed = sizes.prompt_tokens + settings.max_tokens
    if needed > limit:
        raise ContextLengthExceeded(
            f"the longest dialogue has {sizes.prompt_tokens} tokens, {needed} with its answer; {loaded.name} holds {limit}. "
            "Lower --tokens or --max-tokens, or take a model of longer context.",
            param="tokens",
        )
    fitted = fit_pool(config, loaded, blocks=_POOL_DIALOGUES * sizes.blocks)
    if fitted.kv_blocks is not None and fitted.kv_blocks <= sizes.blocks:
        raise ContextLengthExceeded(
            f"the longest dialogue takes {sizes.blocks} blocks while it is asked about; the KV pool has {fitted.kv_blocks - 1}. "
            "Lower --concurrency or --tokens, or raise LOOPSERVE_ENGINE_KV_BYTES_MAX.",
            param="concurrency",
        )
    return fitted


def _manifest(
    settings: Settings,
    loaded: LoadedModel,
    dialogues: Sequence[Dialogue],
    configs: Mapping[tuple[Override, ...], EngineConfig],
) -> dict[str, Any]:
    """What a run is about: it goes on only where all of this is the same."""
    return {
        "model": loaded.name,
        "weights": weights_digest(loaded),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "tasks": list(settings.wanted.tasks),
        "split": str(settings.wanted.split),
        "tokens": settings.wanted.tokens,
        "ask": settings.wanted.ask,
        "past": settings.wanted.past,
        "seed": settings.wanted.seed,
        "max_tokens": settings.max_tokens,
        "num_dialogues": len(dialogues),
        "dialogues": dialogues_digest(dialogues),
        "num_answers": _num_answers(dialogues, settings.variants),
        "variants": [described(variant) for variant in settings.variants],
        "engines": {" ".join(f"{n}={v}" for n, v in o): settings_of(config) for o, config in configs.items()},
    }


def described(variant: Variant) -> dict[str, Any]:
    """A variant as the manifest names it: all that a report needs of it."""
    return {
        "name": variant.name,
        "label": variant.label,
        "method": variant.method.name,
        "prefill": variant.method.prefill,
        "decode": variant.method.decode,
        "budget": None if variant.budget is None else str(variant.budget),
        "alpha": variant.alpha,
    }
