"""Whose words a made dialogue uses: nouns, people, invented names and numbers, each belonging to one split and never to another.

A word's split is decided by a hash, so it is the same on every machine. A noun of the test split never names a fact in training; as an
English word it may stand in pasted text and in lists there. In training, many facts are named by other common words and by invented
ones: over two hundred nouns alone a model learned those nouns by heart and could not repeat any other. Pure Python; of
wordings it knows the words only.
"""

import random
import zlib
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import cache
from importlib import resources

from loopserve.evaluation.dialogues import composed, phrases


class Split(StrEnum):
    """What a dialogue is for."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


NOUNS: tuple[str, ...] = tuple(
    """
    locker gate bike safe garage suitcase alarm cabin office attic cellar shed vault mailbox laptop printer router tablet phone
    ticket flight badge parcel order invoice account policy contract library gym pool studio hostel boat van room desk booking
    door wallet car house bank card hotel school club camera server passport kitchen scooter helmet drawer box chest cupboard
    barn tower kiosk tent trailer chalet bunker folder licence voucher receipt warranty seat platform clinic parking bicycle
    storage case zebra customer extension password tracking lobby basement student motel boiler ladder lamp clock basket blanket
    mirror kettle sofa bench fence curtain piano guitar violin drum tractor truck engine pump valve meter sensor scanner drone
    robot rocket radar antenna cable socket switch battery charger speaker monitor keyboard mouse projector screen tripod lens
    microscope telescope compass anchor sail canoe kayak ferry yacht harbour pier bridge tunnel road station depot hangar airport
    runway warehouse factory workshop bakery brewery mill quarry mine orchard garden greenhouse meadow pond lake river island
    beach forest cave cliff valley hill castle palace temple chapel museum gallery theatre cinema stadium arena court track
    stable kennel aviary aquarium hive nursery academy college campus dormitory canteen pantry freezer oven stove grill
    toaster blender mixer teapot bottle barrel crate pallet container wagon sled cart carriage saddle bridle rope chain hammer
    wrench drill saw chisel axe shovel rake hoe wheel pulley lever magnet prism lantern candle torch flag banner statue
    fountain well bell organ harp flute trumpet banjo puzzle chess kite balloon swing slide hammock cradle crib stroller
    umbrella jacket coat glove scarf boot sandal belt necklace ring bracelet brooch crown medal trophy ribbon envelope stamp
    journal diary atlas novel ledger manual notebook calendar poster painting sculpture vase carpet pillow mattress wardrobe
    balcony terrace chimney elevator escalator stairway corridor archive bureau embassy consulate ministry tribunal
    """.split()  # noqa: SIM905 - two hundred quoted words would be harder to read
)
PEOPLE: tuple[str, ...] = tuple(
    """
    Anna Ben Clara David Emma Felix Grace Henry Ida Jonas Karla Liam Maria Noah Olga Peter Quinn Rosa Simon Tina Ursula Victor
    Wanda Xenia Yusuf Zoe Adam Bella Carlos Diana Erik Fiona George Helena Igor Julia Kevin Laura Martin Nina Oscar Paula
    Ralph Sonja Thomas Uma Vera Walter Yara Zeno Alice Bruno Celia Dario Edith Frank Gina Hugo Irene Jack Kira Lukas Mona
    Nils Olivia Pablo Rita Stefan Tara Ulrich Violet Willem Abel Berta Conrad Dora Elias Flora Gustav Hanna Ivan Jasmin Klaus
    Linda Marco Nadia Otto Petra Robin Sarah Tobias Valerie Wendy Albert Bianca Cedric Daphne Emil Frida Gordon Hazel Isaac
    Judith Karim Leonie Milan Noemi Osman Priya Rahul Selma Tarek Urban Vivian Werner Yvonne Zachary
    """.split()  # noqa: SIM905
)
GRAMMAR: tuple[str, ...] = tuple(  # words that hold sentences together
    """
    a about above after again all also always an and another any anyone are around as at away be because been before being below
    between both but by can cannot could did do does doing done down during each either else ever every for from gave give given
    gives got had has have having he her here him his how if in into is it its just know known last like many may me might more
    most much must my name names near need never new next no none not note nothing now number of off on once only onto or other
    our out over own please put record remember said same say see she should since so some still such tell than that the their
    them then there these they thing this those though through to told too under until up upon us use used very want wants was
    we well went were what whatever when where whether which while who whom whose why will with within without would yet you
    your yourself
    """.split()  # noqa: SIM905
)
_WORDINGS = ("TELL_", "ASK_", "CORRECT_")
_MARKS = ".,:;?!"
_OTHER_NAMES = 256  # of one dialogue at most
_ONSETS = "b d f g h j k l m n p r s t v z br dr gr kr pl st tr".split()  # noqa: SIM905
_VOWELS = "a e i o u".split()  # noqa: SIM905
_ENDS = ["", "", "l", "m", "n", "r", "s", "x"]
_HELD_OUT_SHARE = 8  # one word in eight is kept for validation, one for test


def split_of(word: str) -> Split:
    """The one split in which a word may name or answer something."""
    rest = zlib.crc32(word.encode()) % _HELD_OUT_SHARE
    return {0: Split.TEST, 1: Split.VALIDATION}.get(rest, Split.TRAIN)


@cache
def nouns(split: Split) -> tuple[str, ...]:
    """Nouns that name facts in a split."""
    return tuple(word for word in NOUNS if split_of(word) is split)


@cache
def people(split: Split) -> tuple[str, ...]:
    """First names of a split."""
    return tuple(word for word in PEOPLE if split_of(word) is split)


@cache
def common_words() -> tuple[str, ...]:
    """Common English words."""
    text = resources.files(__package__).joinpath("common_words.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


@cache
def text_words() -> tuple[str, ...]:
    """What pasted text and lists are made of; the same in every split."""
    return tuple(dict.fromkeys((*common_words(), *NOUNS, *PEOPLE)))


@cache
def _other_names() -> tuple[str, ...]:
    """Common words that name facts in training; none that a wording is made of: asked about a "code", that would name two things."""
    wordings = [text for name, value in vars(phrases).items() if name.startswith(_WORDINGS) for text in value]
    told = {word.strip(_MARKS).lower() for text in wordings for word in text.split()}
    parts = {word.strip(_MARKS).lower() for word in composed.parts_words()}
    left_out = {*GRAMMAR, *NOUNS, *told, *parts}
    return tuple(
        word for word in common_words() if len(word) >= 4 and word not in left_out and split_of(word) is Split.TRAIN
    )


class Names:
    """Draws what one dialogue names and answers; nothing is drawn twice."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self._rng = rng
        self._split = split
        self._nouns = rng.sample(nouns(split), len(nouns(split)))
        self._people = rng.sample(people(split), len(people(split)))
        self._others = rng.sample(_other_names(), _OTHER_NAMES) if split is Split.TRAIN else []
        self._used: set[str] = set()
        self.taken: set[str] = set()  # nouns and people that name something here

    @property
    def num_nouns_left(self) -> int:
        """Nouns that are still free."""
        return len(self._nouns)

    @property
    def num_people_left(self) -> int:
        """People who are still free."""
        return len(self._people)

    def noun(self) -> str:
        """A noun; in training mostly another word. IndexError when all were drawn."""
        chance = self._rng.random() if self._others else 1.0
        if chance < 0.15:
            return self._take(self.invented().lower())
        return self._take(self._others.pop() if chance < 0.8 else self._nouns.pop())

    def person(self) -> str:
        """A first name; in training mostly an invented one or another word. IndexError when all were drawn."""
        chance = self._rng.random() if self._others else 1.0
        if chance < 0.3:
            return self._take(self.invented())
        if chance < 0.7:
            return self._take(self._others.pop())
        return self._take(self._people.pop())

    def number(self, num_digits: int) -> str:
        """A number of that many digits, leading zeros allowed."""
        return self._fresh(lambda: f"{self._rng.randrange(10**num_digits):0{num_digits}d}")

    def invented(self) -> str:
        """A capitalised name that no language has."""
        return self._fresh(lambda: invented_name(self._rng))

    def words(self, num: int) -> tuple[str, ...]:
        """Different words of no split, none of which names something here."""
        drawn = self._rng.sample(text_words(), num + len(self.taken))
        return tuple([word for word in drawn if word not in self.taken][:num])

    def _take(self, name: str) -> str:
        self.taken.add(name)
        return name

    def _fresh(self, draw: Callable[[], str]) -> str:
        while True:
            word = draw()
            if word not in self._used and split_of(word) is self._split:
                self._used.add(word)
                return word


def invented_name(rng: random.Random) -> str:
    """Two or three syllables, capitalised."""
    syllables = [_syllable(rng) for _ in range(rng.choice((2, 2, 3)))]
    return "".join(syllables).capitalize()


def _syllable(rng: random.Random) -> str:
    return rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_ENDS)


def phrases_of(phrases: Sequence[str], split: Split, *, num_held_out: int = 2) -> Sequence[str]:
    """The wordings of a split: the last `num_held_out` are the test's, those before them validation's."""
    train = len(phrases) - 2 * num_held_out
    assert train > 0, "too few wordings to keep some for validation and test"
    if split is Split.TEST:
        return phrases[train + num_held_out :]
    return phrases[train : train + num_held_out] if split is Split.VALIDATION else phrases[:train]


def blurred(rng: random.Random, phrase: str) -> str:
    """A wording with some words exchanged for any others, or with more of them: what is asked or told is known by what it names."""
    words = [
        word if "{" in word or not word[-1].isalpha() or rng.random() < 0.6 else _any_word(rng)
        for word in phrase.split(" ")
    ]
    if rng.random() < 0.5:  # what is named then stands anywhere, and not mostly at the end
        for _ in range(rng.randint(1, 3)):
            _insert(rng, words)
    return " ".join(words)


def spliced(rng: random.Random, one: str, other: str) -> str:
    """The begin of one sentence and the end of another."""
    begin, end = one.split(" "), other.split(" ")
    return " ".join((*begin[: rng.randint(1, len(begin) - 1)], *end[rng.randint(1, len(end) - 1) :]))


def _insert(rng: random.Random, words: list[str]) -> None:
    """Put any word before one of `words`, or behind the last, which hands it what it ends with."""
    at = rng.randint(0, len(words))
    word = rng.choice(GRAMMAR) if rng.random() < 0.6 else _any_word(rng)
    if at == len(words):
        end = words[-1][len(words[-1].rstrip(_MARKS)) :]
        words[-1], word = words[-1].removesuffix(end), word + end
    words.insert(at, word)


def _any_word(rng: random.Random) -> str:
    return odd_word(rng) if rng.random() < 0.25 else rng.choice(rng.choice((text_words(), GRAMMAR)))


def odd_word(rng: random.Random) -> str:
    """The begin of one common word and the end of another: like a real word that nobody listed, it is no token of its own."""
    while True:
        first, last = rng.choice(common_words()), rng.choice(common_words())
        word = first[: rng.randint(1, 5)] + last[-rng.randint(1, 5) :]
        if split_of(word) is Split.TRAIN:
            return word
