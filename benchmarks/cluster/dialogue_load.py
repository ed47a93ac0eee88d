"""Many dialogues at once over plain OpenAI chat completions: what is said in them, how they are driven, what was seen of every turn.

An ordinary client: it sends the whole conversation and reads server-sent events and two response headers. Knows nothing about how the
service was started, nor what is concluded from a turn.

    rounds      a place is held for one turn: all first turns, then all second ones ...; a dialogue waits for all others between its turns
    dialogues   a place is held for a whole dialogue: every next turn follows its answer at once
"""

import asyncio
import json
import random
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import httpx

CountTokens = Callable[[str], int]

CONNECT_S_MAX, SILENCE_S_MAX = 10.0, 300.0
_SYSTEM_TOKENS = 24
_VOCABULARY = (
    "the a this that every some one two morning evening river bridge market garden window letter kitchen teacher doctor "
    "neighbour train station winter summer mountain harbour paper bread apple coffee table chair road field forest clock "
    "music story picture colour number question answer reason moment minute hour week year walks carries opens closes "
    "remembers follows paints writes reads sells buys builds leaves finds keeps turns near behind under over before after "
    "between without slowly quickly quietly always never often again small large old new bright dark warm cold long short"
)
_WORDS = tuple(_VOCABULARY.split())


class Pace(StrEnum):
    """When a dialogue goes on after an answer."""

    ROUNDS = "rounds"
    DIALOGUES = "dialogues"


class TurnFailed(Exception):
    """A turn was refused or broke off; a run with such a turn proves nothing."""


@dataclass(frozen=True, slots=True)
class Load:
    """Size and manner of a run.

    Reuse saves the earlier rows, not the reading of earlier columns: a new row's attention still grows with the conversation. In the
    shipped model (4 layers, 192 wide) that is half of a row's work at 800 tokens of context already, which in larger models takes tens
    of thousands. CPU time to the first token in the engine alone, turn 8 over turn 2 (one 2.8 GHz core): 120 tokens a turn 27/18 ms
    with reuse and 125/26 ms without, 250 tokens a turn 55/29 ms and 346/53 ms.
    """

    num_dialogues: int = 50
    num_turns: int = 8
    turn_tokens: int = 120  # new user text of a turn, equally long but for the last word
    answer_tokens: int = 8
    num_common_opening: int = 6  # of the dialogues: they share the system message and the first user message
    concurrency: int = 4
    pace: Pace = Pace.ROUNDS
    mode: str = ""  # `loopserve.mode` of every request; empty: a plain OpenAI request
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_dialogues, self.turn_tokens, self.answer_tokens, self.concurrency) < 1 or self.num_turns < 2:
            raise ValueError("a load has at least one dialogue of two turns, one token a message and one place")
        if not 0 <= self.num_common_opening <= self.num_dialogues:
            raise ValueError("the dialogues with a common opening are a part of all dialogues")


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What one client will say."""

    name: str
    session_id: str | None  # sent as `x-session-id`; None: no header at all
    system: str
    user_texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SaidBy:
    """Whose turn it is."""

    dialogue: str
    session_id: str | None  # sent as `x-session-id`; None: no header at all
    number: int  # 1, 2, ...


@dataclass(frozen=True, slots=True)
class Turn:
    """What a client saw of one turn."""

    dialogue: str
    number: int  # 1, 2, ...
    replica: str
    session_name: str
    first_token_s: float  # from sending the request to the first text
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    rectified_tokens: int
    answer: str


def made_dialogues(load: Load, count_tokens: CountTokens) -> tuple[Dialogue, ...]:
    """The dialogues of a run, the same for the same seed. Every second one names its session; openings differ but for the common ones."""
    common = _said(random.Random(f"{load.seed}/common"), load, count_tokens, num_turns=1)
    dialogues = []
    for index in range(load.num_dialogues):
        system, texts = _said(random.Random(f"{load.seed}/{index}"), load, count_tokens, num_turns=load.num_turns)
        if index < load.num_common_opening:
            system, texts = common[0], (*common[1], *texts[1:])
        name = f"dialogue-{index:03d}"
        dialogues.append(Dialogue(name, f"named-{load.seed}-{index}" if index % 2 == 0 else None, system, texts))
    return tuple(dialogues)


async def drive(
    url: str, model: str, dialogues: Sequence[Dialogue], *, load: Load, on_turn: Callable[[Turn], None]
) -> tuple[Turn, ...]:
    """Hold all dialogues, at most `load.concurrency` requests at once. Raises TurnFailed at the first turn that is not answered."""
    gate = asyncio.Semaphore(load.concurrency)  # first come, first served: that is what makes rounds
    timeout = httpx.Timeout(SILENCE_S_MAX, connect=CONNECT_S_MAX)
    try:
        async with (
            httpx.AsyncClient(base_url=url, timeout=timeout, trust_env=False) as http,
            asyncio.TaskGroup() as group,
        ):
            held = [group.create_task(_hold(http, model, d, load=load, gate=gate, on_turn=on_turn)) for d in dialogues]
    except* TurnFailed as failures:
        raise TurnFailed(str(failures.exceptions[0])) from None
    return tuple(turn for task in held for turn in task.result())


def _said(rng: random.Random, load: Load, count_tokens: CountTokens, *, num_turns: int) -> tuple[str, tuple[str, ...]]:
    system = plain_text(rng, _SYSTEM_TOKENS, count_tokens)
    return system, tuple(plain_text(rng, load.turn_tokens, count_tokens) for _ in range(num_turns))


def plain_text(rng: random.Random, num_tokens: int, count_tokens: CountTokens) -> str:
    """Random sentences of as many whole words as fit into `num_tokens`, at least one word."""
    words: list[str] = []
    while len(words) < num_tokens:  # a word is at least one token
        sentence = rng.choices(_WORDS, k=rng.randint(5, 11))
        words += [sentence[0].capitalize(), *sentence[1:-1], f"{sentence[-1]}."]
    fitting = bisect_right(range(len(words)), num_tokens, key=lambda count: count_tokens(" ".join(words[: count + 1])))
    return " ".join(words[: max(fitting, 1)])


async def _hold(
    http: httpx.AsyncClient,
    model: str,
    dialogue: Dialogue,
    *,
    load: Load,
    gate: asyncio.Semaphore,
    on_turn: Callable[[Turn], None],
) -> list[Turn]:
    """All turns of one dialogue, in order."""
    messages = [{"role": "system", "content": dialogue.system}]
    turns: list[Turn] = []
    while len(turns) < load.num_turns:
        async with gate:
            for _ in range(load.num_turns if load.pace is Pace.DIALOGUES else 1):
                messages.append({"role": "user", "content": dialogue.user_texts[len(turns)]})
                said = SaidBy(dialogue.name, dialogue.session_id, len(turns) + 1)
                turns.append(
                    await answered(
                        http, body_of(model, messages, answer_tokens=load.answer_tokens, mode=load.mode), said
                    )
                )
                messages.append({"role": "assistant", "content": turns[-1].answer})
                on_turn(turns[-1])
    return turns


def body_of(model: str, messages: Sequence[dict[str, str]], *, answer_tokens: int, mode: str) -> dict[str, Any]:
    """The request of one turn, greedy and streamed; an empty `mode` asks for none."""
    return {
        "model": model,
        "messages": messages,
        "max_tokens": answer_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"loopserve": {"mode": mode}} if mode else {}),
    }


async def answered(http: httpx.AsyncClient, body: Mapping[str, Any], said: SaidBy) -> Turn:
    """One turn, sent and read to its end. Raises TurnFailed."""
    headers = {"x-session-id": said.session_id} if said.session_id else {}
    texts: list[str] = []
    first_token_s: float | None = None
    usage: dict[str, Any] | None = None
    sent_s = time.perf_counter()
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            if response.status_code != httpx.codes.OK:
                raise TurnFailed(f"{response.status_code}: {(await response.aread()).decode(errors='replace')[:500]}")
            async for chunk in _chunks(response):
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    text = choice["delta"].get("content") or ""
                    if first_token_s is None and (text or choice["finish_reason"]):  # an answer may be empty
                        first_token_s = time.perf_counter() - sent_s
                    texts.append(text)
        if first_token_s is None or usage is None:
            raise TurnFailed("the stream ended without text or usage")
        return Turn(
            dialogue=said.dialogue,
            number=said.number,
            replica=response.headers["x-loopserve-replica"],
            session_name=response.headers["x-session-id"],
            first_token_s=first_token_s,
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            rectified_tokens=usage["loopserve"]["rectified_tokens"],
            answer="".join(texts),
        )
    except (httpx.HTTPError, LookupError, TurnFailed) as error:
        raise TurnFailed(f"{said.dialogue}, turn {said.number}: {type(error).__name__} {error}") from error


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream up to `[DONE]`. Raises TurnFailed for an error event and for a stream that breaks off."""
    async for line in response.aiter_lines():
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        if data:
            chunk = json.loads(data)
            if "error" in chunk:
                raise TurnFailed(str(chunk["error"]))
            yield chunk
    raise TurnFailed("the stream broke off")
