"""The verdict on conversations whose replica went: every check can fail, and fails for its own reason."""

from dataclasses import replace

import pytest

from benchmarks.cluster.dialogue_load import Turn
from benchmarks.cluster.replica_loss import CASES, UNDISTURBED, case_table, check_table, parse_arguments, plans
from benchmarks.cluster.replica_loss_verdict import Case, Outcome, Plan, Talk, Tally, checks, is_control
from loopserve.evaluation.items import Turn as Said

NUM = 40
BY_NAME = {case.name: case for case in CASES}


def talk(number: int, *, replica: str, found: int = 400, answer: str = "On record: a 1.") -> Talk:
    """Two turns on one replica, then a question that finds `found` of the 400 tokens that were there."""
    plan = Plan(f"d{number}", None, (), ("t1", "t2", "q1"), (Said("q1", "On record: a 1.", ("a 1",)),))
    first = Turn(plan.name, 1, replica, "s", 0.1, 190, 20, 0, 0, "ok")
    turns = [first, replace(first, number=2, prompt_tokens=380)]
    asked = replace(turns[1], number=3, prompt_tokens=450, cached_tokens=found, answer=answer, first_token_s=0.5)
    return Talk(plan, [], [*turns, asked])


def outcome(
    case: Case, *, gone: str = "a", moved: int = 0, told: dict[str, int] | None = None, **changed: Talk
) -> Outcome:
    """Half of the dialogues were held by the replica that went; `d3=...` puts another one in place of that talk."""
    talks = {f"d{number}": talk(number, replica="ab"[number % 2]) for number in range(NUM)}
    results = ({"moved": moved} if moved else {}) | (told or {})
    return Outcome(case, tuple((talks | changed).values()), gone, results, 1.0, caught=("d0",), longest_s=1.0)


def found(case: Case, *, moved: int = 0, told: dict[str, int] | None = None, **changed: Talk) -> dict[str, bool]:
    gone = outcome(case, moved=moved, told=told, **changed)
    tally = Tally.of(gone, outcome(UNDISTURBED, gone=""))
    return {check.name: check.passed for check in checks(gone, tally)}


def test_a_drain_passes_where_all_that_moved_go_on_and_nothing_else_changed():
    assert set(found(BY_NAME["drained"], moved=20).values()) == {True}


def test_of_twenty_that_moved_one_may_be_computed_again_and_not_two():
    lost = {f"d{number}": talk(number, replica="a", found=0) for number in (0, 2)}
    assert found(BY_NAME["drained"], moved=20, d0=lost["d0"])["moved sessions go on"]
    assert not found(BY_NAME["drained"], moved=20, **lost)["moved sessions go on"]


def test_a_move_that_was_begun_and_failed_counts_against_the_hand_off():
    lost = {f"d{number}": talk(number, replica="a", found=0) for number in range(0, 20, 2)}
    assert not found(BY_NAME["drained"], moved=10, told={"failed": 10}, **lost)["moved sessions go on"]
    assert set(found(BY_NAME["drained"], moved=10, told={"not_worth_it": 10}, **lost).values()) == {True}


def test_a_session_of_which_nothing_was_told_is_missed():
    assert not found(BY_NAME["drained"], moved=19)["all accounted for"]


def test_a_kill_in_turns_must_catch_some_and_none_of_them_may_hang_or_end_without_a_reason():
    lost = {f"d{number}": talk(number, replica="a", found=0) for number in range(0, NUM, 2)}
    fine = outcome(BY_NAME["killed in turns"], **lost)
    lost["d0"].broken = ["d0, turn 3: TurnFailed {'message': 'The replica went away', 'code': 'replica_lost'}"]

    def names(each: Outcome) -> set[str]:
        tally = Tally.of(each, outcome(UNDISTURBED, gone=""))
        return {check.name for check in checks(each, tally) if not check.passed}

    assert names(fine) == set()
    assert names(replace(fine, caught=())) == {"turns were under way"}
    assert names(replace(fine, longest_s=31.0)) == {"none hangs"}
    for silent in ("d0, turn 3: ReadTimeout ", "d0, turn 3: TurnFailed the stream broke off"):
        lost["d0"].broken = [silent]
        assert names(fine) == {"told why"}


def test_a_dialogue_of_another_replica_that_lost_its_kv_is_found():
    assert not found(BY_NAME["killed"], d1=talk(1, replica="b", found=0))["others stay"]


def test_what_differed_before_anything_happened_is_told_apart():
    early = talk(5, replica="b", answer="On record: b 2.")
    early.turns[0] = replace(early.turns[0], answer="other")
    gone = outcome(BY_NAME["drained"], moved=20, d5=early)
    tally = Tally.of(gone, outcome(UNDISTURBED, gone=""))
    assert (tally.other_answers, tally.other_before) == (0, 1)


def test_where_nothing_moved_the_check_about_moving_fails_and_is_meant_to():
    alone = BY_NAME["drained alone"]
    gone = outcome(alone, **{f"d{n}": talk(n, replica="a", found=0) for n in range(0, NUM, 2)})
    (failed,) = [check for check in checks(gone, Tally.of(gone, outcome(UNDISTURBED, gone=""))) if not check.passed]
    assert not found(alone)["nothing reused"]
    assert failed.name == "moved sessions go on" and is_control(alone, failed)
    assert not is_control(BY_NAME["drained"], failed)


@pytest.mark.parametrize("case", CASES)
def test_a_dialogue_that_is_not_answered_or_answered_otherwise_is_found_in_every_case(case: Case):
    cut = talk(4, replica="a")
    cut.turns.pop()
    cut.has_failed, cut.broken = True, ["gone", "gone"]
    assert not found(case, d4=cut)["none fails"]
    other = talk(5, replica="b", answer="On record: b 2.")
    assert not found(case, d5=other)["same answers"] and found(case, d5=other)["none fails"]


def test_what_was_saved_must_come_back_where_there_is_a_disk():
    assert found(BY_NAME["killed, disk"])["saved sessions go on"]
    lost = {f"d{number}": talk(number, replica="a", found=0) for number in (0, 2)}
    assert not found(BY_NAME["killed, disk"], **lost)["saved sessions go on"]
    assert "saved sessions go on" not in found(BY_NAME["killed"])


def test_what_became_of_them_is_counted():
    broken = talk(6, replica="a", found=384)  # a part block may be missing
    broken.broken = ["the stream broke off"]
    gone = outcome(
        BY_NAME["killed in turns"], d6=broken, d8=talk(8, replica="a", found=383), d1=talk(1, replica="b", found=0)
    )
    tally = Tally.of(gone, outcome(UNDISTURBED, gone=""))
    assert (tally.held, tally.reused, tally.recomputed) == (20, 19, 1)
    assert (tally.others, tally.others_reused, tally.broke_off, tally.failed) == (20, 19, 1, 0)
    assert tally.right == 1.0
    table = case_table([(gone, tally)])
    assert len(table.rows[0]) == len(table.header)
    verdict = check_table([(gone.case, check) for check in checks(gone, tally)], passed=True)
    assert all(len(row) == len(verdict.header) for row in verdict.rows)


def test_dialogues_bring_a_past_and_end_with_two_questions_that_have_answers():
    made = plans(parse_arguments(["--dialogues", "4", "--tokens", "600"]))
    assert [plan.session_id for plan in made] == ["named 0", None, "named 2", None]
    for plan in made:
        assert len(plan.texts) == 4 and all(said.accepted for said in plan.asked) and len(plan.asked) == 2
        assert plan.past[-1][0] == "assistant" or len(plan.past) <= 1
