"""The chat layer on a fake engine: token history, text, stop strings, and one end for every answer."""

import asyncio
import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from loopserve.chat import AnswerDelta, AnswerEnded, AnswerStarted, ChatEvent, ChatRequest, ChatService
from loopserve.dialogue import (
    FinishReason,
    Message,
    PositionLogprobs,
    QualityReport,
    SamplingParams,
    SessionId,
    TokenLogprob,
    TokensGenerated,
    TurnEnded,
    TurnEvent,
    TurnId,
    TurnRequest,
    TurnStarted,
    TurnUsage,
)
from loopserve.errors import EngineUnavailable, InvalidRequest
from loopserve.transcripts import TRANSCRIPTS_PER_SESSION, Mark, Transcript

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMING = CHATML.replace("m.content }}", "m.content | trim }}")
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


def spelt(text: str) -> str:
    """The text's bytes in GPT-2's alphabet, one character each."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]


def byte_level(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Bytes and a few merges, so that one text has several tokenisations."""
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("u", "s")]
    (_, middle, last), space = spelt("你"), spelt(" ")
    merges += [(middle, last), (middle + last, space)]  # the end of a character and a space in one token
    vocab = {p: i for i, p in enumerate([*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=template)


def sentencepiece(*, prepends_everywhere: bool) -> PreTrainedTokenizerFast:
    """Pieces with a space put before a text: at its start only, or (as a normalizer does it) before every part."""
    pieces = ["<unk>", *[f"<0x{b:02X}>" for b in range(256)], "▁", *"abcdefghijklmnopqrstuvwxyzINST[]/", "he", "▁w"]
    backend = Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=[("h", "e"), ("▁", "w")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    if prepends_everywhere:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=INST)


READERS = [byte_level(), byte_level(TRIMMING), *(sentencepiece(prepends_everywhere=where) for where in (True, False))]


class FakeEngine:
    """Keeps what it is asked, says what it is told, ends every turn once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
        self.tokenizer = tokenizer or byte_level()
        self.requests: list[TurnRequest] = []
        self.cancelled: list[tuple[TurnId, FinishReason]] = []
        self.refusal: Exception | None = None
        self.alive = True
        self.script: list[tuple[list[int], FinishReason]] = []  # played at once by the next branches submitted
        self._sinks: dict[TurnId, Callable[[Sequence[TurnEvent]], None]] = {}
        self._said: dict[TurnId, list[int]] = {}
        self._num_turns = 0

    def is_alive(self) -> bool:
        return self.alive

    def submit(self, request: TurnRequest, on_events: Callable[[Sequence[TurnEvent]], None]) -> tuple[TurnId, ...]:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        turn_ids = tuple(TurnId(self._num_turns + i) for i in range(request.num_branches))
        self._num_turns += len(turn_ids)
        for turn_id in turn_ids:
            self._sinks[turn_id], self._said[turn_id] = on_events, []
            if self.script:
                token_ids, reason = self.script.pop(0)
                self.start(turn_id)
                for token_id in token_ids:
                    self.say(turn_id, token_id)
                self.end(turn_id, reason)
        return turn_ids

    def cancel(self, turn_id: TurnId, *, reason: FinishReason = FinishReason.CANCELLED) -> None:
        self.cancelled.append((turn_id, reason))
        if turn_id in self._sinks:
            self.end(turn_id, reason)

    def start(self, turn_id: int) -> None:
        self._sinks[TurnId(turn_id)]([TurnStarted(TurnId(turn_id), 3, 1)])

    def say(self, turn_id: int, *token_ids: int, logprobs: tuple[PositionLogprobs, ...] = ()) -> None:
        self._said[TurnId(turn_id)] += token_ids
        self._sinks[TurnId(turn_id)]([TokensGenerated(TurnId(turn_id), token_ids, logprobs)])

    def end(self, turn_id: int, reason: FinishReason = FinishReason.STOP, *, error: str | None = None) -> None:
        said = tuple(self._said[TurnId(turn_id)])
        usage = TurnUsage(
            len(self.requests[-1].prompt_ids), 3, len(said), QualityReport(self.requests[-1].contract.mode)
        )
        self._sinks.pop(TurnId(turn_id))([TurnEnded(TurnId(turn_id), reason, usage, said, error)])

    @property
    def num_live(self) -> int:
        return len(self._sinks)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def letters(self, text: str) -> list[int]:
        """One token a byte: what the tokenizer itself would never produce for "hello"."""
        return self.tokenizer.convert_tokens_to_ids(list(spelt(text)))

    @property
    def eos(self) -> int:
        return self.tokenizer.eos_token_id


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def chat(*messages: Message, session: str = "s", **kwargs: Any) -> ChatRequest:
    return ChatRequest(SessionId(session), messages=messages, **kwargs)


async def collected(service: ChatService, request: ChatRequest) -> list[ChatEvent]:
    return [event async for item in service.stream(request) for event in item]


def answer(service: ChatService, request: ChatRequest) -> list[ChatEvent]:
    return asyncio.run(collected(service, request))


def text_of(events: Sequence[ChatEvent], index: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, AnswerDelta) and e.index == index)


def end_of(events: Sequence[ChatEvent], index: int = 0) -> AnswerEnded:
    (end,) = [e for e in events if isinstance(e, AnswerEnded) and e.index == index]
    assert [e for e in events if e.index == index][-1] is end
    return end


def prompt_ids(engine: FakeEngine, service: ChatService, request: ChatRequest) -> tuple[int, ...]:
    """What the request makes of the session's history, without adding an answer to it."""
    engine.script = [([], FinishReason.CANCELLED)] * request.num_branches
    answer(service, request)
    return engine.requests[-1].prompt_ids


# Token history


def test_the_next_turn_begins_with_every_token_of_this_one_even_where_tokenising_again_would_differ():
    engine = FakeEngine()
    service = ChatService(engine)
    generated = [*engine.letters("hello world"), engine.eos]
    engine.script = [(generated, FinishReason.STOP)]
    events = answer(service, chat(user("hello")))
    assert text_of(events) == "hello world"
    first = (*engine.requests[0].prompt_ids, *generated)
    second = prompt_ids(engine, service, chat(user("hello"), assistant("hello world"), user("more")))
    assert second[: len(first)] == first
    assert engine.tokenizer.decode(second) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhello world<|im_end|>\n"
        "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    )
    canonical = tuple(engine.ids(engine.tokenizer.decode(second)))
    assert canonical != second and canonical[: len(first)] != first


def test_history_reaches_back_over_many_turns():
    engine = FakeEngine()
    service = ChatService(engine)
    messages: list[Message] = []
    said: tuple[int, ...] = ()
    for turn in range(5):
        messages.append(user(f"hello {turn}"))
        generated = [*engine.letters(f"hello {turn}!"), engine.eos]
        engine.script = [(generated, FinishReason.STOP)]
        messages.append(assistant(text_of(answer(service, chat(*messages)))))
        assert engine.requests[-1].prompt_ids[: len(said)] == said
        said = (*engine.requests[-1].prompt_ids, *generated)


def test_an_edited_message_keeps_the_tokens_before_it():
    engine = FakeEngine()
    service = ChatService(engine)
    generated = [*engine.letters("hello"), engine.eos]
    engine.script = [(generated, FinishReason.STOP), (engine.ids("ok"), FinishReason.STOP)]
    answer(service, chat(user("a")))
    answer(service, chat(user("a"), assistant("hello"), user("old question")))
    edited = prompt_ids(engine, service, chat(user("a"), assistant("hello"), user("new question")))
    kept = (*engine.requests[0].prompt_ids, *generated)
    assert edited[: len(kept)] == kept
    assert "new question" in engine.tokenizer.decode(edited) and "old" not in engine.tokenizer.decode(edited)
    rewritten = prompt_ids(engine, service, chat(user("a"), assistant("hi hello"), user("old question")))
    assert rewritten == tuple(engine.ids(engine.tokenizer.decode(rewritten)))
    assert "hi hello" in engine.tokenizer.decode(rewritten)


def test_a_regenerated_answer_starts_from_the_same_prompt_and_both_answers_can_be_continued():
    engine = FakeEngine()
    service = ChatService(engine)
    replies = [[*engine.letters("hello"), engine.eos], [*engine.letters("hell"), engine.eos]]
    engine.script = [(reply, FinishReason.STOP) for reply in replies]
    for _ in replies:
        answer(service, chat(user("a")))
    assert engine.requests[0].prompt_ids == engine.requests[1].prompt_ids
    for text, reply in zip(("hello", "hell"), replies, strict=True):
        continued = prompt_ids(engine, service, chat(user("a"), assistant(text), user("b")))
        start = (*engine.requests[0].prompt_ids, *reply)
        assert continued[: len(start)] == start


def test_each_of_several_branches_can_be_continued():
    engine = FakeEngine()
    service = ChatService(engine)
    texts = ("hello", "hell", "hello hello")
    engine.script = [([*engine.letters(text), engine.eos], FinishReason.STOP) for text in texts]
    events = answer(service, chat(user("a"), num_branches=3))
    assert tuple(text_of(events, i) for i in range(3)) == texts
    for text in texts:
        continued = prompt_ids(engine, service, chat(user("a"), assistant(text), user("b")))
        start = (*engine.requests[0].prompt_ids, *engine.letters(text), engine.eos)
        assert continued[: len(start)] == start


def test_a_template_that_trims_answers_keeps_all_but_the_trailing_space():
    engine = FakeEngine(byte_level(TRIMMING))
    service = ChatService(engine)
    engine.script = [([*engine.letters("hello \n"), engine.eos], FinishReason.STOP)]
    answer(service, chat(user("a")))
    continued = prompt_ids(engine, service, chat(user("a"), assistant("hello \n"), user("b")))
    start = (*engine.requests[0].prompt_ids, *engine.letters("hello"), engine.eos)
    assert continued[: len(start)] == start


def test_an_answer_cut_by_max_tokens_is_reused_whole():
    engine = FakeEngine()
    service = ChatService(engine)
    engine.script = [(engine.letters("hello"), FinishReason.LENGTH)]
    answer(service, chat(user("a")))
    continued = prompt_ids(engine, service, chat(user("a"), assistant("hello"), user("b")))
    start = (*engine.requests[0].prompt_ids, *engine.letters("hello"), engine.eos)
    assert continued[: len(start)] == start


def test_an_answer_cut_by_a_stop_string_is_reused_up_to_it():
    engine = FakeEngine()
    service = ChatService(engine)
    engine.script = [(engine.letters("hello!!STOP and more"), FinishReason.LENGTH)]
    events = answer(service, chat(user("a"), stop=("STOP",)))
    assert text_of(events) == "hello!!"
    continued = prompt_ids(engine, service, chat(user("a"), assistant("hello!!"), user("b")))
    start = (*engine.requests[0].prompt_ids, *engine.letters("hello!!"), engine.eos)
    assert continued[: len(start)] == start


def test_an_answer_cut_inside_a_character_is_reused_up_to_the_last_whole_one():
    engine = FakeEngine()
    service = ChatService(engine)
    engine.script = [(engine.letters("hello") + engine.ids("🤖")[:-1], FinishReason.LENGTH)]
    assert text_of(answer(service, chat(user("a")))) == "hello�"
    continued = prompt_ids(engine, service, chat(user("a"), assistant("hello�"), user("b")))
    start = (*engine.requests[0].prompt_ids, *engine.letters("hello"))
    assert continued[: len(start)] == start
    assert "hello�<|im_end|>" in engine.tokenizer.decode(continued)


def test_no_mark_falls_inside_a_character_that_a_token_shares_with_trailing_space():
    engine = FakeEngine(byte_level(TRIMMING))
    service = ChatService(engine)
    first, middle, last = spelt("你")
    said = engine.tokenizer.convert_tokens_to_ids([*spelt("hello"), first, middle + last + spelt(" ")])
    engine.script = [(said, FinishReason.STOP)]
    assert text_of(answer(service, chat(user("a")))) == "hello你 "
    continued = prompt_ids(engine, service, chat(user("a"), assistant("hello你 "), user("b")))
    start = (*engine.requests[0].prompt_ids, *engine.letters("hello"))
    assert continued[: len(start)] == start
    assert "hello你<|im_end|>" in engine.tokenizer.decode(continued)


def test_sessions_do_not_see_each_other_and_can_be_forgotten():
    engine = FakeEngine()
    service = ChatService(engine)
    engine.script = [(engine.letters("hello"), FinishReason.STOP)]
    answer(service, chat(user("a")))
    again = (user("a"), assistant("hello"), user("b"))
    own = prompt_ids(engine, service, chat(*again))
    foreign = prompt_ids(engine, service, chat(*again, session="other"))
    assert own != foreign == tuple(engine.ids(engine.tokenizer.decode(own)))
    service.forget(SessionId("s"))
    service.forget(SessionId("never seen"))
    assert prompt_ids(engine, service, chat(*again)) == foreign


def test_a_session_that_moves_keeps_its_own_tokens_in_its_new_place():
    engine, other = FakeEngine(), FakeEngine()
    service, new = ChatService(engine), ChatService(other)
    generated = [*engine.letters("hello"), engine.eos]  # not as a tokenizer would write it
    engine.script = [(generated, FinishReason.STOP)]
    answer(service, chat(user("what")))
    again = (user("what"), assistant("hello"), user("more"))
    without = prompt_ids(other, new, chat(*again, session="not moved"))
    new.adopt(SessionId("s"), service.export(SessionId("s")))
    assert service.export(SessionId("s")) and new.export(SessionId("s")) == service.export(SessionId("s"))
    moved = prompt_ids(other, new, chat(*again))
    start = (*engine.requests[0].prompt_ids, *generated)
    assert moved[: len(start)] == start != without[: len(start)]
    assert service.export(SessionId("unknown")) == ()


def test_what_was_said_since_a_move_began_counts_before_what_came_with_it():
    engine, other = FakeEngine(), FakeEngine()
    service, new = ChatService(engine), ChatService(other)
    here = [*engine.ids("hello"), engine.eos]
    assert here[:-1] != engine.letters("hello")
    for one, said in ((engine, [*engine.letters("hello"), engine.eos]), (other, here)):
        one.script = [(said, FinishReason.STOP)]
        answer(service if one is engine else new, chat(user("what")))
    own = new.export(SessionId("s"))
    new.adopt(SessionId("s"), service.export(SessionId("s")))
    assert new.export(SessionId("s"))[: len(own)] == own
    new.adopt(SessionId("s"), service.export(SessionId("s")))
    assert len(new.export(SessionId("s"))) == len(own) + 1, "twice the same is kept once"
    again = prompt_ids(other, new, chat(user("what"), assistant("hello"), user("more")))
    start = (*other.requests[0].prompt_ids, *here)
    assert again[: len(start)] == start


def test_ids_that_the_tokenizer_does_not_have_are_not_adopted():
    engine = FakeEngine()
    service = ChatService(engine)
    mark = Mark(1, 2, bytes(16))
    service.adopt(SessionId("s"), [Transcript(array("I", [5, len(engine.tokenizer)]), (mark,))])
    assert service.export(SessionId("s")) == ()
    service.adopt(SessionId("s"), [Transcript(array("I", [5, len(engine.tokenizer) - 1]), (mark,))])
    assert len(service.export(SessionId("s"))) == 1


def test_adopted_histories_are_bounded_like_all_others():
    service = ChatService(FakeEngine(), max_transcripts=2)
    many = [Transcript(array("I", [n]), (Mark(n, 1, bytes(16)),)) for n in range(20)]
    for name in "abc":
        service.adopt(SessionId(name), many)
    assert [len(service.export(SessionId(name))) for name in "abc"] == [
        0,
        TRANSCRIPTS_PER_SESSION,
        TRANSCRIPTS_PER_SESSION,
    ]
    assert service.export(SessionId("c")) == tuple(many[:TRANSCRIPTS_PER_SESSION])


def test_the_least_recently_used_session_is_forgotten_first():
    engine = FakeEngine()
    service = ChatService(engine, max_transcripts=2)
    for session in ("old", "kept", "new"):
        engine.script = [(engine.letters("hello"), FinishReason.STOP)]
        answer(service, chat(user("a"), session=session))
    again = (user("a"), assistant("hello"), user("b"))
    kept = prompt_ids(engine, service, chat(*again, session="kept"))
    assert kept != prompt_ids(engine, service, chat(*again, session="old"))


def test_a_long_conversation_is_prepared_beside_the_event_loop_and_alike():
    engine = FakeEngine()
    service = ChatService(engine)
    engine.script = [([*engine.letters("hello"), engine.eos], FinishReason.STOP)]
    answer(service, chat(user("hello " * 5000)))
    continued = prompt_ids(engine, service, chat(user("hello " * 5000), assistant("hello"), user("b")))
    start = (*engine.requests[0].prompt_ids, *engine.letters("hello"), engine.eos)
    assert continued[: len(start)] == start


@pytest.mark.parametrize("prepends_everywhere", [True, False])
def test_a_tokenizer_that_puts_a_space_before_texts_never_gets_a_wrong_one(prepends_everywhere: bool):
    engine = FakeEngine(sentencepiece(prepends_everywhere=prepends_everywhere))
    service = ChatService(engine)
    messages = [user("what"), assistant("he"), user("who we")]
    engine.script = [([*engine.ids("he"), engine.eos], FinishReason.STOP)]
    answer(service, chat(*messages[:1]))
    rendered = engine.tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages], tokenize=False
    )
    second = prompt_ids(engine, service, chat(*messages))
    assert engine.tokenizer.decode(second) == engine.tokenizer.decode(engine.ids(rendered))


def test_behind_a_special_token_such_a_tokenizer_continues_its_own_tokens():
    engine = FakeEngine(sentencepiece(prepends_everywhere=False))
    service = ChatService(engine)
    generated = [*engine.tokenizer.convert_tokens_to_ids(["▁", "h", "e"]), engine.eos]
    engine.script = [(generated, FinishReason.STOP)]
    assert text_of(answer(service, chat(user("what")))) == "he"
    start = (*engine.requests[0].prompt_ids, *generated)
    second = prompt_ids(engine, service, chat(user("what"), assistant("he"), user("who we")))
    assert second[: len(start)] == start
    assert second != tuple(engine.ids("[INST] what [/INST] he<|im_end|>[INST] who we [/INST]"))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_whatever_was_said_and_edited_the_prompt_reads_as_the_template_renders_it(data: st.DataObject):
    tokenizer = data.draw(st.sampled_from(READERS))
    engine = FakeEngine(tokenizer)
    service = ChatService(engine)
    messages: list[Message] = []
    for _ in range(data.draw(st.integers(1, 4))):
        messages.append(user(data.draw(st.text("hel ow\n🤖é", min_size=1, max_size=6))))
        said = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=8))
        engine.script = [(said, data.draw(st.sampled_from([FinishReason.STOP, FinishReason.LENGTH])))]
        events = answer(service, chat(*messages, stop=tuple(data.draw(st.sampled_from([(), ("l",), ("o ", "he")])))))
        rendered = tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages], tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(engine.requests[-1].prompt_ids) == tokenizer.decode(engine.ids(rendered))
        shown = text_of(events)
        messages.append(assistant(data.draw(st.sampled_from([shown, shown + "he", shown[1:], shown.strip(), "hello"]))))


# Prompts and refusals


def test_text_and_ids_are_taken_without_a_template():
    engine = FakeEngine(byte_level(template=None))
    service = ChatService(engine)
    engine.script = [([*engine.letters(" hello")], FinishReason.LENGTH)]
    assert text_of(answer(service, ChatRequest(SessionId("s"), prompt="say"))) == " hello"
    assert engine.requests[0].prompt_ids == tuple(engine.ids("say"))
    more = prompt_ids(engine, service, ChatRequest(SessionId("s"), prompt="say hello again"))
    assert more[: len("say hello")] == (*engine.ids("say"), *engine.letters(" hello"))
    assert prompt_ids(engine, service, ChatRequest(SessionId("s"), prompt=(5, 6, 7))) == (5, 6, 7)


@pytest.mark.parametrize(
    ("tokenizer", "request_", "words"),
    [
        (byte_level(None), chat(user("a")), "/v1/completions"),
        (byte_level(ALTERNATING), chat(user("a"), user("b")), "roles must alternate"),
        (byte_level(), chat(), "at least one"),
        (byte_level(), ChatRequest(SessionId("s")), "either messages or a prompt"),
        (byte_level(), chat(user("a"), prompt="b"), "either messages or a prompt"),
        (byte_level(), chat(user("a"), stop=("",)), "must not be empty"),
        (byte_level(), chat(user("\ud800")), "not valid Unicode"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_anything_is_submitted(
    tokenizer: PreTrainedTokenizerFast, request_: ChatRequest, words: str
):
    engine = FakeEngine(tokenizer)
    with pytest.raises(InvalidRequest, match=words):
        answer(ChatService(engine), request_)
    assert engine.requests == []


def test_the_engines_refusal_comes_before_the_first_item():
    engine = FakeEngine()
    engine.refusal = EngineUnavailable("draining")
    with pytest.raises(EngineUnavailable):
        answer(ChatService(engine), chat(user("a")))


# Text, stop strings, log-probabilities


async def opened(service: ChatService, request: ChatRequest, engine: FakeEngine) -> tuple[Any, asyncio.Task[Any]]:
    """A stream that waits for its first item, its turns submitted."""
    stream = service.stream(request)
    first = asyncio.ensure_future(anext(stream))
    while not engine.num_live:
        await asyncio.sleep(0)
    return stream, first


def test_what_waits_together_leaves_together_and_characters_leave_whole():
    async def run() -> None:
        engine = FakeEngine()
        stream, first = await opened(ChatService(engine), chat(user("a")), engine)
        engine.start(0)
        assert await first == (AnswerStarted(0, len(engine.requests[0].prompt_ids), 3, 1),)
        robot = engine.ids("🤖")
        engine.say(0, *engine.ids("hello"), robot[0])
        engine.say(0, robot[1])
        assert await anext(stream) == (AnswerDelta(0, "hello", 3),)
        engine.say(0, robot[2])
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        engine.say(0, robot[3], engine.eos)
        assert await waiting == (AnswerDelta(0, "🤖", 3),)
        engine.end(0)
        (end,) = await anext(stream)
        assert isinstance(end, AnswerEnded) and end.reason is FinishReason.STOP and end.error is None
        assert await anext(stream, None) is None
        assert engine.cancelled == []

    asyncio.run(run())


def test_a_stop_string_over_several_tokens_ends_the_turn_at_its_last():
    async def run() -> None:
        engine = FakeEngine()
        stream, first = await opened(ChatService(engine), chat(user("a"), stop=("\nus:", "never")), engine)
        engine.start(0)
        await first
        engine.say(0, *engine.ids("hello"))
        assert await anext(stream) == (AnswerDelta(0, "hello", 1),)
        engine.say(0, *engine.letters("\nu"))
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        engine.say(0, *engine.letters("s:never more"))
        (end,) = await waiting
        assert engine.cancelled == [(0, FinishReason.STOP)]
        assert isinstance(end, AnswerEnded) and end.reason is FinishReason.STOP
        assert end.usage.completion_tokens == 5
        assert end.usage.cached_tokens == 3
        assert await anext(stream, None) is None

    asyncio.run(run())


def test_held_back_text_comes_when_it_turns_out_not_to_be_a_stop():
    engine = FakeEngine()
    engine.script = [(engine.letters("hello\nu"), FinishReason.LENGTH)]
    events = answer(ChatService(engine), chat(user("a"), stop=("\nuser",)))
    assert text_of(events) == "hello\nu"
    assert end_of(events).reason is FinishReason.LENGTH and engine.cancelled == []


def test_a_stop_string_completed_by_the_last_token_turns_length_into_stop():
    engine = FakeEngine()
    engine.script = [(engine.letters("hello!"), FinishReason.LENGTH)]
    events = answer(ChatService(engine), chat(user("a"), stop=("o!",)))
    assert text_of(events) == "hell"
    assert end_of(events).reason is FinishReason.STOP


def test_logprobs_carry_exact_bytes_and_leave_with_their_text():
    engine = FakeEngine()
    robot, hello, eos = engine.ids("🤖"), engine.ids("hello")[0], engine.eos
    service = ChatService(engine)

    def position(token_id: int) -> PositionLogprobs:
        return PositionLogprobs(TokenLogprob(token_id, -0.5), (TokenLogprob(token_id, -0.5), TokenLogprob(eos, -2.0)))

    async def run() -> list[ChatEvent]:
        request = chat(user("a"), sampling=SamplingParams(top_logprobs=2), stop=("XY",))
        stream, first = await opened(service, request, engine)
        engine.start(0)
        said = [hello, *robot, *engine.letters("XY")]
        engine.say(0, *said, logprobs=tuple(position(token_id) for token_id in said))
        return [*await first, *[event async for item in stream for event in item]]

    events = asyncio.run(run())
    tokens = [t for event in events if isinstance(event, AnswerDelta) for t in event.logprobs]
    assert [t.token_bytes for t in tokens] == [b"hello", *(bytes([b]) for b in "🤖".encode())]
    assert tokens[0].token == "hello" and tokens[1].token == "�" and tokens[0].logprob == -0.5
    assert [t.token for t in tokens[0].top] == ["hello", "<|im_end|>"]
    assert text_of(events) == "hello🤖"


# Ends


def test_branches_interleave_and_end_once_each():
    async def run() -> list[ChatEvent]:
        engine = FakeEngine()
        stream, first = await opened(ChatService(engine), chat(user("a"), num_branches=3, stop=("!",)), engine)
        for turn_id in range(3):
            engine.start(turn_id)
        events = list(await first)
        for letter in "hello!":
            for turn_id in range(3):
                if turn_id != 2 or letter != "!":
                    engine.say(turn_id, *engine.letters(letter))
            events += await anext(stream)
        engine.say(2, engine.eos)
        engine.end(2)
        return events + [event async for item in stream for event in item]

    events = asyncio.run(run())
    for index in range(3):
        assert text_of(events, index) == "hello"
        assert end_of(events, index).usage.completion_tokens == 6


def test_closing_the_stream_cancels_every_branch_and_keeps_what_was_said():
    async def run() -> None:
        engine = FakeEngine()
        service = ChatService(engine)
        stream, first = await opened(service, chat(user("a"), num_branches=2), engine)
        engine.start(0)
        await first
        engine.say(0, *engine.letters("hello"))
        await anext(stream)
        await stream.aclose()
        assert engine.cancelled == [(0, FinishReason.CANCELLED), (1, FinishReason.CANCELLED)]
        assert engine.num_live == 0
        engine.script = [([], FinishReason.CANCELLED)]
        await collected(service, chat(user("a"), assistant("hello"), user("b")))
        start = (*engine.requests[0].prompt_ids, *engine.letters("hello"))
        assert engine.requests[1].prompt_ids[: len(start)] == start

    asyncio.run(run())


def test_a_cancelled_consumer_cancels_its_turn():
    async def run() -> None:
        engine = FakeEngine()
        _stream, first = await opened(ChatService(engine), chat(user("a")), engine)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert engine.cancelled == [(0, FinishReason.CANCELLED)]

    asyncio.run(run())


def test_an_engine_error_is_the_end_of_its_branch_after_the_text_so_far():
    async def run() -> list[ChatEvent]:
        engine = FakeEngine()
        stream, first = await opened(ChatService(engine), chat(user("a"), num_branches=2, stop=("lo there",)), engine)
        engine.say(0, *engine.letters("hello"))
        engine.end(0, FinishReason.ERROR, error="out of memory")
        engine.say(1, engine.eos)
        engine.end(1)
        return [*await first, *[event async for item in stream for event in item]]

    events = asyncio.run(run())
    assert text_of(events) == "hello"
    assert end_of(events).reason is FinishReason.ERROR and end_of(events).error == "out of memory"
    assert end_of(events, 1).reason is FinishReason.STOP and end_of(events, 1).error is None


def test_a_turn_that_never_started_still_ends():
    engine = FakeEngine()

    async def run() -> list[ChatEvent]:
        stream, first = await opened(ChatService(engine), chat(user("a")), engine)
        engine.end(0, FinishReason.CANCELLED)
        return [*await first, *[event async for item in stream for event in item]]

    (end,) = asyncio.run(run())
    assert isinstance(end, AnswerEnded) and end.reason is FinishReason.CANCELLED


def test_a_dead_engine_ends_every_branch_with_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("loopserve.chat._ALIVE_CHECK_S", 0.01)

    async def run() -> list[ChatEvent]:
        engine = FakeEngine()
        stream, first = await opened(ChatService(engine), chat(user("a"), num_branches=2), engine)
        engine.start(0)
        engine.say(0, *engine.letters("he"))
        events = list(await first)
        engine.alive = False
        return events + [event async for item in stream for event in item]

    events = asyncio.run(run())
    assert [end_of(events, i).reason for i in range(2)] == [FinishReason.ERROR] * 2
    assert end_of(events).usage.completion_tokens == 2
    assert "died" in (end_of(events).error or "")


def test_events_after_the_loop_is_closed_are_dropped():
    engine = FakeEngine()
    loop = asyncio.new_event_loop()
    kept_from_the_collector = loop.run_until_complete(opened(ChatService(engine), chat(user("a")), engine))
    loop.close()
    engine.start(0)
    engine.end(0)
    assert not kept_from_the_collector[1].done()


def test_an_engine_on_its_own_thread_is_heard_in_order():
    engine = FakeEngine()
    text = "hello world " * 50

    async def run() -> list[ChatEvent]:
        stream, first = await opened(ChatService(engine), chat(user("a")), engine)

        def speak() -> None:
            engine.start(0)
            for token_id in engine.letters(text):
                engine.say(0, token_id)
            engine.end(0, FinishReason.LENGTH)

        thread = threading.Thread(target=speak)
        thread.start()
        events = [*await first, *[event async for item in stream for event in item]]
        thread.join()
        return events

    events = asyncio.run(run())
    assert text_of(events) == text
    assert sum(e.num_tokens for e in events if isinstance(e, AnswerDelta)) == len(text)
    assert end_of(events).reason is FinishReason.LENGTH
