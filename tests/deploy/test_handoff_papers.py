"""Papers of a session: read as they were written, or refused; whatever was done to their bytes."""

import struct
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.conversations import KEYS_PER_CONVERSATION, ConversationRecord
from deploy.handoff import papers as module
from deploy.handoff.papers import Papers, PapersRefused, decode_papers, encode_papers
from loopserve.dialogue import SessionId
from loopserve.transcripts import Mark, Transcript


def transcript(*token_ids: int, first: int = 0) -> Transcript:
    marks = (Mark(first, min(first, len(token_ids)), b"d" * 16), Mark(first + 9, len(token_ids), b"e" * 16))
    return Transcript(array("I", token_ids), marks)


text = st.text(st.characters(codec="utf-8"), max_size=6)
every_transcript = st.lists(st.integers(0, 2**32 - 1), max_size=5).map(lambda ids: transcript(*ids))
every_papers = st.builds(
    Papers,
    text.map(SessionId),
    st.builds(
        ConversationRecord,
        name=text,
        claim=text,
        home=text,
        last_used_s=st.floats(allow_nan=False, allow_infinity=False),
        continuations=st.lists(st.tuples(text, text), max_size=KEYS_PER_CONVERSATION).map(tuple),
    ),
    st.lists(every_transcript, max_size=3).map(tuple),
)
SOME = Papers(
    SessionId("74/s"),
    ConversationRecord("s", "claim", "home", 12.5, (("c1", "p1"), ("c2", "p2"))),
    (transcript(1, 2, 3), transcript(4)),
)


def sealed(header: bytes, ids: bytes = b"", *, version: int = 1) -> bytes:
    """Papers with a checksum that fits, whatever they say."""
    rest = header + ids
    return module._HEAD.pack(b"LSHP", version, module._digest(len(header), rest), len(header)) + rest


@given(every_papers)
def test_papers_are_read_as_they_were_written(papers: Papers):
    assert decode_papers(encode_papers(papers)) == papers


@settings(max_examples=300)
@given(st.data())
def test_any_other_bytes_are_refused(data):
    whole = encode_papers(SOME)
    changed = bytearray(whole)
    kind = data.draw(st.sampled_from(["flip", "cut", "more", "random"]))
    if kind == "flip":
        changed[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        changed = changed[: data.draw(st.integers(0, len(whole) - 1))]
    elif kind == "more":
        changed += data.draw(st.binary(min_size=1, max_size=9))
    else:
        changed = bytearray(data.draw(st.binary(max_size=60)))
    with pytest.raises(PapersRefused):
        decode_papers(bytes(changed))


@settings(max_examples=200)
@given(st.binary(max_size=80), st.binary(max_size=12))
def test_a_checksum_that_fits_makes_no_nonsense_true(header: bytes, ids: bytes):
    with pytest.raises(PapersRefused):
        decode_papers(sealed(header, ids))


def changed_header(old: bytes, new: bytes) -> bytes:
    whole = encode_papers(SOME)
    (length,) = struct.unpack_from("<I", whole, module._HEAD.size - 4)
    header, ids = whole[module._HEAD.size :][:length], whole[module._HEAD.size + length :]
    assert old in header
    return sealed(header.replace(old, new, 1), ids)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b'"name":"s"', b'"name":7', "string"),
        (b'"name":"s"', b'"name":"s","more":1', "[Ee]xtra"),
        (b'"last_used_s":12.5', b'"last_used_s":NaN', "cannot be read"),
        (b'"num_tokens":3', b'"num_tokens":-3', "greater"),
        (b'"num_tokens":3', b'"num_tokens":2', "announced"),
        (b"[9,3,", b"[9,2,", "last mark"),
        (b"[0,0,", b"[99,0,", "ascend"),
        (b"64646464646464646464646464646464", b"6464", "16 bytes"),
        (b"64646464646464646464646464646464", b"646464646464646464646464646464646", "hexadecimal"),
        (b'[["c1","p1"],', b'[["c1","p1"],' + b'["c","p"],' * KEYS_PER_CONVERSATION, "at most"),
    ],
)
def test_what_no_session_can_be_is_refused_and_said(old: bytes, new: bytes, said: str):
    with pytest.raises(PapersRefused, match=said) as refused:
        decode_papers(changed_header(old, new))
    assert refused.value.code == "corrupt"


def test_papers_of_another_release_and_of_something_else_are_told_apart():
    with pytest.raises(PapersRefused) as refused:
        decode_papers(sealed(b"{}", version=2))
    assert refused.value.code == "version"
    with pytest.raises(PapersRefused) as refused:
        decode_papers(b"GIF89a" + bytes(40))
    assert refused.value.code == "foreign"


def test_older_transcripts_are_left_out_where_all_would_be_too_much(monkeypatch: pytest.MonkeyPatch):
    newest, older = transcript(*range(40)), transcript(*range(900))
    monkeypatch.setattr(module, "PAPERS_BYTES_MAX", 1500)
    kept = decode_papers(encode_papers(Papers(SOME.session_id, SOME.conversation, (newest, older))))
    assert kept.transcripts == (newest,)
