"""Names of conversations."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.identity import (
    PlacementHints,
    continuation_key,
    generated_session_name,
    home_key,
    home_of_name,
    known_part,
    placement_hints,
    prompt_home_key,
    session_from_headers,
    session_key,
)


@dataclass(frozen=True)
class Said:
    role: str
    content: str


def talk(*texts: str) -> list[Said]:
    """user, assistant, user, ... after a system message."""
    return [Said("system", "Be kind."), *(Said("assistant" if i % 2 else "user", t) for i, t in enumerate(texts))]


messages = st.lists(
    st.builds(Said, st.sampled_from(["system", "user", "assistant", "tool"]), st.text(max_size=8)), max_size=6
)


def test_home_stays_while_the_dialogue_grows():
    home = home_key("t", talk("hello"))
    assert home == home_key("t", talk("hello", "hi", "and now?")) == home_key("t", talk("hello", "other", "way"))
    assert home != home_key("t", talk("good day"))
    assert home != home_key("t2", talk("hello"))
    assert home != home_key("t", [Said("user", "hello")])


def test_next_request_brings_back_the_key_of_the_turn_that_was_answered():
    answered = continuation_key("t", [*talk("hello"), Said("assistant", "hi, I am here.\n")])
    next_request = talk("hello", "hi, I am here.", "what else?")
    assert continuation_key("t", known_part(next_request)) == answered


def test_a_first_turn_knows_no_past():
    assert list(known_part(talk("hello"))) == []


@given(messages, messages)
def test_two_conversations_share_a_key_only_when_they_are_equal(a: Sequence[Said], b: Sequence[Said]):
    def plain(said: Sequence[Said]) -> list[tuple[str, str]]:
        return [(m.role, m.content.strip()) for m in said]

    assert (continuation_key("", a) == continuation_key("", b)) == (plain(a) == plain(b))


def test_moving_text_over_a_message_boundary_changes_the_key():
    assert continuation_key("", [Said("user", "ab"), Said("user", "c")]) != continuation_key(
        "", [Said("user", "a"), Said("user", "bc")]
    )


def test_lone_surrogates_have_a_key():
    assert continuation_key("", [Said("user", "\ud800")])


@pytest.mark.parametrize(
    "header", ["x-session-id", "X-Session-ID", "x_session_id", "X-SESSION-AFFINITY", "x_session_affinity"]
)
def test_session_headers_are_found_in_any_spelling(header: str):
    assert session_from_headers({header: " abc "}) == "abc"


def test_headers_go_before_metadata_and_hints_never_name_a_session():
    assert session_from_headers({"x-session-id": "h"}, {"session_id": "m"}) == "h"
    assert session_from_headers({}, {"session_id": "m"}) == "m"
    assert session_from_headers({"x-user-id": "u"}, {"user": "u", "session_id": 7}) is None
    assert session_from_headers({"x-session-id": "  ", "x-session-affinity": "a"}) == "a"


@pytest.mark.parametrize("name", ["x" * 257, "snow☃", "a\tb"])
def test_names_that_cannot_travel_in_a_header_are_refused(name: str):
    with pytest.raises(ValueError, match="session name"):
        session_from_headers({}, {"session_id": name})


def test_tenants_never_share_a_session():
    assert session_key("a", "s") != session_key("b", "s")
    assert session_key("a", "bs") != session_key("ab", "s")


def test_a_generated_name_leads_back_to_the_home_it_was_made_from():
    home = home_key("t", talk("hello"))
    assert home_of_name("t", generated_session_name(home, "0123456789abcdef")) == home
    assert home_of_name("t", "conv-mine") == session_key("t", "conv-mine")


def test_user_hint_spreads_a_common_opening_and_a_cache_key_gathers_conversations():
    opening = talk("hello")
    assert home_key("t", opening, PlacementHints(user="ann")) != home_key("t", opening, PlacementHints(user="bob"))
    gathered = PlacementHints(cache_key="manual")
    assert home_key("t", opening, gathered) == home_key("t", talk("something else"), gathered)
    assert prompt_home_key("t", "a prompt", gathered) == home_key("t", opening, gathered)


def test_hints_come_from_body_then_header():
    assert placement_hints({"X-User-Id": "h"}, cache_key=None, user=None).user == "h"
    assert placement_hints({"X-User-Id": "h"}, cache_key="k", user="b") == PlacementHints(cache_key="k", user="b")


def test_prompts_with_one_long_prefix_share_a_home():
    prefix = "x" * 1024
    assert prompt_home_key("", prefix + "a") == prompt_home_key("", prefix + "b") != prompt_home_key("", "y" + prefix)
    assert prompt_home_key("", [1, 2, 3]) != prompt_home_key("", [1, 23])
