"""The affinity benchmark: each of its checks can fail, its dialogues are what it says, and a tiny run holds."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cluster.affinity import (
    check_cached,
    check_first_token,
    check_placement,
    main,
    token_counter,
    verdict,
)
from benchmarks.cluster.dialogue_load import Load, Turn, made_dialogues, plain_text

NUM_TURNS, NEW_TOKENS, ANSWER_TOKENS = 4, 100, 10


def perfect_turns(*, num_dialogues: int = 3) -> list[Turn]:
    """Dialogues that stay on their replicas, find all that was left, and wait 50 ms each turn."""
    return [
        Turn(
            dialogue=f"dialogue-{index}",
            number=number,
            replica=f"replica-{index % 2}",
            session_name=f"session-{index}",
            first_token_s=0.05,
            prompt_tokens=number * NEW_TOKENS + (number - 1) * ANSWER_TOKENS,
            completion_tokens=ANSWER_TOKENS,
            cached_tokens=(number - 1) * (NEW_TOKENS + ANSWER_TOKENS),
            rectified_tokens=0,
            answer="yes",
        )
        for index in range(num_dialogues)
        for number in range(1, NUM_TURNS + 1)
    ]


def turns_without_reuse() -> list[Turn]:
    """The same with nothing found, and waits that grow with the prompt."""
    return [replace(turn, cached_tokens=0, first_token_s=turn.prompt_tokens / 1000) for turn in perfect_turns()]


def test_a_perfect_run_passes_every_check() -> None:
    turns = perfect_turns()
    assert check_placement(turns).passed
    assert check_cached(turns).passed
    assert check_first_token(turns).passed


def test_one_turn_on_another_replica_fails_the_placement() -> None:
    turns = perfect_turns()
    turns[2] = replace(turns[2], replica="replica-1")
    check = check_placement(turns)
    assert not check.passed
    assert "dialogue-0" in check.finding


@pytest.mark.parametrize(("missing_tokens", "passes"), [(0, True), (16, True), (17, False)])
def test_one_block_may_be_missing_and_no_token_more(missing_tokens: int, passes: bool) -> None:
    turns = perfect_turns()
    turns[-1] = replace(turns[-1], cached_tokens=turns[-1].cached_tokens - missing_tokens)
    assert check_cached(turns).passed is passes


def test_rectified_tokens_count_as_found() -> None:
    turns = perfect_turns()
    turns[-1] = replace(turns[-1], cached_tokens=turns[-1].cached_tokens - 40, rectified_tokens=40)
    assert check_cached(turns).passed


def test_a_last_turn_that_takes_more_than_one_and_a_half_times_the_second_fails() -> None:
    slow = [replace(t, first_token_s=0.076) if t.number == NUM_TURNS else t for t in perfect_turns()]
    assert not check_first_token(slow).passed


def test_turns_with_different_new_input_are_not_compared() -> None:
    longer = [replace(t, prompt_tokens=t.prompt_tokens + 17) if t.number == NUM_TURNS else t for t in perfect_turns()]
    check = check_first_token(longer)
    assert not check.passed
    assert "new input" in check.finding


def test_the_verdict_needs_reuse_to_make_the_difference() -> None:
    assert verdict(perfect_turns(), turns_without_reuse()).passed
    assert not verdict(perfect_turns(), perfect_turns()).passed
    assert not verdict(turns_without_reuse(), turns_without_reuse()).passed


def test_a_check_that_also_passes_without_reuse_spoils_the_verdict() -> None:
    fast = [replace(turn, first_token_s=0.05) for turn in turns_without_reuse()]
    found = [replace(turn, cached_tokens=turn.prompt_tokens) for turn in turns_without_reuse()]
    assert not verdict(perfect_turns(), fast).passed
    assert not verdict(perfect_turns(), found).passed


def test_half_of_the_dialogues_send_a_header_and_openings_differ_but_for_the_common_ones() -> None:
    load = Load(num_dialogues=10, num_turns=2, turn_tokens=12, num_common_opening=4)
    dialogues = made_dialogues(load, lambda text: len(text.split()))
    names = [dialogue.session_id for dialogue in dialogues]
    assert names.count(None) == 5
    assert len(set(names)) == 6
    openings = [(dialogue.system, dialogue.user_texts[0]) for dialogue in dialogues]
    assert len(set(openings[:4])) == 1
    assert len(set(openings)) == 7
    assert len({dialogue.user_texts[1] for dialogue in dialogues}) == 10
    assert {dialogue.session_id is None for dialogue in dialogues[:4]} == {True, False}


def test_the_same_seed_says_the_same_and_another_does_not() -> None:
    load = Load(num_dialogues=2, num_turns=2, turn_tokens=12, num_common_opening=0)

    def said(seed: int) -> tuple[str, ...]:
        return made_dialogues(replace(load, seed=seed), lambda text: len(text.split()))[0].user_texts

    assert said(1) == said(1) != said(2)


def test_a_text_is_as_long_as_asked_in_the_shipped_models_tokens() -> None:
    count = token_counter("")
    lengths = [count(plain_text(random.Random(seed), 80, count)) for seed in range(20)]
    assert all(80 - 6 <= length <= 80 for length in lengths), lengths


@pytest.mark.parametrize("sizes", [{"num_turns": 1}, {"num_dialogues": 0}, {"num_common_opening": 51}])
def test_a_load_that_could_show_nothing_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="dialogue"):
        Load(**sizes)


# No times are held: whether the last turn is fast is for a quiet machine to say.
@pytest.mark.serve
def test_dialogues_stay_and_find_all_that_was_said_but_not_without_reuse(tmp_path: Path) -> None:
    sizes = "--replicas 2 --num-dialogues 4 --num-turns 3 --turn-tokens 40 --num-common-opening 2 --pace dialogues"
    main([*sizes.split(), "--force", "--out", str(tmp_path), "--name", "tiny"])
    result = json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))
    assert [len(run["turns"]) for run in result["runs"]] == [12, 12]
    for run in result["runs"]:
        assert {turn["replica"] for turn in run["turns"]} <= set(run["replicas"])
    with_reuse, without_reuse = (
        {check["name"]: check for check in result[runs]} for runs in ("with_reuse", "without_reuse")
    )
    assert with_reuse["placement"]["passed"], with_reuse
    assert with_reuse["cached"]["passed"], with_reuse
    assert not without_reuse["cached"]["passed"], without_reuse
    assert "| 3 |" in (tmp_path / "tiny.md").read_text(encoding="utf-8")
