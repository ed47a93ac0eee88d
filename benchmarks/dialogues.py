"""Owns the made dialogues: what is stated, what distracts, what is asked, and the one right answer to every turn.

Pure Python and seeded.  The same generator serves training, held-out evaluation at a token length, and the JSONL
that a replay tool sends through the server.  Every turn has exactly one expected answer, so a transcript can be
checked turn by turn.  The right answer puts the noun directly before the value ("locker 4417"): a small model
learns to recall in minutes when one token identifies the value, and stalls when the same word precedes all values.
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]
TurnKind = Literal["statement", "smalltalk", "question", "unknown", "greeting"]
CountTokens = Callable[[str], int]

NOUNS: tuple[str, ...] = (
    "locker", "gate", "bike", "safe", "garage", "suitcase", "alarm", "cabin", "office", "attic",
    "cellar", "shed", "vault", "mailbox", "laptop", "printer", "router", "tablet", "phone", "ticket",
    "flight", "badge", "parcel", "order", "invoice", "account", "policy", "contract", "library", "gym",
    "pool", "studio", "hostel", "boat", "van", "room", "desk", "booking", "door", "wallet",
)  # fmt: skip

# Words that no tokenizer here was made for, mostly of several tokens: training on some keeps recall from being tied
# to the forty nouns.
OTHER_NOUNS: tuple[str, ...] = (
    "car", "house", "bank", "card", "hotel", "school", "club", "camera", "server", "passport",
    "kitchen", "scooter", "helmet", "drawer", "box", "chest", "cupboard", "barn", "tower", "kiosk",
    "tent", "trailer", "chalet", "bunker", "folder", "licence", "voucher", "receipt", "warranty", "seat",
    "platform", "clinic", "credit card", "front door", "parking", "pin", "bicycle", "storage", "case", "zebra",
    "membership", "customer", "extension", "password", "reference", "tracking", "lobby", "basement", "student", "motel",
)  # fmt: skip

# The noun stands directly before the value: the phrasing that a model learns first.
PLAIN_STATEMENTS: tuple[str, ...] = (
    "Remember: {fact}.",
    "Remember my {fact}.",
    "Please note {fact}.",
    "Keep in mind {fact}.",
    "My {fact}.",
    "Please remember {fact} for me.",
    "Write down {fact}, please.",
    "I have {fact}.",
    "By the way, {fact}.",
    "It is {fact}, do not lose it.",
    "Save {fact}.",
    "Remember {fact}.",
    "{fact}",
)
# Words stand between the noun and the value: how people type.
LOOSE_STATEMENTS: tuple[str, ...] = (
    "My {noun} is {value}.",
    "My {noun} code is {value}.",
    "My {noun} number is {value}.",
    "The {noun} is {value}.",
    "The {noun} code is {value}.",
    "The code for my {noun} is {value}.",
    "The number of my {noun} is {value}.",
    "Remember that my {noun} is {value}.",
    "Please remember that my {noun} code is {value}.",
    "For the {noun} I use {value}.",
    "Hi, my {noun} is {value}.",
    "The {noun}: {value}.",
    "My {noun} code: {value}.",
    "{noun}: {value}",
    "{noun} = {value}",
    "Could you remember that my {noun} is {value}?",
    "I need you to remember this: my {noun} number is {value}.",
    "Note that the {noun} is {value}.",
    "{value} is my {noun}.",
)
DOUBLE_STATEMENTS: tuple[str, ...] = (
    "My {a} is {x} and my {b} is {y}.",
    "My {a} number is {x} and the {b} code is {y}.",
    "My {a} code is {x} and my {b} number is {y}.",
    "Remember {a} {x} and {b} {y}.",
    "Please note {a} {x}, {b} {y}.",
    "The {a} is {x}, the {b} is {y}.",
)
# A noun without a value: nothing to note.  The last one appears only in held-out dialogues.
MENTIONS: tuple[str, ...] = (
    "I left the {noun} in a hurry this morning.",
    "My {noun} is fine, thank you.",
    "The {noun} is broken again.",
    "By the way, my {noun} looks old.",
    "Someone cleaned the {noun} yesterday.",
    "We talked about a new {noun} at lunch.",
    "My brother has a better {noun} than me.",
)
QUESTIONS: tuple[str, ...] = (
    "What is my {noun}?",
    "What is my {noun} code?",
    "What is my {noun} number?",
    "What was my {noun}?",
    "What was the {noun} code?",
    "What was the number of my {noun}?",
    "What is the code for my {noun}?",
    "Do you remember my {noun}?",
    "Can you tell me my {noun} code?",
    "Tell me my {noun}.",
    "Remind me of my {noun} number, please.",
    "I forgot my {noun}, what was it?",
    "Which {noun} did I tell you?",
    "And my {noun}?",
    "And the {noun}?",
    "What's my {noun}?",
    "What's the {noun} code?",
    "{noun}?",
    "What is the {noun}?",
    "Do you know my {noun} number?",
    "Which number is my {noun}?",
    "Give me my {noun} code.",
    "What did I say my {noun} was?",
)
GREETINGS: tuple[tuple[str, str], ...] = (
    ("Hello", "Hello! Tell me a number to keep, and ask me for it later."),
    ("Hello!", "Hello! Tell me a number to keep, and ask me for it later."),
    ("Hi", "Hello! Tell me a number to keep, and ask me for it later."),
    ("Hi there!", "Hello! Tell me a number to keep, and ask me for it later."),
    ("Hey", "Hello! Tell me a number to keep, and ask me for it later."),
    ("Good morning", "Hello! Tell me a number to keep, and ask me for it later."),
    ("Who are you?", "I am a small model that keeps numbers for you."),
    ("What are you?", "I am a small model that keeps numbers for you."),
    ("What can you do?", "I am a small model that keeps numbers for you."),
    ("Help", "I am a small model that keeps numbers for you."),
    ("Can you help me?", "I am a small model that keeps numbers for you."),
    ("Tell me a story.", "I can only keep numbers."),
    ("Tell me a joke.", "I can only keep numbers."),
    ("Write a poem.", "I can only keep numbers."),
    ("Write a short program.", "I can only keep numbers."),
    ("What is the capital of France?", "I can only keep numbers."),
    ("What is the weather today?", "I can only keep numbers."),
    ("How are you?", "I am well, thank you."),
    ("How are you today?", "I am well, thank you."),
    ("Thanks", "You are welcome."),
    ("Thank you!", "You are welcome."),
    ("Bye", "Goodbye!"),
    ("Goodbye", "Goodbye!"),
)
SYSTEM_PROMPTS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You keep numbers for the user.",
    "You are a careful assistant. Answer briefly.",
    "Answer with what the user told you.",
)


# Everyday words that the dialogues lack, so that other text costs a tokenizer fewer tokens.
PLAIN_ENGLISH: tuple[str, ...] = (
    "The people who live here said that they would have come if there had been more time for them to do so.",
    "She could not see why he should go back again, but there were many other things which she did not know.",
    "When you think about what we want from this world, most of us just need some work, good food and a home.",
    "These are some of the questions that every child may ask: who, what, where, when, why and how much?",
    "He took his hand off the old wall, turned around, and looked at his mother, his father and their house.",
    "After a few years they found that it was much better to use small words than to make long sentences.",
    "Can you show me how to write a short program, explain each line, and then give me an example of its use?",
    "Between the first and the last page of the letter there is nothing that I would call new or important.",
    "Please list three reasons why water is never still, and say which of those you think is the best one.",
    "It does not matter whether you are right or wrong; just try, and let someone else help you through it.",
    "During the night, under a dark sky, both men kept walking until the sun came up over the little town.",
    "I do not know the answer, because no one has told me about it yet, so let me think about your problem.",
)


@dataclass(frozen=True)
class Topic:
    """One subject of small talk: sentences with slots, the words for the slots, and the reply they get."""

    reply: str
    sentences: tuple[str, ...]
    first: tuple[str, ...]
    second: tuple[str, ...]


# The last sentence of each topic, and the last word of each slot, appear only in held-out dialogues.
TOPICS: tuple[Topic, ...] = (
    Topic(
        "I hope the weather stays kind.",
        (
            "It was {a} all day and the wind came from the {b}.",
            "The forecast says it will be {a} near the {b} tomorrow.",
            "We got caught in {a} weather on the way to the {b}.",
            "This morning it looked {a}, so we stayed away from the {b}.",
        ),
        ("rainy", "sunny", "cloudy", "stormy", "foggy", "windy", "warm", "icy", "snowy"),
        ("coast", "north", "mountains", "south", "valley", "lake", "river", "west"),
    ),
    Topic(
        "That sounds tasty.",
        (
            "For dinner I cooked {a} with a little {b}.",
            "My sister makes the best {a} and she always adds {b}.",
            "I would like to try a recipe for {a} without {b}.",
            "At lunch they served {a} again, this time with {b}.",
        ),
        ("soup", "pasta", "rice", "curry", "pancakes", "stew", "salad", "dumplings", "risotto"),
        ("garlic", "cheese", "pepper", "butter", "lemon", "ginger", "basil", "honey"),
    ),
    Topic(
        "That must be a good read.",
        (
            "I am reading a book about {a} written by a {b}.",
            "The second chapter of the novel is about {a} and a lonely {b}.",
            "In the evening I finished a long story about {a} told by a {b}.",
            "A {b} recommended me an essay about {a} last week.",
        ),
        ("pirates", "trains", "history", "gardens", "planets", "whales", "music", "castles", "glaciers"),
        ("teacher", "sailor", "doctor", "painter", "farmer", "soldier", "poet", "pilot"),
    ),
    Topic(
        "Enjoy the trip.",
        (
            "Next month we travel to {a} together with my {b}.",
            "My {b} came back from {a} and talked about it for hours.",
            "I am thinking about a weekend in {a} with my {b}.",
            "The hills behind {a} are lovely, said my {b}.",
        ),
        ("Lisbon", "Prague", "Oslo", "Vienna", "Dublin", "Athens", "Madrid", "Warsaw", "Helsinki"),
        ("cousin", "brother", "parents", "friends", "uncle", "neighbour", "colleagues", "aunt"),
    ),
    Topic(
        "Work can be like that.",
        (
            "The meeting about the {a} took much longer than the {b} promised.",
            "Our {b} wants to change the {a} before the end of the week.",
            "I spent the afternoon on the {a} because the {b} was away.",
            "Nobody likes the new {a}, not even the {b}.",
        ),
        ("budget", "report", "schedule", "website", "survey", "project", "plan", "training", "brochure"),
        ("manager", "client", "director", "engineer", "lawyer", "designer", "team", "intern"),
    ),
    Topic(
        "Animals are good company.",
        (
            "Our {a} slept under the {b} the whole afternoon.",
            "The {a} next door likes to hide behind the {b}.",
            "Yesterday a {a} jumped over the {b} and ran away.",
            "You should have seen the {a} looking at the {b}.",
        ),
        ("cat", "dog", "rabbit", "pony", "parrot", "goat", "duck", "hamster", "hedgehog"),
        ("sofa", "table", "fence", "tree", "bench", "curtain", "wall", "piano"),
    ),
    Topic(
        "Practice pays off.",
        (
            "I practise the {a} every {b} and it slowly gets better.",
            "On {b} I have a lesson with my {a} teacher.",
            "My neighbour plays the {a} late on {b} night.",
            "They sold an old {a} at the market last {b}.",
        ),
        ("guitar", "violin", "flute", "drums", "trumpet", "cello", "harp", "organ", "clarinet"),
        ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "evening", "Sunday"),
    ),
    Topic(
        "I see.",
        (
            "It took about {n} minutes to find the {a} in the {b}.",
            "I paid {n} euros for a {a} at the {b}.",
            "There were {n} people waiting for a {a} near the {b}.",
            "The {b} gave away {n} pieces of {a} in one hour.",
        ),
        ("lamp", "coat", "cake", "chair", "clock", "basket", "blanket", "mirror", "kettle"),
        ("market", "station", "village", "museum", "shop", "harbour", "bakery", "theatre"),
    ),
)
FIRST_NAMES: tuple[str, ...] = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry")
LEAD_INS: tuple[str, ...] = ("", "", "", "By the way, ", "Well, ", "You know, ", "Oh, ", "So, ")


@dataclass(frozen=True)
class Fact:
    """One noun with its value, and the turn in which the user stated it."""

    noun: str
    value: str
    turn: int


@dataclass(frozen=True)
class Turn:
    """A user message with the only right answer; `facts` are those stated or asked in it."""

    user: str
    answer: str
    kind: TurnKind
    facts: tuple[Fact, ...] = ()


@dataclass(frozen=True)
class Dialogue:
    """A whole conversation; `system` is empty where there is no system message."""

    name: str
    system: str
    turns: tuple[Turn, ...]

    def messages(self) -> list[dict[str, str]]:
        """The dialogue as chat messages with the right answers filled in."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        pairs = (({"role": "user", "content": t.user}, {"role": "assistant", "content": t.answer}) for t in self.turns)
        return head + [message for pair in pairs for message in pair]

    def as_record(self) -> dict[str, object]:
        """The JSONL record for replays: value and fact_turn are null where no stated fact is asked."""
        return {"id": self.name, "system": self.system, "turns": [_turn_record(turn) for turn in self.turns]}


@dataclass(frozen=True)
class DialogueSpec:
    """What to make: length, number of facts, and how far phrasing strays from the plain form."""

    tokens: int
    facts: tuple[int, int]
    split: Split = "train"
    loose: float = 0.5
    repeat_questions: float = 0.0
    pairs: float = 0.0
    unknown: float = 0.0
    greeting: float = 0.0
    system: float = 0.3
    early_questions: float = 0.25
    casual: float = 0.1
    passing: float = 0.2
    other_nouns: float = 0.0
    mentions: float = 0.0
    doubles: float = 0.0
    digits: tuple[int, int] = (4, 4)


def approximate_tokens(text: str) -> int:
    """Tokens of one message, role and end markers included, when no tokenizer is at hand."""
    return 2 + sum(len(word) if word.strip(".,?!").isdigit() else 1 + len(word) // 9 for word in text.split())


def is_heldout_value(value: str) -> bool:
    """Whether a value belongs to held-out dialogues: a fixed eighth of all values, scattered by a hash."""
    return zlib.crc32(value.encode()) % 8 == 0


def draw_value(rng: random.Random, split: Split, digits: tuple[int, int] = (4, 4)) -> str:
    """A value of the split, leading zeros allowed."""
    length = rng.randint(*digits) if digits[0] < digits[1] else digits[0]
    while True:
        value = f"{rng.randrange(10**length):0{length}d}"
        if is_heldout_value(value) == (split == "heldout"):
            return value


def make_dialogue(
    rng: random.Random, spec: DialogueSpec, name: str = "", count: CountTokens = approximate_tokens
) -> Dialogue:
    """One dialogue of at most about `spec.tokens` tokens: statements, small talk between, questions to the end."""
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < spec.system else ""
    statements, questions = _facts_and_questions(rng, spec)
    budget = spec.tokens - 2 - (count(system) if system else 0)
    spent = sum(_cost(turn, count) for turn in statements + questions)
    while spent > budget and len(questions) > 1:
        spent -= _cost(questions.pop(), count)
    fillers: list[Turn] = []
    while True:
        filler = _filler(rng, spec)
        spent += _cost(filler, count)
        if spent > budget:
            break
        fillers.append(filler)
    return Dialogue(name, system, _number_turns(_arrange(rng, spec, statements, questions, fillers)))


def make_dialogues(
    seed: int, spec: DialogueSpec, number: int, count: CountTokens = approximate_tokens
) -> Iterator[Dialogue]:
    """`number` dialogues; the same seed and spec give the same dialogues on every machine."""
    for index in range(number):
        rng = random.Random(f"{seed}:{spec.split}:{spec.tokens}:{index}")
        yield make_dialogue(rng, spec, f"{spec.split}-{spec.tokens}-{seed}-{index}", count)


def heldout_spec(tokens: int) -> DialogueSpec:
    """The dialogues recall is reported on: every fact asked once, phrased as people do, one fact per 64 tokens."""
    most = max(2, min(16, tokens // 64))
    return DialogueSpec(tokens=tokens, facts=(max(2, most - 2), most), split="heldout")


def write_jsonl(path: Path, dialogues: Sequence[Dialogue]) -> None:
    """One record a line, for the replay tool."""
    path.write_text("".join(json.dumps(d.as_record()) + "\n" for d in dialogues), encoding="utf-8")


def corpus_for_tokenizer(seed: int, number: int) -> Iterator[str]:
    """Text to train a tokenizer on: every word that a dialogue can hold, held-out words too, and the nouns often."""
    rng = random.Random(seed)
    for split in ("train", "heldout"):
        spec = DialogueSpec(tokens=512, facts=(4, 8), split=split, unknown=0.5, greeting=0.2, system=1.0)
        for dialogue in make_dialogues(seed, spec, number):
            yield from (message["content"] for message in dialogue.messages())
    yield from PLAIN_ENGLISH * max(1, number // 8)
    for _ in range(number):
        yield " " + " ".join(rng.sample(NOUNS, len(NOUNS)))
        yield " " + " ".join(noun.capitalize() for noun in rng.sample(NOUNS, len(NOUNS)))
        yield from NOUNS
        yield from (noun.capitalize() for noun in NOUNS)


def _turn_record(turn: Turn) -> dict[str, object]:
    asked = turn.facts if turn.kind == "question" else ()
    value = " ".join(fact.value for fact in asked) or None
    return {
        "user": turn.user,
        "answer": turn.answer,
        "kind": turn.kind,
        "value": value,
        "fact_turn": min((fact.turn for fact in asked), default=None),
    }


def _cost(turn: Turn, count: CountTokens) -> int:
    return count(turn.user) + count(turn.answer)


def _casual(rng: random.Random, spec: DialogueSpec, text: str) -> str:
    """Sometimes typed carelessly: no capital, no final mark."""
    if rng.random() >= spec.casual:
        return text
    return (text[0].lower() + text[1:]).rstrip(".?!")


def _recalled(facts: Sequence[Fact]) -> str:
    return ", ".join(f"{fact.noun} {fact.value}" for fact in facts)


def _statement(rng: random.Random, spec: DialogueSpec, fact: Fact) -> Turn:
    loose = rng.random() < spec.loose
    template = rng.choice(LOOSE_STATEMENTS if loose else PLAIN_STATEMENTS)
    said = template.format(noun=fact.noun, value=fact.value, fact=f"{fact.noun} {fact.value}")
    text = _casual(rng, spec, said[0].upper() + said[1:])
    if rng.random() < spec.passing:
        aside = _smalltalk(rng, spec).user
        text = f"{aside} {text}" if rng.random() < 0.5 else f"{text} {aside}"
    return Turn(text, f"Noted: {_recalled([fact])}.", "statement", (fact,))


def _double(rng: random.Random, spec: DialogueSpec, one: Fact, two: Fact) -> Turn:
    text = rng.choice(DOUBLE_STATEMENTS).format(a=one.noun, x=one.value, b=two.noun, y=two.value)
    return Turn(_casual(rng, spec, text), f"Noted: {_recalled([one, two])}.", "statement", (one, two))


def _asking(rng: random.Random, spec: DialogueSpec, asked: str) -> str:
    text = rng.choice(QUESTIONS).format(noun=asked)
    return _casual(rng, spec, text[0].upper() + text[1:])


def _question(rng: random.Random, spec: DialogueSpec, facts: Sequence[Fact]) -> Turn:
    asked = " and my ".join(fact.noun for fact in facts)
    text = _asking(rng, spec, asked)
    return Turn(text, f"On record: {_recalled(facts)}.", "question", tuple(facts))


def _unknown(rng: random.Random, spec: DialogueSpec, noun: str) -> Turn:
    text = _asking(rng, spec, noun)
    return Turn(text, f"On record: {noun} not given.", "unknown")


def _seen_part(options: Sequence[str], split: Split) -> Sequence[str]:
    return options if split == "heldout" else options[:-1]


def _smalltalk(rng: random.Random, spec: DialogueSpec) -> Turn:
    topic = rng.choice(TOPICS)
    sentence = rng.choice(_seen_part(topic.sentences, spec.split)).format(
        a=rng.choice(_seen_part(topic.first, spec.split)),
        b=rng.choice(_seen_part(topic.second, spec.split)),
        n=rng.randrange(2, 100),
    )
    lead = rng.choice(LEAD_INS)
    if rng.random() < 0.15:
        lead = f"{rng.choice(FIRST_NAMES)} told me this: "
    keeps_capital = not lead.endswith(", ") or sentence.startswith(("I ", "On "))
    text = lead + (sentence if keeps_capital else sentence[0].lower() + sentence[1:])
    return Turn(text, topic.reply, "smalltalk")


def _filler(rng: random.Random, spec: DialogueSpec) -> Turn:
    if rng.random() < spec.greeting:
        said, reply = rng.choice(GREETINGS)
        return Turn(_casual(rng, spec, said), reply, "greeting")
    if spec.mentions and rng.random() < spec.mentions:
        noun = rng.choice(NOUNS)
        return Turn(rng.choice(_seen_part(MENTIONS, spec.split)).format(noun=noun), "I see.", "smalltalk")
    return _smalltalk(rng, spec)


def _facts_and_questions(rng: random.Random, spec: DialogueSpec) -> tuple[list[Turn], list[Turn]]:
    """Statements in order of telling, and the questions in the order in which they are worth keeping."""
    nouns = rng.sample(NOUNS, rng.randint(*spec.facts) + 1)
    if spec.other_nouns:
        others = iter(rng.sample(OTHER_NOUNS, len(nouns)))
        nouns = [next(others) if rng.random() < spec.other_nouns else noun for noun in nouns]
    values: list[str] = []
    while len(values) < len(nouns) - 1:
        value = draw_value(rng, spec.split, spec.digits)
        if value not in values:
            values.append(value)
    facts = [Fact(noun, value, -1) for noun, value in zip(nouns[1:], values, strict=True)]
    statements = [_statement(rng, spec, fact) for fact in facts]
    if spec.doubles and len(facts) > 1 and rng.random() < spec.doubles:
        at = rng.randrange(len(facts) - 1)
        statements[at : at + 2] = [_double(rng, spec, facts[at], facts[at + 1])]
    asked = rng.sample(facts, len(facts))
    asked += [fact for fact in facts if rng.random() < spec.repeat_questions]
    questions = [_question(rng, spec, [fact]) for fact in asked]
    for index, fact in enumerate(asked):
        other = rng.choice(facts)
        if rng.random() < spec.pairs and other.noun != fact.noun:
            questions[index] = _question(rng, spec, [fact, other])
    if rng.random() < spec.unknown:
        questions.insert(rng.randint(0, len(questions)), _unknown(rng, spec, nouns[0]))
    return statements, questions


def _arrange(
    rng: random.Random, spec: DialogueSpec, statements: list[Turn], questions: list[Turn], fillers: list[Turn]
) -> list[Turn]:
    """Statements first with small talk among them; each question after its facts, mostly at the very end."""
    body = list(statements)
    for filler in fillers:
        body.insert(rng.randint(0, len(body)), filler)
    late: list[Turn] = []
    for question in questions:
        if rng.random() >= spec.early_questions:
            late.append(question)
            continue
        nouns = {fact.noun for fact in question.facts}
        told = [i for i, turn in enumerate(body) if turn.kind == "statement" and nouns & {f.noun for f in turn.facts}]
        body.insert(rng.randint(max(told, default=-1) + 1, len(body)), question)
    return body + late


def _number_turns(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Fills in where each fact was stated, now that the order is known."""
    stated = {fact.noun: at for at, turn in enumerate(turns) if turn.kind == "statement" for fact in turn.facts}
    return tuple(
        Turn(t.user, t.answer, t.kind, tuple(Fact(f.noun, f.value, stated[f.noun]) for f in t.facts)) for t in turns
    )


def main() -> None:
    """Writes held-out dialogues as JSONL."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--number", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    write_jsonl(args.out, list(make_dialogues(args.seed, heldout_spec(args.tokens), args.number)))


if __name__ == "__main__":
    main()
