"""The quality benchmark asks what it says it asks, and counts answers, intervals and budgets rightly."""

import json
import shlex
from dataclasses import replace

import pytest
import torch

from benchmarks import dialogues as made
from benchmarks.quality import selection
from benchmarks.quality.outcomes import Answered, paired_interval, summarize
from benchmarks.quality.scenarios import Prompter, holds_value, make_scenario
from loopserve.config import EngineConfig
from loopserve.dialogue import Mode, QualityReport, TurnUsage
from loopserve.loading import load_model


@pytest.fixture(autouse=True)
def same_threads():
    """The benchmark sets torch's threads for the process that it usually has to itself."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prompter():
    return Prompter(load_model(EngineConfig(device="cpu", dtype="float32")))


@pytest.fixture(scope="module")
def dialogues(prompter):
    return list(made.make_dialogues(5, made.heldout_spec(256), 6, prompter.count))


def test_history_and_questions_render_as_the_template_renders_the_dialogue(prompter, dialogues):
    for dialogue in dialogues:
        scenario = make_scenario(dialogue, prompter, history_turns=3)
        assert scenario is not None
        assert 1 <= len(scenario.history) <= 3
        late = dialogue.turns[len(dialogue.turns) - len(scenario.questions) :]
        ids = [token_id for turn in scenario.history for token_id in turn] + list(scenario.tail)
        for turn in late:
            ids += prompter.message("user", turn.user) + prompter.message("assistant", turn.answer)
        rendered = prompter.loaded.tokenizer.apply_chat_template(dialogue.messages(), tokenize=False)
        assert prompter.loaded.tokenizer.decode(ids) == rendered
        assert [question.value for question in scenario.questions] == [turn.facts[0].value for turn in late]


def test_a_dialogue_without_closing_question_is_left_out(prompter):
    fact = made.Fact("safe", "1234", 0)
    told = made.Turn("Remember: safe 1234.", "Noted: safe 1234.", "statement", (fact,))
    assert make_scenario(made.Dialogue("d", "", (told,)), prompter, history_turns=2) is None


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("On record: safe 1234.", True),
        ("On record: safe 12345.", False),
        ("On record: safe 123.", False),
        ("", False),
        ("9, 1234", True),
    ],
)
def test_only_the_exact_value_counts(answer, is_right):
    assert holds_value(answer, "1234") is is_right


def test_the_interval_covers_the_difference_and_closes_when_nothing_differs():
    right, wrong = [True, True], [False, True]
    assert paired_interval([right] * 8, [right] * 8, seed=0, draws=200) == (0.0, 0.0)
    low, high = paired_interval([right] * 4 + [wrong] * 4, [right] * 8, seed=0, draws=500)
    assert low < -0.25 < high <= 0.0
    assert paired_interval([wrong], [right], seed=0, draws=50) == (-0.5, -0.5)


def _answered(is_right, *, prompt, cached, share, kept=8.0):
    quality = QualityReport(
        Mode.SPARSE,
        coverage_mean=0.5,
        coverage_worst_head=0.25,
        kept_tokens=kept,
        context_tokens=32.0,
        prefill_cells_computed_share=share,
        refreshes=2,
    )
    return Answered(is_right, "early", "x", TurnUsage(prompt, cached, 4, quality))


def test_prefill_shares_are_weighted_by_cells():
    history = _answered(None, prompt=10, cached=0, share=0.5)  # 55 cells
    question = _answered(True, prompt=13, cached=12, share=1.0)  # 13 cells
    outcome = summarize("sparse", [[history, question]], [[history, question]], seed=0)
    assert outcome.cells_share == pytest.approx((55 * 0.5 + 13) / 68)
    assert (outcome.cells_share_history, outcome.cells_share_questions) == (0.5, 1.0)
    assert outcome.kept_share == 0.25
    assert (outcome.questions, outcome.accuracy, outcome.difference) == (1, 1.0, 0.0)


def test_budgets_leave_room_for_sinks_and_window():
    args = selection.parse_arguments(["--tokens", "512", "--window-tokens", "16", "--sink-tokens", "4"])
    variant = selection.Variant("v", Mode.SPARSE, kept_share=0.25)
    assert selection.budget_tokens(variant, args) == 128 - 20
    with pytest.raises(ValueError, match="leave none to choose"):
        selection.budget_tokens(replace(variant, kept_share=0.03), args)


def test_every_variant_meets_the_same_questions_and_full_sparsity_is_dense(tmp_path):
    flags = "--dialogues 2 --tokens 192 --shares 0.25 --threads 1 --max-answer-tokens 12"
    text = selection.run_benchmark(selection.parse_arguments([*shlex.split(flags), "--results", str(tmp_path)]))
    record = json.loads((tmp_path / "selection.json").read_text())
    assert (tmp_path / "selection.md").read_text() == text
    dense, everything, prefill_only, first_block, progressive = record["outcomes"]
    assert len({outcome["questions"] for outcome in record["outcomes"]}) == 1
    assert dense["cells_share"] == dense["kept_share"] == 1.0
    assert dense["coverage_mean"] is None
    assert (everything["same_answers"], everything["kept_share"], everything["cells_share"]) == (1.0, 1.0, 1.0)
    assert everything["dense_fallbacks"] == 0
    assert everything["coverage_worst_head"] == pytest.approx(1.0, abs=1e-4)
    assert prefill_only["cells_share"] < 1.0
    assert prefill_only["kept_share"] == 1.0
    for sparse in (first_block, progressive):
        assert sparse["kept_share"] < 0.5
        assert 0.0 < sparse["coverage_worst_head"] <= sparse["coverage_mean"] <= 1.0
    assert first_block["refreshes_per_answer"] == 1.0 < progressive["refreshes_per_answer"]
