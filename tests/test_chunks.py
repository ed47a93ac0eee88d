"""Streams as servers send them: every way to cut them into reads, and what is no stream."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopserve.chunks import EVENT_BYTES_MAX, Chunk, EventReader, read_chunk, told_error
from loopserve.errors import EngineUnavailable


def payloads(*reads: bytes) -> list[str]:
    """What a reader makes of a response that comes in these reads."""
    reader = EventReader()
    return [payload for data in reads for payload in reader.feed(data)] + list(reader.end())


def test_events_are_joined_over_lines_and_comments_are_skipped() -> None:
    stream = b": ping\ndata: a\n\nevent: x\ndata:b\ndata: c\n\n\ndata: d"
    assert payloads(stream) == ["a", "b\nc", "d"]
    assert payloads(stream.replace(b"\n", b"\r\n")) == ["a", "b\nc", "d"]


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]))), st.data())
def test_no_cut_into_reads_changes_the_events(texts: list[str], data: st.DataObject) -> None:
    stream = b"".join(b"data: " + text.encode() + b"\n\n" for text in texts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)))))
    assert payloads(*(stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True))) == texts


def test_separators_of_unicode_inside_an_answer_end_no_line() -> None:
    text = "one\u2028two\u0085three\x0bfour"
    chunk = json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=False)
    assert [read_chunk(payload).text for payload in payloads(b"data: " + chunk.encode() + b"\n\n")] == [text]


def test_an_event_without_end_is_not_collected_for_ever() -> None:
    with pytest.raises(EngineUnavailable, match="an event of more than"):
        payloads(b"data: " + b"x" * EVENT_BYTES_MAX)


def test_what_is_no_utf8_is_refused() -> None:
    with pytest.raises(EngineUnavailable, match="not UTF-8"):
        payloads(b"data: \xff\n\n")


def test_a_chunk_tells_text_reasoning_reason_and_usage() -> None:
    usage = {"prompt_tokens": 4, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}
    choice = {"delta": {"content": "a", "reasoning_content": "b"}, "finish_reason": "stop"}
    chunk = read_chunk(json.dumps({"choices": [choice], "usage": usage}))
    assert (chunk.text, chunk.reasoning, chunk.finish_reason) == ("a", "b", "stop")
    assert chunk.usage is not None
    assert chunk.usage.cached_tokens == 3


@pytest.mark.parametrize("details", [None, {}, {"audio_tokens": 0}])
def test_a_server_that_does_not_say_what_was_cached_said_nothing(details: object) -> None:
    usage = {"prompt_tokens": 4, "completion_tokens": 2, "prompt_tokens_details": details}
    chunk = read_chunk(json.dumps({"choices": [], "usage": usage}))
    assert chunk.usage is not None
    assert chunk.usage.cached_tokens is None


def test_an_error_in_the_stream_is_told() -> None:
    assert read_chunk('{"error": {"message": "replica died"}}') == Chunk(error="replica died")
    assert told_error("a page") == "a page"


@pytest.mark.parametrize("payload", ["not json", "[]", "{}", '{"choices": [{}]}', '{"choices": [], "usage": {"x": 1}}'])
def test_what_is_no_chunk_is_named(payload: str) -> None:
    with pytest.raises(EngineUnavailable, match="cannot be read"):
        read_chunk(payload)
