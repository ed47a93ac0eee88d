"""Text without meaning for the questions: small talk, and paragraphs of common words as if pasted from elsewhere. Pure, seeded.

What named a fact of the dialogue by then is not drawn for it: otherwise a word said by chance would often look like what is asked about.
Now and then it does all the same, as in life: facts are named later, too.
"""

import random
from collections.abc import Collection, Sequence

from loopserve.evaluation.dialogues.composed import compose
from loopserve.evaluation.dialogues.phrases import TALK, TITLES
from loopserve.evaluation.dialogues.words import GRAMMAR, Split, blurred, odd_word, phrases_of, spliced, text_words

_ENDS = (".", ".", ".", ".", "!", ";", ":")
_TRAINED_ENDS = (*_ENDS, "?", "?")  # what ends like a question need not be one
_NUMBER_SHARE = 0.12  # of pasted sentences that hold a number, so that not every number is an answer
_GRAMMAR_SHARE = 0.4  # of words, as in English
_COMMA_SHARE = 0.08
_ODD_SHARE = 0.08  # of the words in training that carry no grammar: else a word in pieces would always be a name
_TALK_SHARE = 0.4
_TALK_HELD_OUT = 16  # sentences each, for validation and test
_WORDS = (5, 15)


def talk_of(rng: random.Random, split: Split) -> list[str]:
    """Sentences that people say in one dialogue, which come back in it.

    In training some of those there are, so that each comes back as often as a held-out one, and many of them are `blurred` or `spliced`,
    or give way to a composed question or request: whatever word comes back with its sentence is no name, whatever the sentence asks.
    """
    phrases = phrases_of(TALK, split, num_held_out=_TALK_HELD_OUT)
    if split is not Split.TRAIN:
        return list(phrases)
    drawn = rng.sample(phrases, rng.randint(_TALK_HELD_OUT, len(phrases) // 2))
    return [_altered(rng, phrase, phrases) for phrase in drawn]


def _altered(rng: random.Random, phrase: str, phrases: Sequence[str]) -> str:
    chance = rng.random()
    if chance < 0.35:
        return compose(rng, TALK)
    if chance < 0.6:
        return blurred(rng, phrase)
    return spliced(rng, phrase, rng.choice(phrases)) if chance < 0.7 else phrase


class LooseText:
    """Draws the text of one dialogue that has nothing to do with its puzzles; common words in `avoid` by then are left out."""

    def __init__(self, rng: random.Random, split: Split, avoid: Collection[str]) -> None:
        self._rng = rng
        self._split = split
        self._avoid = avoid
        self._talk = talk_of(rng, split)

    def sentence(self) -> str:
        """Common words in any order: nothing of it is held out, and nothing in it repeats itself."""
        rng = self._rng
        words = [
            rng.choice(GRAMMAR) if rng.random() < _GRAMMAR_SHARE else self._word() for _ in range(rng.randint(*_WORDS))
        ]
        if rng.random() < _NUMBER_SHARE:
            words.insert(rng.randrange(1, len(words)), str(rng.randrange(10 ** rng.randint(1, 4))))
        text = "".join(word + (", " if rng.random() < _COMMA_SHARE else " ") for word in words[:-1]) + words[-1]
        ends = _ENDS if self._split is not Split.TRAIN else _TRAINED_ENDS
        return text[0].upper() + text[1:] + rng.choice(ends)

    def sentences(self, num: int) -> list[str]:
        """So many, all as people write them (where there are enough) or all of words in any order."""
        if self._rng.random() < _TALK_SHARE:
            return self._small_talk(num)
        return [self.sentence() for _ in range(num)]

    def message(self, num: int) -> str:
        """So many sentences, sometimes with a title or in lines."""
        text = ("\n" if self._rng.random() < 0.2 else " ").join(self.sentences(num))
        return f"{self._rng.choice(TITLES)}\n{text}" if self._rng.random() < 0.2 else text

    def _small_talk(self, num: int) -> list[str]:
        told = [
            phrase.format(a=self._word(), b=self._word(), n=self._rng.randrange(2, 100))
            for phrase in self._rng.sample(self._talk, min(num, len(self._talk)))
        ]
        return [text[0].upper() + text[1:] for text in told]

    def _word(self) -> str:
        if self._split is Split.TRAIN and self._rng.random() < _ODD_SHARE:
            return odd_word(self._rng)
        while True:
            word = self._rng.choice(text_words())
            if word not in self._avoid:
                return word
