"""A past in the model's own answers is what a client that asks turn by turn would have got."""

from dataclasses import replace

import pytest

from loopserve.config import EngineConfig
from loopserve.dialogue import Message, Mode, QualityContract, SamplingParams, SessionId, TurnEnded, TurnRequest
from loopserve.engine import Engine
from loopserve.errors import EngineUnavailable
from loopserve.evaluation.own_past import with_own_answers

MAX_TOKENS = 6


def engine_of(loaded):
    return Engine(EngineConfig(kv_blocks=400), loaded=loaded)


def told_alone(dialogue, loaded) -> list[str]:
    """Every told answer, each from the whole conversation rendered anew, by an engine that saw nothing before."""
    messages, answers = [Message("system", dialogue.system)], []
    for turn in dialogue.turns:
        if turn.probe:
            continue
        messages.append(Message("user", turn.user))
        rendered = [{"role": message.role, "content": message.content} for message in messages]
        prompt = loaded.tokenizer.apply_chat_template(rendered, tokenize=False, add_generation_prompt=True)
        engine, events = engine_of(loaded), []
        engine.submit(
            TurnRequest(
                session_id=SessionId("alone"),
                prompt_ids=tuple(loaded.tokenizer.encode(prompt, add_special_tokens=False)),
                sampling=SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0),
                contract=QualityContract(mode=Mode.EXACT),
            ),
            events.extend,
        )
        while engine.step():
            pass
        (ended,) = [event for event in events if isinstance(event, TurnEnded)]
        answers.append(loaded.tokenizer.decode(list(ended.token_ids), skip_special_tokens=True))
        messages.append(Message("assistant", answers[-1]))
    return answers


@pytest.mark.parametrize("concurrency", [1, 2])
def test_every_told_answer_is_the_models_own_and_probes_stay(loaded, dialogues, concurrency):
    told = with_own_answers(dialogues, engine_of(loaded), concurrency=concurrency, max_tokens=MAX_TOKENS)
    for before, after in zip(dialogues, sorted(told, key=lambda d: d.id), strict=True):
        assert [turn.answer for turn in after.turns if not turn.probe] == told_alone(before, loaded)
        assert [turn for turn in after.turns if turn.probe] == [turn for turn in before.turns if turn.probe]
        assert [replace(turn, answer="") for turn in after.turns] == [replace(turn, answer="") for turn in before.turns]


def test_a_failure_names_its_dialogue(loaded, dialogues):
    hasty = Engine(EngineConfig(kv_blocks=400, max_queue_s=1e-9), loaded=loaded)
    with pytest.raises(EngineUnavailable, match="dialogue first: The turn waited 0 s"):
        list(with_own_answers(dialogues, hasty, concurrency=1, max_tokens=MAX_TOKENS))


def test_a_dialogue_of_probes_alone_is_told_as_it_is(loaded, dialogues):
    probes = replace(dialogues[0], turns=tuple(turn for turn in dialogues[0].turns if turn.probe))
    told = with_own_answers([probes, dialogues[1]], engine_of(loaded), concurrency=2, max_tokens=MAX_TOKENS)
    assert {d.id: len(d.turns) for d in told} == {"first": len(probes.turns), "second": len(dialogues[1].turns)}
