"""Runs of the suite over a tiny model: whole, broken off and gone on with, and refused before anything long begins."""

import json
from dataclasses import asdict

import pytest

from loopserve.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from loopserve.evaluation import suite
from loopserve.evaluation.answers import MANIFEST, AnswerLog
from loopserve.evaluation.loaders import read_dialogues, write_dialogues
from loopserve.evaluation.report import MARKDOWN, write_report
from loopserve.evaluation.scoring import score
from loopserve.evaluation.suite import TOLD, Settings, run, tell
from loopserve.evaluation.tasks import Wanted
from loopserve.evaluation.variants import Budget, Variant, find_method, make_variants

VARIANTS = make_variants(["dense", "loopserve", "first-block"], [Budget(share=0.5)])
NUM_SCORED = 4  # of each dialogue


class Counting:
    """Counts, and breaks a run off after so many answers."""

    def __init__(self, most: int | None = None) -> None:
        self.counted_: tuple[int, int] | None = None
        self.told_: tuple[int, int] | None = None
        self.num_answered = 0
        self._most = most

    def told(self, num_told, num_dialogues):
        self.told_ = num_told, num_dialogues

    def counted(self, num_answers, num_before):
        self.counted_ = num_answers, num_before

    def answered(self, answer):
        self.num_answered += 1
        if self.num_answered == self._most:
            raise KeyboardInterrupt


@pytest.fixture
def settings(tmp_path, dialogues):
    write_dialogues(tmp_path / "lockers.jsonl", dialogues)

    def make(out="run", **changes):
        asked = {"num": 2, "seed": 1, "ask": "all", "past": "reference"}
        asked |= {name: changes.pop(name) for name in asked.keys() & changes.keys()}
        wanted = Wanted(tasks=(str(tmp_path / "lockers.jsonl"),), **asked)
        settings = {"model": "", "wanted": wanted, "variants": VARIANTS, "concurrency": 4, "max_tokens": 5}
        return Settings(**(settings | changes), out=tmp_path / out)

    return make


def by_key(log: AnswerLog) -> dict:
    return {answer.key: asdict(answer) for answer in log.answers}


def test_a_run_answers_every_question_under_every_variant_and_reports_it(settings, loaded, dialogues, tmp_path):
    listener = Counting()
    log = run(settings(), listener=listener, loaded=loaded)
    assert listener.counted_ == (2 * NUM_SCORED * 3, 0)
    assert listener.num_answered == len(log.answers) == 2 * NUM_SCORED * 3
    told = {(d.id, index): turn for d in dialogues for index, turn in enumerate(d.turns)}
    for answer in log.answers:
        turn = told[answer.dialogue, answer.turn]
        assert answer.score == score(answer.text, turn.accepted, turn.metric)
        assert (answer.task, answer.question_at, answer.cached_tokens) == ("lockers", "end", answer.past_tokens)
        assert answer.answer_tokens <= 5
        assert answer.kv_share is None or 0 < answer.kv_share <= 1.0 or answer.variant != "dense"
    report = write_report(tmp_path / "run", draws=50)
    assert report.is_complete
    assert [outcome.whole.score.num for outcome in report.outcomes] == [2 * NUM_SCORED] * 3


def test_a_run_that_was_broken_off_goes_on_and_comes_to_the_same(settings, loaded):
    whole = run(settings("whole"), listener=Counting(), loaded=loaded)
    with pytest.raises(KeyboardInterrupt):
        run(settings("parts"), listener=Counting(most=7), loaded=loaded)
    second = Counting()
    log = run(settings("parts", concurrency=2), listener=second, loaded=loaded)
    assert second.counted_ == (2 * NUM_SCORED * 3, 7)
    assert second.num_answered == 2 * NUM_SCORED * 3 - 7
    before, after = by_key(whole), by_key(log)
    assert before.keys() == after.keys()
    for key, answer in before.items():
        coverage = pytest.approx(answer.pop("coverage"), abs=1e-6)  # rounding differs with what else is in the batch
        assert after[key].pop("coverage") == coverage
        assert after[key] == answer


def test_a_run_that_is_at_its_end_starts_no_engine_again(settings, loaded, monkeypatch):
    run(settings(), listener=Counting(), loaded=loaded)
    monkeypatch.setattr(suite, "Engine", None)
    assert len(run(settings(), listener=Counting(), loaded=loaded).answers) == 2 * NUM_SCORED * 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_tokens": 6}, "max_tokens"),
        ({"num": 1}, "dialogues, num_answers, num_dialogues"),
        ({"seed": 2}, "seed"),
        ({"variants": VARIANTS[:1]}, "engines|num_answers, variants"),
    ],
)
def test_other_settings_are_not_mixed_into_a_run(settings, loaded, changes, named):
    run(settings(variants=VARIANTS[:2]), listener=Counting(), loaded=loaded)
    with pytest.raises(InvalidRequest, match=rf"other settings \(.*({named})"):
        run(settings(**({"variants": VARIANTS[:2]} | changes)), listener=Counting(), loaded=loaded)


def test_engine_settings_are_those_of_their_variants_and_noted(settings, loaded, tmp_path):
    prefill = find_method("loopserve-prefill")
    tiles = (("prefill.tile_tokens", "8"), ("prefill.local_tokens", "8"), ("prefill.chunk_tokens", "32"))
    variants = (
        Variant(find_method("dense")),
        Variant(prefill, alpha=0.4, overrides=tiles),
        Variant(prefill, alpha=1.0, overrides=tiles),
    )
    log = run(settings(variants=variants, num=1), listener=Counting(), loaded=loaded)
    shares = {
        variant.name: {answer.past_cells_share for answer in log.answers if answer.variant == variant.name}
        for variant in variants
    }
    assert max(shares[variants[1].name]) < 1
    assert shares[variants[2].name] == {1.0}
    engines = json.loads((tmp_path / "run" / MANIFEST).read_text())["settings"]["engines"]
    assert [
        (name, engine["prefill"]["alpha"], engine["prefill"]["tile_tokens"]) for name, engine in engines.items()
    ] == [
        ("", 0.95, 64),
        ("prefill.alpha=0.4 prefill.tile_tokens=8 prefill.local_tokens=8 prefill.chunk_tokens=32", 0.4, 8),
        ("prefill.alpha=1 prefill.tile_tokens=8 prefill.local_tokens=8 prefill.chunk_tokens=32", 1.0, 8),
    ]


def test_only_probes_are_asked_where_there_are_any_and_other_scored_turns_are_told(settings, loaded):
    log = run(settings(variants=VARIANTS[:1], ask="probes"), listener=Counting(), loaded=loaded)
    assert sorted({answer.turn for answer in log.answers}) == [2, 5, 6]


def test_questions_may_stand_over_what_the_model_itself_answered(settings, loaded, dialogues, tmp_path):
    listener = Counting()
    own = run(settings("own", past="own", variants=VARIANTS[:2]), listener=listener, loaded=loaded)
    assert listener.told_ == (2, 2)
    told = read_dialogues(tmp_path / "own" / TOLD)
    assert sorted(d.id for d in told) == sorted(d.id for d in dialogues)
    assert not {turn.answer for d in told for turn in d.turns if not turn.probe} & {"Noted."}
    given = Wanted(tasks=(str(tmp_path / "own" / TOLD),), num=2, seed=1, ask="all")
    again = run(settings("again", wanted=given, variants=VARIANTS[:2]), listener=Counting(), loaded=loaded)
    assert {a.key: (a.text, a.prompt_tokens) for a in own.answers} == {
        a.key: (a.text, a.prompt_tokens) for a in again.answers
    }
    report = write_report(tmp_path / "own", draws=50)
    assert "The past holds the model's own answers" in (tmp_path / "own" / MARKDOWN).read_text()
    assert report.is_complete


def test_a_run_over_own_answers_that_was_broken_off_does_not_tell_again(settings, loaded, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(settings(past="own"), listener=Counting(most=3), loaded=loaded)
    monkeypatch.setattr(suite, "with_own_answers", None)
    second = Counting()
    log = run(settings(past="own"), listener=second, loaded=loaded)
    assert second.counted_ == (2 * NUM_SCORED * 3, 3)
    assert len(log.answers) == 2 * NUM_SCORED * 3
    with pytest.raises(InvalidRequest, match=r"other settings \(past\)"):
        run(settings(), listener=Counting(), loaded=loaded)


def test_telling_that_was_broken_off_goes_on_with_what_is_whole(settings, loaded, tmp_path):
    tell(settings("whole", past="own"), listener=Counting(), loaded=loaded)
    whole = (tmp_path / "whole" / TOLD).read_text().splitlines(keepends=True)
    tell(settings(past="own"), listener=Counting(), loaded=loaded)
    (tmp_path / "run" / TOLD).write_text(whole[0] + whole[1][:40])
    listener = Counting()
    tell(settings(past="own"), listener=listener, loaded=loaded)
    assert listener.told_ == (2, 2)
    assert sorted((tmp_path / "run" / TOLD).read_text().splitlines(keepends=True)) == sorted(whole)


def test_runs_share_a_past_that_was_told_beforehand(settings, loaded, tmp_path, monkeypatch):
    tell(settings(past="own"), listener=Counting(), loaded=loaded)
    assert (tmp_path / "run" / TOLD).exists()
    monkeypatch.setattr(suite, "with_own_answers", None)
    assert len(run(settings(past="own"), listener=Counting(), loaded=loaded).answers) == 2 * NUM_SCORED * 3


def test_made_dialogues_are_asked_too(settings, loaded, tmp_path):
    wanted = Wanted(tasks=("facts", "sums"), num=1, tokens=400)
    log = run(settings(wanted=wanted, variants=VARIANTS[:1]), listener=Counting(), loaded=loaded)
    assert {answer.task for answer in log.answers} == {"facts", "sums"}
    assert {answer.question_at for answer in log.answers} == {"begin", "middle", "end"}


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        (
            {"max_tokens": 5000},
            ContextLengthExceeded,
            "5000 with its answer|holds 2048. Lower --tokens or --max-tokens",
        ),
        (
            {"variants": (Variant(find_method("dense"), overrides=(("decode.magic", "1"),)),)},
            ConfigError,
            "--set decode.magic=1: there is no setting 'magic'; known: .*pooling_tokens",
        ),
        (
            {"variants": (Variant(find_method("dense"), overrides=(("decode.pooling_tokens", "much"),)),)},
            ConfigError,
            "--set decode.pooling_tokens=much: 'much' does not fit",
        ),
        (
            {"variants": (Variant(find_method("dense"), overrides=(("decode.pooling_tokens", "2"),)),)},
            ConfigError,
            "pooling_tokens is 2; an odd number",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_first_answer(settings, loaded, changes, error, complaint, tmp_path):
    with pytest.raises(error, match=complaint):
        run(settings(**changes), listener=Counting(), loaded=loaded)
    assert not (tmp_path / "run").exists()


def test_a_pool_that_holds_no_dialogue_is_refused(settings, loaded, monkeypatch):
    monkeypatch.setenv("LOOPSERVE_ENGINE_KV_BLOCKS", "20")
    with pytest.raises(ContextLengthExceeded, match=r"the KV pool has 19\. Lower --concurrency"):
        run(settings(), listener=Counting(), loaded=loaded)
