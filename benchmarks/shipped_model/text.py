"""Owns the shipped model's tokenizer and chat template, and how a made dialogue becomes token ids with the tokens to learn marked."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from loopserve.evaluation.dialogues import TASKS, Shape, Split, make_past
from loopserve.evaluation.dialogues.phrases import GREETINGS, SYSTEM_PROMPTS
from loopserve.evaluation.dialogues.words import GRAMMAR, NOUNS, PEOPLE, common_words
from loopserve.evaluation.items import Dialogue

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
# Every message renders on its own and ends with the token that the model itself emits, so the rendering of a history
# is a prefix of every longer one and the keys and values of generated tokens stay valid in the next turn.
CHAT_TEMPLATE = (
    "<|begin|>"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('Unknown role: ' ~ message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' ~ message['role'] ~ '|>' -}}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
IGNORE, REPLY, FIRST_TASK = (
    0,
    1,
    2,
)  # what a target token is: no loss, a reply, part of an answer of TASKS[kind - FIRST_TASK]
_UNKNOWN = len(TASKS)  # answers of kinds that are no task


@dataclass(frozen=True, slots=True)
class Example:
    """One dialogue as token ids, the kind of every token, and where its messages begin."""

    ids: tuple[int, ...]
    kinds: tuple[int, ...]
    messages: tuple[int, ...]


def build_tokenizer(seed: int, vocab: int, num_dialogues: int) -> Tokenizer:
    """Byte-level BPE over made dialogues and common English words; every digit is a token, with and without the space before it.

    The space belongs to the first digit: were it a token of its own, it would stand before every value and the noun would no longer
    be the token that identifies the value. Bytes are in the alphabet, so any text is accepted.
    """
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(" ?[0-9]"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, BEGIN, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed, num_dialogues), trainer)
    return tokenizer


def _corpus(seed: int, num_dialogues: int) -> Iterator[str]:
    """Training dialogues, and the plain vocabulary often enough that common words and names are single tokens."""
    rng = random.Random(seed)
    for index in range(num_dialogues):
        dialogue = make_past(rng, Split.TRAIN, Shape(512), count_tokens=lambda text: len(text) // 4, id_=str(index))
        yield from (text for turn in dialogue.turns for text in (turn.user, turn.answer))
    for _ in range(max(1, num_dialogues // 20)):
        for words in (NOUNS, PEOPLE, GRAMMAR, common_words()):
            yield " " + " ".join(words)
        yield from (noun.capitalize() for noun in NOUNS)
        yield from NOUNS
        yield from PEOPLE
        yield from (text for pair in GREETINGS for text in pair)
        yield from SYSTEM_PROMPTS


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token."""
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(token)
    return found


def message_tokens(tokenizer: Tokenizer) -> Callable[[str], int]:
    """Counts the tokens of one message as rendered."""
    return lambda text: len(tokenizer.encode(text).ids) + 2


def encode_dialogue(tokenizer: Tokenizer, dialogue: Dialogue, not_learned: Collection[int] = ()) -> Example:
    """The rendered dialogue, with the tokens that the assistant must produce marked by the task that they answer.

    The answers of the turns `not_learned` (their indices) stand in the past like any other, but bear no loss.
    """
    system, user, assistant = (special_id(tokenizer, role) for role in ROLES)
    end = special_id(tokenizer, END)
    ids, kinds = [special_id(tokenizer, BEGIN)], [IGNORE]
    messages = [0]

    def add(role: int, text: str, kind: int) -> None:
        messages.append(len(ids))
        content = tokenizer.encode(text).ids
        ids.extend((role, *content, end))
        kinds.extend((IGNORE, *(kind for _ in content), min(kind, REPLY)))

    if dialogue.system:
        add(system, dialogue.system, IGNORE)
    for index, turn in enumerate(dialogue.turns):
        add(user, turn.user, IGNORE)
        known = TASKS.index(turn.task) if turn.task in TASKS else _UNKNOWN
        learned = IGNORE if index in not_learned else REPLY
        add(assistant, turn.answer, FIRST_TASK + known if turn.is_scored else learned)
    return Example(tuple(ids), tuple(kinds), tuple(messages))
