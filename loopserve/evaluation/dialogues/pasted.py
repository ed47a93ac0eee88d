"""Text without meaning for the questions: small talk, and paragraphs of common words as if pasted from elsewhere. Pure, seeded.

What names a fact of the dialogue is avoided in it: otherwise a word said by chance would now and then look like what is asked about.
"""

import random
from collections.abc import Collection, Sequence

from loopserve.evaluation.dialogues.phrases import TALK, TITLES
from loopserve.evaluation.dialogues.words import GRAMMAR, Split, blurred, odd_word, phrases_of, text_words

_ENDS = (".", ".", ".", ".", "!", ";", ":")
_NUMBER_SHARE = 0.12  # of pasted sentences that hold a number, so that not every number is an answer
_GRAMMAR_SHARE = 0.4  # of words, as in English
_COMMA_SHARE = 0.08
_ODD_SHARE = 0.08  # of the words in training that carry no grammar: else a word in pieces would always be a name
_TALK_SHARE = 0.4
_TALK_HELD_OUT = 16  # sentences each, for validation and test
_WORDS = (5, 15)


def talk_of(rng: random.Random, split: Split) -> list[str]:
    """Sentences that people say in one dialogue, which come back in it.

    In training some of those there are, so that each comes back as often as a held-out one, and half of them `blurred`: whatever word
    comes back with its sentence is no name.
    """
    phrases = phrases_of(TALK, split, num_held_out=_TALK_HELD_OUT)
    if split is not Split.TRAIN:
        return list(phrases)
    drawn = rng.sample(phrases, rng.randint(_TALK_HELD_OUT, len(phrases)))
    return [blurred(rng, phrase) if rng.random() < 0.5 else phrase for phrase in drawn]


def small_talk(rng: random.Random, split: Split, num: int, avoid: Collection[str], talk: Sequence[str]) -> list[str]:
    """At most so many different sentences of `talk_of`."""
    told = [
        phrase.format(a=_word(rng, split, avoid), b=_word(rng, split, avoid), n=rng.randrange(2, 100))
        for phrase in rng.sample(talk, min(num, len(talk)))
    ]
    return [text[0].upper() + text[1:] for text in told]


def pasted_sentence(rng: random.Random, split: Split, avoid: Collection[str]) -> str:
    """One sentence of common words in any order: nothing of it is held out, and nothing in it repeats itself."""
    words = [
        rng.choice(GRAMMAR) if rng.random() < _GRAMMAR_SHARE else _word(rng, split, avoid)
        for _ in range(rng.randint(*_WORDS))
    ]
    if rng.random() < _NUMBER_SHARE:
        words.insert(rng.randrange(1, len(words)), str(rng.randrange(10 ** rng.randint(1, 4))))
    text = "".join(word + (", " if rng.random() < _COMMA_SHARE else " ") for word in words[:-1]) + words[-1]
    return text[0].upper() + text[1:] + rng.choice(_ENDS)


def sentences(rng: random.Random, split: Split, num: int, avoid: Collection[str], talk: Sequence[str]) -> list[str]:
    """So many sentences, all as people write them (where there are enough) or all of words in any order."""
    if rng.random() < _TALK_SHARE:
        return small_talk(rng, split, num, avoid, talk)
    return [pasted_sentence(rng, split, avoid) for _ in range(num)]


def filler(rng: random.Random, split: Split, num: int, avoid: Collection[str], talk: Sequence[str]) -> str:
    """A message of so many sentences, sometimes with a title or in lines."""
    text = ("\n" if rng.random() < 0.2 else " ").join(sentences(rng, split, num, avoid, talk))
    return f"{rng.choice(TITLES)}\n{text}" if rng.random() < 0.2 else text


def _word(rng: random.Random, split: Split, avoid: Collection[str]) -> str:
    if split is Split.TRAIN and rng.random() < _ODD_SHARE:
        return odd_word(rng)
    while True:
        word = rng.choice(text_words())
        if word not in avoid:
            return word
