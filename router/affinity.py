"""The affinity decision: live replicas and one conversation in, a ranking of all of them and the reason out. Pure, clock injected.

Hop 2 of a turn. Knows nothing about Ray, HTTP or the engine; imports nothing of `loopserve`. The order of preference:

    1 address      the caller names the replica (administration, hand-off)
    2 owner        a replica that publishes the conversation; the newest claim wins, of equal ones the nearest to home
    3 memo         where this router itself sent it a moment ago (published state is about a second old)
    4 home         rendezvous hashing over the live replicas: every router computes the same without talking
      spill        ... unless the home of a NEW conversation is loaded over its peers

A conversation that is resident somewhere (2, 3) stays, unless waiting there costs more than moving it (`moved`). One that goes on but is
not published yet counts as resident where this router sent its first turn, or else at its home.
Every ranking holds all replicas, so that a dead first choice falls to the next at once.
"""

import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import Any, NewType

ReplicaName = NewType("ReplicaName", str)  # unique id of one replica's life
ShortKey = NewType(
    "ShortKey", int
)  # first 32 bits of a ConversationKey; only ever decides a placement, never whose KV is used

_CLAIM = struct.Struct("<II")  # short key, unix seconds of last use: 8 bytes a conversation in every stats broadcast
_MIX, _64_BITS = 0x9E3779B97F4A7C15, (1 << 64) - 1  # odd, its digits spread: 2**64 over the golden ratio


class Reason(StrEnum):
    """Why the first replica of a ranking is first."""

    ADDRESS = "address"
    OWNER = "owner"
    MEMO = "memo"
    HOME = "home"
    SPILL = "spill"  # new conversation, home loaded
    MOVED = "moved"  # resident conversation, waiting costs more than moving
    UNROUTABLE = "unroutable"  # the named address is not alive, or nothing is


@dataclass(frozen=True, slots=True)
class AffinityKey:
    """What a router knows of a request. `encode_affinity` makes it a string that travels as the handle's `session_id`."""

    home: str  # key of its home
    resident: tuple[str, ...] = ()  # keys under which a replica may publish it; empty: a new conversation
    prompt_tokens: int = 0  # rough size of what a move would compute again
    avoid: str = ""  # replica that has just failed this request: ranked last
    address: str = ""  # replica that must take it, or nobody
    continues: bool = False  # it brings earlier turns, which somebody has computed: its home, unless one claims it


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What one replica publishes about itself, decoded."""

    running: int = 0
    waiting: int = 0
    queue_s: float = 0.0  # seconds a new turn would wait there now
    prefill_s_per_token: float = 0.0  # measured; 0 until known
    accepting: bool = True  # false: engine dead or draining


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One live replica as this router sees it. `in_flight`: what this very router has sent there and not yet seen end."""

    name: ReplicaName
    load: ReplicaLoad = ReplicaLoad()
    in_flight: int = 0
    turns: int = field(init=False)  # there now: the published number, or ours where that is newer and higher

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", max(self.load.running + self.load.waiting, self.in_flight))


@dataclass(frozen=True, slots=True)
class Ranking:
    """All live replicas, best first, and why the first one is first."""

    replicas: tuple[ReplicaName, ...]
    reason: Reason


@dataclass(frozen=True, slots=True)
class AffinitySettings:
    """Thresholds of the decision."""

    spill_turns: int = 4  # a new conversation leaves a home with this many turns more than the least loaded replica
    move_cost_factor: float = (
        1.5  # moving pays when it saves this many times its cost: estimates are noisy, moves are not free for others
    )
    move_wait_s_min: float = 1.0  # waits below this never move a conversation
    memo_s: float = 10.0  # longer than published state is ever late
    memo_max: int = 50_000

    def __post_init__(self) -> None:
        if self.spill_turns < 1 or self.memo_max < 1 or self.memo_s < 0:
            raise ValueError("spill_turns and memo_max must be at least 1, memo_s not negative")


def short_key(key: str) -> ShortKey:
    """32 bits of a key, for published tables and lookups in them."""
    return ShortKey(int.from_bytes(blake2b(key.encode(), digest_size=4).digest(), "little"))


def seed_of(text: str) -> int:
    """64 well-mixed bits of a key or a name."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def rendezvous(key: str, replicas: Sequence[ReplicaName]) -> tuple[ReplicaName, ...]:
    """All replicas by falling weight for `key`, whatever their order (highest random weight, Thaler and Ravishankar 1998).

    A replica that leaves or joins moves only the keys that it ranks first.
    """
    return tuple(Roster([ReplicaView(name) for name in replicas]).order(key))


class Roster:
    """The live replicas, made ready for many decisions: what does not depend on the request is computed once.

    Key and name are hashed well, once each; a weight then takes one multiplication, whose high digits depend on all digits of both. First
    and second ranks of 20,000 keys over 3, 4, 10 and 100 replicas are as even as chance makes them (chi square over its degrees of freedom
    0.4 to 1.0); of `hash((key, seed))` they are not (50 and more).
    """

    def __init__(self, replicas: Sequence[ReplicaView]) -> None:
        self.by_name = {view.name: view for view in sorted(replicas, key=lambda view: view.name)}
        self._seeds = [seed_of(name) for name in self.by_name]
        self.not_accepting = {view.name for view in replicas if not view.load.accepting}

    def replace(self, view: ReplicaView) -> None:
        """A replica of the roster is seen anew."""
        assert view.name in self.by_name
        self.by_name[view.name] = view
        (self.not_accepting.discard if view.load.accepting else self.not_accepting.add)(view.name)

    def order(self, key: str) -> list[ReplicaName]:
        """See `rendezvous`."""
        own = seed_of(key)
        weights = dict(zip(self.by_name, [(own ^ seed) * _MIX & _64_BITS for seed in self._seeds], strict=True))
        return sorted(weights, key=weights.__getitem__, reverse=True)


def pack_claims(claims: Sequence[tuple[str, float]], *, limit: int) -> bytes:
    """Published form of the conversations that a replica holds: (key, unix seconds of last use), newest first, cut at `limit`."""
    newest = sorted(claims, key=lambda claim: claim[1], reverse=True)[:limit]
    return b"".join(_CLAIM.pack(short_key(key), min(max(int(used), 0), 0xFFFFFFFF)) for key, used in newest)


def load_from_stats(stats: Mapping[str, Any]) -> ReplicaLoad:
    """Decode published stats; a replica that has not published yet counts as idle."""
    return ReplicaLoad(
        running=int(stats.get("running", 0)),
        waiting=int(stats.get("waiting", 0)),
        queue_s=float(stats.get("queue_s", 0.0)),
        prefill_s_per_token=float(stats.get("prefill_s_per_token", 0.0)),
        accepting=bool(stats.get("accepting", True)),
    )


class Owners:
    """Who holds what, from the packed claims of all replicas.

    Claims come often and are many, lookups are few: a replica's are only unpacked where they changed (0.2 ms for 2,048), and a lookup asks
    every replica's. One table of all would have to be made again from 200,000 claims whenever one replica of 100 says something new.
    """

    def __init__(self) -> None:
        self._packed: dict[ReplicaName, bytes] = {}
        self._used: dict[ReplicaName, dict[int, int]] = {}  # short key -> unix seconds of last use

    def publish(self, packed: Mapping[ReplicaName, bytes]) -> None:
        """Replace what is known of all replicas."""
        self._used = {
            name: self._used[name] if self._packed.get(name) == claims else _unpacked(claims)
            for name, claims in packed.items()
        }
        self._packed = dict(packed)

    def of(self, key: ShortKey) -> list[ReplicaName]:
        """The owners of a conversation: who claims the newest use. Many, where replicas have found the same session on a disk."""
        claims = [(used[key], name) for name, used in self._used.items() if key in used]
        newest = max((used_s for used_s, _ in claims), default=0)
        return [name for used_s, name in claims if used_s == newest]


def _unpacked(packed: bytes) -> dict[int, int]:
    whole = len(packed) - len(packed) % _CLAIM.size
    numbers = struct.unpack(f"<{whole // 4}I", packed[:whole])
    return dict(zip(numbers[-2::-2], numbers[::-2], strict=True))  # newest come first, hence last into the table


def encode_affinity(key: AffinityKey) -> str:
    """The key as one string without spaces; `decode_affinity` is its inverse."""
    if key.address:
        return f"@{key.address}"
    continues = "continues" if key.continues else ""
    return ";".join(("v2", key.home, ",".join(key.resident), str(key.prompt_tokens), key.avoid, continues))


def decode_affinity(text: str) -> AffinityKey:
    """Read what `encode_affinity` wrote; any other text is taken as a plain session name, home and resident key at once."""
    if text.startswith("@"):
        return AffinityKey(home="", address=text[1:])
    parts = text.split(";")
    if len(parts) == 6 and parts[0] == "v2" and parts[3].isdigit():
        return AffinityKey(
            home=parts[1],
            resident=tuple(filter(None, parts[2].split(","))),
            prompt_tokens=int(parts[3]),
            avoid=parts[4],
            continues=parts[5] == "continues",
        )
    return AffinityKey(home=text, resident=(text,))


class Affinity:
    """One router's decision with its memory: who owns what, and where it sent conversations itself. Not thread-safe."""

    def __init__(self, settings: AffinitySettings, *, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._owners = Owners()
        self._memo: OrderedDict[str, tuple[ReplicaName, float]] = OrderedDict()

    def publish(self, packed: Mapping[ReplicaName, bytes]) -> None:
        """Replace what is known of owners by the newest published claims of all replicas."""
        self._owners.publish(packed)

    def remember(self, key: AffinityKey, replica: ReplicaName) -> None:
        """Note that this router sent a conversation to `replica`; the oldest notes go beyond the limit."""
        now = self._clock()
        for name in key.resident or (_first_turn(key),):  # a first turn's next one brings a key that is not known yet
            self._memo[name] = (replica, now)
            self._memo.move_to_end(name)
        while len(self._memo) > self._settings.memo_max:
            self._memo.popitem(last=False)

    def rank(self, key: AffinityKey, replicas: Roster | Sequence[ReplicaView]) -> Ranking:
        """Rank all live replicas for one request; changes nothing. A roster saves what would be computed from views every time."""
        roster = replicas if isinstance(replicas, Roster) else Roster(replicas)
        if key.address:
            name = ReplicaName(key.address)
            return Ranking((name,), Reason.ADDRESS) if name in roster.by_name else Ranking((), Reason.UNROUTABLE)
        if not roster.by_name:
            return Ranking((), Reason.UNROUTABLE)
        usable, last = roster.order(key.home), []
        if roster.not_accepting or key.avoid:
            unusable = {*roster.not_accepting, key.avoid}
            usable, last = [n for n in usable if n not in unusable], [n for n in usable if n in unusable]
        if not usable:
            return Ranking(tuple(last), Reason.HOME)
        first, reason = self._first_choice(key, usable, roster.by_name)
        usable.remove(first)
        return Ranking((first, *usable, *last), reason)

    def _first_choice(
        self, key: AffinityKey, usable: Sequence[ReplicaName], by_name: Mapping[ReplicaName, ReplicaView]
    ) -> tuple[ReplicaName, Reason]:
        holder, reason = self._holder(key, usable)
        if holder is None and key.continues:
            holder = usable[0]
        if holder is None:
            return _new_home([by_name[name] for name in usable], self._settings)
        if by_name[holder].load.queue_s < self._settings.move_wait_s_min:
            return holder, reason
        views = [by_name[name] for name in usable]
        target = _cheaper_place(by_name[holder], views, key.prompt_tokens, self._settings)
        return (target, Reason.MOVED) if target is not None else (holder, reason)

    def _holder(self, key: AffinityKey, usable: Sequence[ReplicaName]) -> tuple[ReplicaName | None, Reason]:
        for resident in key.resident:
            owners = self._owners.of(short_key(resident))
            owner = next((name for name in usable if name in owners), None) if owners else None
            if owner is not None:
                return owner, Reason.OWNER
        oldest = self._clock() - self._settings.memo_s
        for note in (*key.resident, _first_turn(key)) if key.continues else key.resident:
            name, sent = self._memo.get(note, (None, -math.inf))
            if name in usable and sent >= oldest:
                return name, Reason.MEMO
        return None, Reason.HOME


def _first_turn(key: AffinityKey) -> str:
    return f"first {key.home}"


def _new_home(usable: Sequence[ReplicaView], settings: AffinitySettings) -> tuple[ReplicaName, Reason]:
    """First replica in rendezvous order that is not loaded over the least loaded one by the margin; there always is one."""
    least = min([view.turns for view in usable])
    for view in usable:
        if view.turns < least + settings.spill_turns:
            return view.name, Reason.HOME if view is usable[0] else Reason.SPILL
    raise AssertionError("the least loaded replica is below its own load plus a positive margin")


def _cheaper_place(
    holder: ReplicaView, usable: Sequence[ReplicaView], prompt_tokens: int, settings: AffinitySettings
) -> ReplicaName | None:
    """Where a resident conversation is answered sooner although its KV must be computed again; None: it stays."""
    known = [view.load.prefill_s_per_token for view in usable if view.load.prefill_s_per_token > 0]
    if not known:
        return None  # nobody has measured what a move costs
    others = [view for view in usable if view.name != holder.name]
    if not others:
        return None
    best = min(others, key=lambda view: view.load.queue_s)  # rendezvous order breaks ties, the same for all routers
    refill_s = prompt_tokens * (best.load.prefill_s_per_token or max(known))
    saved_s = holder.load.queue_s - best.load.queue_s
    return best.name if saved_s > settings.move_cost_factor * refill_s and saved_s >= settings.move_wait_s_min else None
