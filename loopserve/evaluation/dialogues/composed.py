"""Wordings put together from parts, thousands for each list of `phrases`: for training alone, and never one that is held out.

From the sixty wordings of a list a model learns those sentences; from parts that meet in many orders it learns which word of a sentence
is the one that is asked about. Small talk asks and requests in as many ways: what looks like a question is none unless it names what
was told. A `[PART]` stands for any of its alternatives; what is left of a `{slot}` is filled in as in any wording. Pure, seeded.
"""

import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType

from loopserve.evaluation.dialogues import phrases as said

_PART = re.compile(r"\[([A-Z_]+)\]")
_TRIES_MAX = 100  # for a wording that is not held out

_PARTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "THING": (
            *("code", "number") * 3,
            *("digits", "combination", "figure", "access code", "entry code", "current code", "right number", "PIN"),
        ),
        "OWNER": (*("the", "my") * 4, "our", "her", "his", "their", "that", "this", "your"),
        "KIND": (*[""] * 12, "old ", "new ", "big ", "little ", "other ", "second ", "green ", "good old ", "shared "),
        "OF": ("of", "of", "for", "for", "to"),
        "ITS": ("[OWNER] [KIND]{noun}",),
        "VALUE_OF": ("the [THING] [OF] [ITS]", "the [THING] [OF] [ITS]", "[ITS] [THING]", "[ITS] [THING]", "[ITS]"),
        "AGAIN": (*[""] * 6, " again", " once more", " now", " for me", " right away", " if you can", " one more time"),
        "PLEASE": (*[""] * 5, ", please", ", would you", ", thanks", " please"),
        "WHY": (
            *[""] * 8,
            "I am in a hurry, ",
            "Sorry to bother you, ",
            "Silly me, ",
            "While I think of it, ",
            "Just to be sure, ",
            "Quick question, ",
            "Excuse me, ",
            "My mind is blank, ",
            "Somebody wants to know, ",
        ),
        "DO": ("dial", "type in", "press", "key in", "punch in", "use", "say", "put in", "choose", "set"),
        "AT": ("at", "for", "to open", "to unlock", "to get into", "to start", "to use", "with", "on", "for"),
        "SEND": ("send", "read out", "write down for", "pass on", "text", "hand over", "mail", "forward"),
        "WANTS": (
            *("needs", "wants", "lost", "forgot", "must have", "has forgotten", "is looking for", "is waiting for"),
            *("would like", "has to know", "wants to know", "cannot find", "does not have", "just called about"),
            *("keeps losing", "has mislaid", "was hoping for", "needs to hear", "can do nothing without"),
        ),
        "A": ("the", "the", "a", "that", "our", "this", "some"),
        "END": (
            *(".", ".", "!", ", what is it?", ", which one?", ", can you help?", ", do you have it?", ", tell me."),
            *(", what do I say?", "; what was it?", ", so which is it?"),
        ),
        "NAME": ("name", "name", "name", "title", "word", "owner", "place", "entry"),
        "TIED": (
            *(
                "connected with",
                "listed beside",
                "written next to",
                "tied to",
                "linked to",
                "on file for",
                "meant with",
            ),
            *("mentioned with", "found beside", "noted for", "printed next to", "recorded for"),
        ),
        "PAPER": ("report", "text", "paper", "document", "article", "notes", "page", "letter"),
        "OPENS": ("opens", "unlocks", "works for", "works at", "starts", "is set for", "is meant for", "fits"),
        "GOT": ("picked", "took", "chose", "have", "saved", "typed", "keep", "registered", "was given", "entered"),
        "ITEMS": ("items", "things", "points", "words", "entries", "bits and pieces"),
        "HOLD": ("have", "own", "hold", "keep", "store", "stock"),
        "HAVE": ("[HOLD]", "[HOLD]", "counted", "found", "ordered", "received"),
        "SUM": ("sum", "total", "count of both", "whole amount"),
        "HOLDS": (
            *(
                "holds",
                "keeps",
                "rents",
                "borrowed",
                "drives",
                "guards",
                "runs",
                "shares",
                "cleans",
                "manages",
                "fetched",
            ),
            *("signed for", "is using", "has taken", "is allowed to use", "is responsible for", "now owns"),
        ),
        "ASK_NUMBER": (
            "[WHY]what [IS] [VALUE_OF][AGAIN]?",
            "[WHY]do you [KNOW] [VALUE_OF][AGAIN][PLEASE]?",
            "[WHY][CAN] you [GIVE] [VALUE_OF][AGAIN][PLEASE]?",
            "[GIVE] [VALUE_OF][AGAIN][PLEASE].",
            "[WHY]I [MISS] [VALUE_OF][AGAIN].",
            "[VALUE_OF][AGAIN][PLEASE]?",
            "[WHY]what do [WE] [DO] [AT] [ITS][AGAIN]?",
            "[WHY]which [THING] [OPENS] [ITS][AGAIN]?",
            "[WHY]which [THING] did [WE] [DO] [AT] [ITS][AGAIN]?",
            "[WHY]any idea what [VALUE_OF] [IS]?",
            "[WHY]how can [WE] [GET_INTO] [ITS][AGAIN]?",
            "With which [THING] do [WE] [GET_INTO] [ITS]?",
            "[ITS], what [IS] the [THING][AGAIN]?",
            "[ITS]: which [THING][PLEASE]?",
        ),
        "IS": ("is", "is", "was", "was", "might be"),
        "WE": ("I", "I", "we", "they", "people", "you"),
        "KNOW": ("know", "still have", "have", "recall", "happen to know", "see"),
        "CAN": ("can", "could", "will", "would"),
        "GIVE": (
            "give me",
            "tell me",
            "send me",
            "find",
            "look up",
            "check",
            "bring up",
            "read me",
            "show me",
            "let me have",
        ),
        "MISS": (
            *(
                "cannot remember",
                "have forgotten",
                "am looking for",
                "would like to have",
                "cannot find",
                "do not recall",
            ),
            *("have to know", "am missing", "must know", "was asked for", "never wrote down", "want to know"),
        ),
        "GET_INTO": ("open", "unlock", "get into", "use", "start", "enter", "operate", "switch on"),
        "TELL_NUMBER": (
            "[VALUE_OF] is {value}.",
            "[VALUE_OF]: {value}.",
            "[VALUE_OF] should be {value}.",
            "[VALUE_OF] happens to be {value}.",
            "{value} [OPENS] [ITS].",
            "I [GOT] {value} [AT] [ITS].",
            "They [GOT] {value} as [VALUE_OF].",
            "[LOOK], [VALUE_OF] is {value}.",
            "[LOOK], {value} is [VALUE_OF].",
            "With {value} you can [GET_INTO] [ITS].",
            "On [ITS] there is the [THING] {value}.",
            "[ITS] has {value}.",
        ),
        "LOOK": (
            "listen",
            "in case you wonder",
            "for later",
            "for the record",
            "before I go",
            "as you may know",
            "I think",
        ),
        "ASK_LINK": (
            "{person} [WANTS] [A] [THING][AGAIN][END]",
            "{person} [WANTS] [A] [THING][AGAIN][END]",
            "{person} [WANTS] [A] [THING][AGAIN][END]",
            "{person} is [THERE][END]",
            "[WHY]{person} [WANTS] [A] [THING][AGAIN][END]",
            "[WHY]which [THING] do [WE] [SEND] [TO_WHOM]?",
            "[WHY]what [THING] [DOES] {person} [DO][AGAIN]?",
            "[WHY]with which [THING] [DOES] {person} get in[AGAIN]?",
            "[GIVE] the [THING] that {person} can use[AGAIN][PLEASE].",
            "The [THING] for {person}[AGAIN][PLEASE]?",
            "[WHY]what [IS] the [THING] for {person}[AGAIN]?",
            "I have to [SEND] [TO_WHOM] the [THING], what [IS] it?",
            "[WHY][CAN] you [GIVE] the [THING] for {person}[AGAIN]?",
            "{person}, which [THING]?",
        ),
        "TO_WHOM": ("{person}", "to {person}"),
        "DOES": ("does", "did", "should", "can", "may"),
        "THERE": ("at the door", "on the phone", "outside", "back", "waiting", "stuck", "in the hall", "upset", "lost"),
        "TELL_LINK": (
            "{person} [HOLDS] [ITS].",
            "{person} [HOLDS] [ITS].",
            "[LOOK], {person} [HOLDS] [ITS].",
            "[ITS] is now used by {person}.",
            "[ITS] was handed to {person}.",
            "Since last week {person} [HOLDS] [ITS].",
            "[ITS] stays with {person}.",
        ),
        "ASK_OWNER": (
            "[WHY]which [NAME] is [TIED] the {noun}?",
            "[WHY]what [NAME] [IS] [TIED] the {noun} in the [PAPER]?",
            "[GIVE] the [NAME] [TIED] the {noun}[PLEASE].",
            "I [MISS] the [NAME] [TIED] the {noun}.",
            "In the [PAPER], who or what [IS] [TIED] the {noun}?",
            "[WHY][CAN] you [GIVE] what the [PAPER] has on the {noun}?",
            "The {noun} in the [PAPER], which [NAME][AGAIN]?",
            "[WHY]do you [KNOW] the [NAME] for the {noun}[AGAIN]?",
        ),
        "TELL_OWNER": (
            "{value} [HOLDS] the {noun}.",
            "The {noun} is [TIED] {value}.",
            "In the end {value} got the {noun}.",
            "The [PAPER] says that {value} [HOLDS] the {noun}.",
            "The {noun} was moved to {value}.",
            "The [NAME] [TIED] the {noun} is {value}.",
            "Then there is the {noun}, which {value} [HOLDS].",
        ),
        "ASK_LABEL": (
            "[WHY][SORT] {noun} ->",
            "[SORT] the following: {noun} ->",
            "[SORT] this one[AGAIN]: {noun} ->",
            "[WHY]where does this go: {noun} ->",
            "The last for today: {noun} ->",
            "[WHY]what do you make of {noun} ->",
            "Same question: {noun} ->",
        ),
        "SORT": ("sort", "class", "mark", "name", "tag", "file", "judge", "put away", "decide on"),
        "TELL_LABELS": (
            "[ITEMS] that I tagged: {examples}.",
            "My friends sort like this: {examples}.",
            "Please go by these [ITEMS]: {examples}.",
            "Keep to these: {examples}.",
            "In our house it is like this: {examples}.",
            "Tagged [ITEMS]: {examples}.",
        ),
        "ASK_LIST": (
            "[WHY]which [ITEMS] did [WE] [GOT_DOWN] for [ITS]?",
            "[GIVE] the [ITEMS] for [ITS][AGAIN][PLEASE].",
            "[WHY][CAN] you [GIVE] the list of [ITS][AGAIN]?",
            "I [MISS] the [ITEMS] for [ITS].",
            "[WHY]what [IS] still to do for [ITS]?",
            "The [ITEMS] for [ITS][AGAIN][PLEASE]?",
            "[WHY]do you [KNOW] my list for [ITS][AGAIN]?",
        ),
        "GOT_DOWN": ("write down", "collect", "name", "mention", "want", "pick", "plan", "pack"),
        "TELL_LIST": (
            "[ITEMS] to keep for [ITS]: {items}.",
            "[LOOK], for [ITS] I want {items}.",
            "[ITS] list: {items}.",
            "[ITS] gets {items}.",
            "I packed for [ITS]: {items}.",
            "On my list for [ITS] are {items}.",
            "[ITEMS] of [ITS]: {items}.",
        ),
        "ASK_SUM": (
            "[WHY]what [IS] the [SUM] of the {a} and the {b}[AGAIN]?",
            "[GIVE] the [SUM] of {a} and {b}[PLEASE].",
            "[WHY]how many do [WE] [HOLD] of the {a} and the {b}, both counted?",
            "Both the {a} and the {b}, how many [IS] that?",
            "[WHY]if [WE] take the {a} and then the {b}, how many?",
            "[WHY][CAN] you [GIVE] the [SUM] of the {a} and the {b}?",
        ),
        "TELL_STOCK": (
            "We [HAVE] {value} of the {noun}.",
            "They [HAVE] {value} of the {noun} on the shelf.",
            "On the shelf, {noun}: {value}.",
            "The shelf has {value} of the {noun}.",
            "[LOOK], we [HAVE] {value} of the {noun}.",
        ),
        "TALK": (
            "[WHY][CAN] you [HANDLE] [ONE][AGAIN][PLEASE]?",
            "[WHY][CAN] you [HANDLE] [ONE] [NEAR] [OTHER]?",
            "[WHY][CAN] you [TELL_ME] [ONE][AGAIN][PLEASE]?",
            "[WHY]where [DID] [WHO] [HANDLE] [ONE][AGAIN]?",
            "[WHY]when [DID] [WHO] [HANDLE] [ONE] [NEAR] [OTHER]?",
            "[WHY]why [DID] [WHO] [HANDLE] [ONE]?",
            "[WHY]how [DID] [WHO] [HANDLE] [ONE] without [OTHER]?",
            "[WHY]what [DID] [WHO] [HANDLE] [ONE] for?",
            "[WHY]who [IS] going to [HANDLE] [ONE][AGAIN]?",
            "[WHY]what [IS] [ONE] [NEAR] [OTHER]?",
            "[WHY]what [IS] so [SUCH] about [ONE]?",
            "Which {a} [IS] more [SUCH] than [OTHER]?",
            "How [SUCH] [IS] [ONE] by now?",
            "How many {a} can one [HANDLE] in {n} days?",
            "How long [DID] [WHO] have to wait for [ONE]?",
            "[WHY]do you [FIND] [ONE] [SUCH]?",
            "[WHY]do you [FIND] [ONE] more [SUCH] than [OTHER]?",
            "Is [ONE] still [NEAR] [OTHER]?",
            "Is there any {a} [NEAR] [OTHER]?",
            "[WHY][IS] it [SUCH] to [HANDLE] [ONE] [NEAR] [OTHER]?",
            "Have you ever seen [ONE] [NEAR] [OTHER]?",
            "Should [WHO] [HANDLE] [ONE] or [OTHER]?",
            "[SOMEONE] [WANTS] [ONE][AGAIN][END]",
            "[SOMEONE] [WANTS] [ONE] [NEAR] [OTHER].",
            "{a} [WANTS] [A] {b}[AGAIN][END]",
            "{a} is [THERE][END]",
            "I [MISS] [ONE][AGAIN].",
            "I [MISS] [ONE] [NEAR] [OTHER].",
            "I would be glad if you could [HANDLE] [ONE] [NEAR] [OTHER].",
            "It would be [SUCH] to [HANDLE] [ONE][AGAIN].",
            "Please [HANDLE] [ONE][AGAIN].",
            "Please do not [HANDLE] [ONE] [NEAR] [OTHER].",
            "[HANDLE] [ONE] and then [HANDLE] [OTHER].",
            "[HANDLE] [ONE] before you [HANDLE] [OTHER].",
            "Never [HANDLE] [ONE] [NEAR] [OTHER].",
            "Let us [HANDLE] [ONE][AGAIN].",
            "[TELL_ME] [ONE][AGAIN][PLEASE].",
            "[ONE][AGAIN][PLEASE]?",
            "And what about [ONE]?",
            "[ONE] or [OTHER], what do you think?",
            "Guess who [TOLD] [ONE]!",
            "Ask [SOMEONE] about [ONE].",
            "No idea what [SOMEONE] wants with [ONE].",
            "In which {a} do they [HANDLE] [OTHER]?",
            "To whom should [WHO] [HANDLE] [ONE]?",
            "Whose {a} is that [NEAR] [OTHER]?",
        ),
        "ONE": (*["[OWNER] [KIND]{a}"] * 4, "a {a}", "some {a}", "{a}", "every {a}"),
        "OTHER": (*["[OWNER] [KIND]{b}"] * 4, "a {b}", "{b}", "some {b}", "any {b}"),
        "DID": ("did", "do", "will", "would", "should", "can", "could", "must", "might"),
        "WHO": (*["I", "we", "you", "they"] * 2, "people", "my boss", "the neighbours", "your parents", "one"),
        "SOMEONE": (
            *("my cousin", "our boss", "the neighbour", "a friend", "his wife", "the teacher", "my aunt", "the driver"),
            *("a stranger", "the man next door", "everybody", "her doctor", "the new girl", "one of the guests"),
        ),
        "TELL_ME": (
            *("tell me about", "show me", "write something about", "explain", "draw me", "describe", "say more about"),
            *("look at", "read me the part about", "sum up what they say about", "compare it with", "give me"),
        ),
        "HANDLE": (
            *("bring", "carry", "clean", "fetch", "paint", "buy", "sell", "return", "hide", "fix", "move", "watch"),
            *("keep an eye on", "put away", "take care of", "pick up", "throw away", "take back", "wait for", "check"),
            *("talk about", "think of", "get rid of", "pay for", "open", "close", "lock", "use", "need", "remember"),
            *("find", "forget", "change", "count", "mention", "eat", "borrow", "feed", "follow", "call"),
        ),
        "NEAR": (
            *("near", "with", "behind", "under", "without", "to", "from", "for", "in", "on top of", "next to", "after"),
            *("before", "because of", "instead of", "beside", "above", "like", "at", "through", "into"),
        ),
        "SUCH": (
            *("useful", "difficult", "strange", "cheap", "boring", "kind", "safe", "loud", "healthy", "pretty", "fair"),
            *("important", "dangerous", "lovely", "expensive", "quick", "sad", "hard", "popular", "dirty", "fresh"),
        ),
        "FIND": ("find", "think", "call", "consider"),
        "TOLD": ("broke", "painted", "lost", "asked for", "bought", "ate", "brought", "wrote about", "laughed at"),
    }
)
_LISTS: Mapping[tuple[str, ...], str] = MappingProxyType(
    {value: name for name, value in vars(said).items() if name in _PARTS}
)


def is_composed(phrases: tuple[str, ...]) -> bool:
    """Whether wordings that mean the same as these can be put together."""
    return phrases in _LISTS


def compose(rng: random.Random, phrases: tuple[str, ...]) -> str:
    """A wording put together from parts that means what `phrases` mean, with their slots (small talk: some). KeyError where none can be."""
    start = f"[{_LISTS[phrases]}]"
    for _ in range(_TRIES_MAX):
        text = _expand(rng, start)
        if text not in _held_out_texts():
            return text
    raise AssertionError(f"{_LISTS[phrases]} gives hardly anything but what is held out")


def parts_words() -> set[str]:
    """Every word that stands in a part, as it is written there."""
    texts = (_PART.sub(" ", text) for alternatives in _PARTS.values() for text in alternatives)
    return {word for text in texts for word in text.split() if "{" not in word}


def _expand(rng: random.Random, text: str) -> str:
    while (part := _PART.search(text)) is not None:
        text = text[: part.start()] + rng.choice(_PARTS[part[1]]) + text[part.end() :]
    return text[0].upper() + text[1:]


@cache
def _held_out_texts() -> frozenset[str]:
    """Every wording of `phrases`, none of which is composed: those of validation and test are among them."""
    lists: Sequence[tuple[str, ...]] = tuple(_LISTS)
    return frozenset(text[0].upper() + text[1:] for phrases in lists for text in phrases)
