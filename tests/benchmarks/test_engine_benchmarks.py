"""The engine's benchmarks count what they say they count: same tokens on all sides, nothing computed twice by the peer."""

import json
import shlex
from dataclasses import replace

import pytest
import torch

from benchmarks import machine
from benchmarks.engine import crossover, peers
from benchmarks.engine.pairs import Agreement, Pairs, check_complete, compare, measure, parting_gap
from benchmarks.engine.random_model import ModelSize, build_weights, loaded_model, stock_model
from benchmarks.engine.sides import (
    BatchingSettings,
    ContinuousBatchingSide,
    GenerateSide,
    LoopServeSide,
    Run,
    Workload,
    make_prompts,
)
from loopserve.config import EngineConfig
from loopserve.engine import Engine
from loopserve.methods import DECODE_RULES
from loopserve.plan import SparsePrefill
from loopserve.tuning import Conversation

SIZE = ModelSize(hidden=64, layers=2, intermediate=96, vocab=256, heads=4, kv_heads=2, positions=1024)
WORKLOAD = Workload(dialogues=3, turns=3, prompt_tokens=19, answer_tokens=6)
TINY = "--force --hidden 64 --layers 2 --intermediate 96 --vocab 256 --heads 4 --kv-heads 2 --threads 1"


pytestmark = pytest.mark.usefixtures("same_threads")


@pytest.fixture(scope="module")
def weights():
    return build_weights(SIZE)


@pytest.fixture(scope="module")
def prompts():
    return make_prompts(WORKLOAD, vocab=SIZE.vocab, seed=3)


@pytest.fixture
def ours(weights):
    config = EngineConfig(device="cpu", dtype="float32", kv_blocks=128)
    return LoopServeSide(Engine(config, loaded=loaded_model(SIZE, weights)))


def count_rows(model, side, prompts):
    """What the side answers, and how many rows went through the model."""
    rows = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        return side.run(prompts, answer_tokens=WORKLOAD.answer_tokens), sum(rows)
    finally:
        hook.remove()


def test_all_sides_answer_with_the_same_tokens(weights, prompts, ours):
    generated = GenerateSide(stock_model(SIZE, weights)).run(prompts, answer_tokens=WORKLOAD.answer_tokens)
    check_complete(generated, WORKLOAD, "generate")
    assert ours.run(prompts, answer_tokens=WORKLOAD.answer_tokens).answers == generated.answers
    for attention in ("sdpa", "paged|eager"):
        side = ContinuousBatchingSide(stock_model(SIZE, weights), BatchingSettings(attention=attention, page_size=16))
        assert side.run(prompts, answer_tokens=WORKLOAD.answer_tokens).answers == generated.answers


def test_generate_computes_every_row_of_a_dialogue_once(weights, prompts):
    model = stock_model(SIZE, weights)
    _, rows = count_rows(model, GenerateSide(model), prompts)
    assert rows == WORKLOAD.dialogues * (WORKLOAD.context_tokens - 1)  # nobody needs the last answer's last row


def test_continuous_batching_computes_less_than_a_page_again_each_turn(weights, prompts):
    model = stock_model(SIZE, weights)
    settings = BatchingSettings(page_size=16)
    _, rows = count_rows(model, ContinuousBatchingSide(model, settings), prompts)
    once = WORKLOAD.dialogues * (WORKLOAD.context_tokens - 1)
    warm_up = 25
    assert rows <= once + warm_up + WORKLOAD.dialogues * (WORKLOAD.turns - 1) * settings.page_size


def test_our_engine_reuses_the_dialogue_and_nothing_of_other_runs(prompts, weights):
    class Sink:
        prefill_rows = 0

        def on_step(self, stats):
            self.prefill_rows += stats.num_prefill_tokens

        def on_turn(self, stats):
            pass

    sink = Sink()
    config = EngineConfig(device="cpu", dtype="float32", kv_blocks=128)
    side = LoopServeSide(Engine(config, loaded=loaded_model(SIZE, weights), stats=sink))
    carried = WORKLOAD.turns - 1  # the last answer's last token enters with the next prompt
    once = WORKLOAD.dialogues * (WORKLOAD.turns * WORKLOAD.prompt_tokens + carried)
    for number, seed in ((1, 10), (2, 11)):
        side.run(make_prompts(WORKLOAD, vocab=SIZE.vocab, seed=seed), answer_tokens=WORKLOAD.answer_tokens)
        assert sink.prefill_rows == number * once


def test_a_pair_is_refused_when_a_side_answers_short(prompts):
    class Short:
        name = "short"

        def run(self, prompts, *, answer_tokens):
            return Run(1.0, tuple(tuple((1,) * (answer_tokens - 1) for _ in turns) for turns in prompts))

    with pytest.raises(ValueError, match="short did not answer"):
        measure(Short(), [], WORKLOAD, pairs=1, vocab=SIZE.vocab, reference=None, seed=0)


def test_parting_answers_are_judged_by_the_logits_at_the_place(weights, prompts, ours):
    reference = stock_model(SIZE, weights)
    run = ours.run(prompts, answer_tokens=WORKLOAD.answer_tokens)
    right = run.answers[0]
    assert parting_gap(prompts[0], right, right, reference) is None
    with torch.inference_mode():
        logits = reference(torch.tensor([prompts[0][0]])).logits[0, -1]
    worst = int(logits.argmin())
    wrong = ((worst, *right[0][1:]), *right[1:])
    gap = parting_gap(prompts[0], right, wrong, reference)
    assert gap == pytest.approx(float(logits.max() - logits[worst]))
    other = Run(1.0, (wrong, *run.answers[1:]))
    assert compare([prompts], [run], [other], reference) == Agreement(3, identical=2, near_ties=0, unexplained=1)


def test_ratios_are_the_peers_seconds_over_ours_pair_by_pair():
    workload = replace(WORKLOAD, dialogues=8)
    pairs = Pairs("generate", workload, (1.0, 2.0, 1.0), (4.0, 4.0, 3.0), Agreement(24, 24, 0, 0))
    assert pairs.ratios == (4.0, 2.0, 3.0)
    assert pairs.ratio == 3.0
    (sentence,) = peers.worse_cases([pairs])
    assert sentence.startswith("SHORT of the target")


def test_tuning_keeps_the_fastest_settings_and_survives_those_that_fail():
    def seconds(settings):
        if settings.attention == "paged|eager":
            raise RuntimeError("not here")
        return settings.page_size / 16 + settings.max_batch_tokens / 1000

    best, tried = peers.tune(seconds, BatchingSettings(), peers.tuning_axes(WORKLOAD, with_compile=False))
    assert (best.attention, best.page_size, best.max_batch_tokens) == ("sdpa", 8, 249)
    assert sum(str(outcome).startswith("failed") for outcome in tried.values()) == 1


def test_peers_writes_what_it_measured(tmp_path):
    sizes = "--dialogues 1 2 --turns 2 --prompt-tokens 9 --answer-tokens 3 --pairs 2 --tuning-runs 0"
    args = peers.parse_arguments([*shlex.split(f"{TINY} {sizes}"), "--results", str(tmp_path)])
    text = peers.run_benchmark(args)
    record = json.loads((tmp_path / "peers.json").read_text())
    assert (tmp_path / "peers.md").read_text() == text
    assert [(case["dialogues"], case["peer"]) for case in record["cases"]] == [
        (1, "generate"),
        (1, "continuous batching"),
        (2, "generate"),
        (2, "continuous batching"),
    ]
    for case in record["cases"]:
        assert case["output_tokens"] == case["dialogues"] * 2 * 3
        assert len(case["ratios"]) == 2
        assert case["agreement"]["unexplained"] == 0
    assert "FORCED" in text


def test_a_busy_machine_is_refused_unless_forced(monkeypatch):
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (0.9, 0.0, 0.0))
    with pytest.raises(machine.BusyMachine, match=r"0\.90"):
        machine.require_quiet(forced=False)
    assert machine.require_quiet(forced=True) == 0.9


def test_the_machine_is_stated_with_every_version():
    stated = machine.describe_machine(load_before=0.25)
    assert stated.torch == torch.__version__
    assert stated.cores >= 1
    assert all(part in stated.sentence() for part in (stated.cpu, stated.python, stated.transformers, stated.commit))


def test_a_chunk_over_everything_has_the_cells_of_causal_attention(weights):
    config = EngineConfig(device="cpu", dtype="float32", prefill=crossover.engine_config(_crossover_args()).prefill)
    ids = make_prompts(Workload(1, 1, 160, 1), vocab=SIZE.vocab, seed=1)[0][0]
    conversation = Conversation(loaded_model(SIZE, weights), config, ids, scattered=True)
    conversation.extend(0, 96)
    _, result = conversation.chunk(96, 160, sparse=SparsePrefill("lines", alpha=1.0, min_coverage=None, seed=0))
    (quality,) = result.quality
    assert quality.cells_computed == quality.cells_total == SIZE.layers * SIZE.heads * (64 * 96 + 64 * 65 // 2)


def test_a_sparse_answer_is_measured_when_a_scheduler_would_have_it_measured(weights):
    config = crossover.engine_config(_crossover_args())
    config = replace(config, decode=replace(config.decode, measure_outputs=4))
    ids = make_prompts(Workload(1, 1, 160, 1), vocab=SIZE.vocab, seed=1)[0][0]
    conversation = Conversation(loaded_model(SIZE, weights), config, ids, scattered=False)
    conversation.extend(0, 128)
    _, dense = conversation.answer(128, 10, budget_tokens=None)
    assert [result.quality for result in dense] == [()] * 10
    _, sparse = conversation.answer(128, 10, budget_tokens=64)
    measured_at = [step for step, result in enumerate(sparse, 1) if result.quality[0].coverage_count]
    rule = DECODE_RULES[config.decode.method]
    assert measured_at == [step for step in range(1, 11) if rule.measurement_due(step, config.decode)] == [4, 8]


def test_crossover_writes_a_verdict_for_each_phase(tmp_path):
    text = crossover.run_benchmark(_crossover_args("--results", str(tmp_path)))
    record = json.loads((tmp_path / "crossover.json").read_text())
    assert [p["context_tokens"] for p in record["prefill"]] == [64, 128]
    assert len(record["decode"]) == 2 * 2  # two budgets: the one asked for and the default
    assert all(0.0 < p["cells_share"] <= 1.0 for p in record["prefill"])
    assert len(record["verdicts"]) == 3
    assert "FORCED" in text


def _crossover_args(*more):
    sizes = "--contexts 64 128 --chunk 64 --steps 4 --pairs 1 --budgets 64"
    return crossover.parse_arguments([*shlex.split(f"{TINY} {sizes}"), *more])
