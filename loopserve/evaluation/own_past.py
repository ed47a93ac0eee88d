"""Lets a model answer the past of a dialogue itself, densely and greedily: questions then stand over what it would really have said.

Over reference answers a model is asked about a past that somebody else wrote well. In use its own slips stay in the conversation and
are read again. Every dialogue goes on turn by turn on its own answers, several at a time. Knows no scores and no files.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from loopserve.detokenizer import Vocabulary
from loopserve.dialogue import Message, Mode, QualityContract, SamplingParams, SessionId, TurnRequest
from loopserve.engine import Engine
from loopserve.evaluation.items import Dialogue, Turn
from loopserve.evaluation.turns import Turns
from loopserve.transcripts import TokenHistory


@dataclass(slots=True)
class _Telling:
    """A dialogue on its way: which turns have an answer of the model's own by now."""

    dialogue: Dialogue
    turns: list[Turn] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.dialogue.system:
            self.messages.append(Message("system", self.dialogue.system))
        self._pass_probes()

    @property
    def is_told(self) -> bool:
        return len(self.turns) == len(self.dialogue.turns)

    def ask(self) -> list[Message]:
        """The conversation up to the next turn's own words."""
        return [*self.messages, Message("user", self.dialogue.turns[len(self.turns)].user)]

    def answered(self, text: str) -> None:
        """Go on with what the model said."""
        turn = self.dialogue.turns[len(self.turns)]
        self.messages += [Message("user", turn.user), Message("assistant", text)]
        self.turns.append(replace(turn, answer=text))
        self._pass_probes()

    def _pass_probes(self) -> None:
        while not self.is_told and self.dialogue.turns[len(self.turns)].probe:
            self.turns.append(self.dialogue.turns[len(self.turns)])


def with_own_answers(
    dialogues: Sequence[Dialogue], engine: Engine, *, concurrency: int, max_tokens: int
) -> Iterator[Dialogue]:
    """The dialogues with every answer that is told exchanged for the model's, each as soon as it is told; probes stay as they are.

    Steps the engine on the caller's thread. Raises EngineUnavailable naming the dialogue that failed.
    """
    history = TokenHistory(engine.tokenizer, Vocabulary(engine.tokenizer), max_sessions=concurrency)
    running: Turns[_Telling] = Turns(engine)
    waiting = deque(_Telling(dialogue) for dialogue in dialogues)

    def ask(telling: _Telling) -> None:
        session_id = SessionId(telling.dialogue.id)
        request = TurnRequest(
            session_id=session_id,
            prompt_ids=history.of_messages(session_id, telling.ask()).token_ids,
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
            contract=QualityContract(mode=Mode.EXACT),
        )
        running.submit(request, telling, dialogue=telling.dialogue.id)

    while waiting or running:
        while waiting and len(running) < concurrency:
            telling = waiting.popleft()
            if telling.is_told:  # nothing but probes
                yield telling.dialogue
            else:
                ask(telling)
        for telling, ended in running.step():
            telling.answered(str(engine.tokenizer.decode(list(ended.token_ids), skip_special_tokens=True)))
            if not telling.is_told:
                ask(telling)
                continue
            session_id = SessionId(telling.dialogue.id)
            history.forget(session_id)
            engine.release(session_id)
            yield replace(telling.dialogue, turns=tuple(telling.turns))
