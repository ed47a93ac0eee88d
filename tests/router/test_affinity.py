"""The affinity decision."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.affinity import (
    Affinity,
    AffinityKey,
    AffinitySettings,
    Owners,
    Reason,
    ReplicaLoad,
    ReplicaName,
    ReplicaView,
    Roster,
    ShortKey,
    decode_affinity,
    encode_affinity,
    load_from_stats,
    pack_claims,
    rendezvous,
    short_key,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def router(clock: Clock | None = None, **settings: float) -> Affinity:
    return Affinity(AffinitySettings(**settings), clock=clock or Clock())  # type: ignore[arg-type]


def views(*names: str, **loads: ReplicaLoad) -> list[ReplicaView]:
    return [ReplicaView(ReplicaName(name), load=loads.get(name, ReplicaLoad())) for name in names]


def claims(**held: dict[str, float]) -> dict[ReplicaName, bytes]:
    return {ReplicaName(name): pack_claims(list(keys.items()), limit=100) for name, keys in held.items()}


def owners(packed: dict[ReplicaName, bytes]) -> dict[ShortKey, ReplicaName]:
    """Who is found to own the keys that the tests use; each has one owner at most."""
    found = Owners()
    found.publish(packed)
    return {key: name for key in map(short_key, ("k", "old", "mid", "new")) for name in found.of(key)}


NEW = [AffinityKey(home=f"home-{i}") for i in range(2000)]


@given(st.permutations(["a", "b", "c", "d", "e"]), st.text(max_size=12))
def test_order_of_the_replica_list_never_matters(order: list[str], home: str):
    key = AffinityKey(home=home, resident=("k",))
    assert router().rank(key, views(*order)) == router().rank(key, views("a", "b", "c", "d", "e"))


@given(
    st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=8), st.text(max_size=6), st.sampled_from("abcdefghz")
)
def test_every_ranking_holds_every_live_replica_once(names: list[str], home: str, avoid: str):
    ranking = router().rank(AffinityKey(home=home, avoid=avoid), views(*names))
    assert sorted(ranking.replicas) == sorted(names)


def test_two_routers_agree_without_talking():
    mine, yours = router(), router()
    published = claims(b={"k1": 5.0}, c={"k2": 6.0})
    for r in (mine, yours):
        r.publish(published)
    keys = [*NEW, AffinityKey(home="x", resident=("k1",)), AffinityKey(home="x", resident=("k2",))]
    assert [mine.rank(k, views("a", "b", "c")) for k in keys] == [yours.rank(k, views("c", "b", "a")) for k in keys]


def test_a_fourth_replica_takes_a_quarter_and_moves_nothing_else():
    before = {k.home: router().rank(k, views("a", "b", "c")).replicas[0] for k in NEW}
    after = {k.home: router().rank(k, views("a", "b", "c", "d")).replicas[0] for k in NEW}
    moved = [home for home in before if before[home] != after[home]]
    assert {after[home] for home in moved} == {"d"}  # needless moves: none
    assert 0.20 < len(moved) / len(NEW) < 0.30
    assert all(550 < n < 790 for n in Counter(before.values()).values())


def test_when_a_replica_leaves_only_its_conversations_move():
    before = {k.home: router().rank(k, views("a", "b", "c", "d")).replicas for k in NEW}
    for key in NEW:
        assert router().rank(key, views("a", "b", "c")).replicas == tuple(n for n in before[key.home] if n != "d")


def test_ownership_beats_the_hash_and_the_dead_owner_falls_to_the_home():
    r = router()
    key = next(
        AffinityKey(home=k.home, resident=("k",))
        for k in NEW
        if rendezvous(k.home, [ReplicaName(n) for n in "abc"])[0] == "a"
    )
    r.publish(claims(c={"k": 1.0}))
    owned = r.rank(key, views("a", "b", "c"))
    assert (owned.replicas[:2], owned.reason) == (("c", "a"), Reason.OWNER)
    orphan = r.rank(key, views("a", "b"))
    assert (orphan.replicas[0], orphan.reason) == ("a", Reason.HOME)


def test_the_newest_of_two_claims_wins():
    assert owners(claims(a={"k": 10.0}, b={"k": 20.0})) == {short_key("k"): "b"}
    assert owners(claims(b={"k": 20.0}, a={"k": 10.0})) == {short_key("k"): "b"}


def test_memo_covers_the_delay_of_published_state_and_expires():
    clock = Clock()
    r = router(clock, memo_s=10)
    key = AffinityKey(home="h", resident=("k",))
    home = r.rank(key, views("a", "b", "c")).replicas[0]
    other = next(n for n in "abc" if n != home)
    r.remember(key, ReplicaName(other))
    assert r.rank(key, views("a", "b", "c")).replicas[0] == other
    assert r.rank(key, views("a", "b", "c")).reason is Reason.MEMO
    clock.now += 11
    assert r.rank(key, views("a", "b", "c")).replicas[0] == home


def test_memo_is_bounded_and_forgets_the_oldest():
    r = router(memo_max=2)
    for name in ("k1", "k2", "k3"):
        r.remember(AffinityKey(home="h", resident=(name,)), ReplicaName("a"))
    reasons = [r.rank(AffinityKey(home="h", resident=(n,)), views("a", "b")).reason for n in ("k1", "k2", "k3")]
    assert reasons == [Reason.HOME, Reason.MEMO, Reason.MEMO]


def test_a_hot_common_opening_spreads_over_all_replicas():
    r, running = router(spill_turns=3), Counter({"a": 0, "b": 0, "c": 0})
    hot, reasons = AffinityKey(home="good morning"), Counter[Reason]()
    for _ in range(60):
        ranking = r.rank(hot, [ReplicaView(ReplicaName(n), in_flight=c) for n, c in running.items()])
        running[ranking.replicas[0]] += 1
        reasons[ranking.reason] += 1
    assert max(running.values()) - min(running.values()) <= 3
    assert reasons[Reason.HOME] >= 20 and reasons[Reason.SPILL] >= 30


def test_a_conversation_that_goes_on_is_not_spilled_while_nobody_has_published_it():
    r = router(spill_turns=1)
    home = r.rank(AffinityKey(home="h"), views("a", "b", "c")).replicas[0]
    busy = views("a", "b", "c", **{home: ReplicaLoad(running=30)})
    assert r.rank(AffinityKey(home="h"), busy).reason is Reason.SPILL
    ranking = r.rank(AffinityKey(home="h", resident=("unpublished",), continues=True), busy)
    assert (ranking.replicas[0], ranking.reason) == (home, Reason.HOME)


def test_a_nameless_conversation_goes_on_where_its_first_turn_was_spilled_to_before_anybody_publishes_it():
    clock = Clock()
    r = router(clock, spill_turns=1, memo_s=10)
    first = AffinityKey(home="h")
    home = r.rank(first, views("a", "b", "c")).replicas[0]
    elsewhere = r.rank(first, views("a", "b", "c", **{home: ReplicaLoad(running=30)})).replicas[0]
    r.remember(first, elsewhere)
    second = AffinityKey(home="h", resident=("said and heard",), continues=True)
    ranking = r.rank(second, views("a", "b", "c"))
    assert (ranking.replicas[0], ranking.reason) == (elsewhere, Reason.MEMO) and elsewhere != home
    assert r.rank(first, views("a", "b", "c")).replicas[0] == home  # another conversation with this opening
    clock.now += 11
    assert r.rank(second, views("a", "b", "c")).replicas[0] == home


def test_a_resident_conversation_stays_although_its_replica_is_loaded():
    r = router(spill_turns=1)
    r.publish(claims(a={"k": 1.0}))
    busy = views("a", "b", a=ReplicaLoad(running=30, waiting=9))
    assert r.rank(AffinityKey(home="h", resident=("k",)), busy).replicas[0] == "a"


@pytest.mark.parametrize(
    ("queue_s", "prompt_tokens", "prefill_s", "reason"),
    [
        (30.0, 10_000, 0.001, Reason.MOVED),  # wait 30 s or compute 10 s
        (12.0, 10_000, 0.001, Reason.OWNER),  # saving 12 s for 10 s of work is not worth 1.5 times its cost
        (0.9, 10, 0.001, Reason.OWNER),  # short waits never move
        (30.0, 10_000, 0.0, Reason.OWNER),  # the cost of moving is unknown
    ],
)
def test_a_resident_conversation_moves_only_when_waiting_costs_more(
    queue_s: float, prompt_tokens: int, prefill_s: float, reason: Reason
):
    r = router()
    r.publish(claims(a={"k": 1.0}))
    key = AffinityKey(home="h", resident=("k",), prompt_tokens=prompt_tokens)
    loaded = views(
        "a",
        "b",
        a=ReplicaLoad(queue_s=queue_s, prefill_s_per_token=prefill_s),
        b=ReplicaLoad(prefill_s_per_token=prefill_s),
    )
    assert r.rank(key, loaded).reason is reason


def test_replicas_that_take_nothing_and_replicas_to_avoid_come_last():
    r = router()
    key = AffinityKey(home="h", resident=("k",), avoid="b")
    r.publish(claims(b={"k": 2.0}, c={"k": 3.0}))
    ranking = r.rank(key, views("a", "b", "c", c=ReplicaLoad(accepting=False)))
    assert ranking.replicas[0] == "a"
    assert set(ranking.replicas[1:]) == {"b", "c"}


def test_an_address_is_that_replica_or_nobody():
    assert router().rank(AffinityKey(home="", address="b"), views("a", "b")).replicas == ("b",)
    gone = router().rank(AffinityKey(home="", address="z"), views("a", "b"))
    assert (gone.replicas, gone.reason) == ((), Reason.UNROUTABLE)


hexes = st.text("0123456789abcdef", min_size=1, max_size=32)


@given(
    st.builds(
        AffinityKey,
        home=hexes,
        resident=st.lists(hexes, max_size=3).map(tuple),
        prompt_tokens=st.integers(0, 10**7),
        avoid=st.text("abc123-", max_size=8),
        continues=st.booleans(),
    )
)
def test_an_encoded_key_decodes_to_itself(key: AffinityKey):
    assert decode_affinity(encode_affinity(key)) == key


def test_addresses_and_foreign_session_ids_decode():
    assert decode_affinity(encode_affinity(AffinityKey(home="", address="r1"))).address == "r1"
    assert decode_affinity("plain") == AffinityKey(home="plain", resident=("plain",))
    assert decode_affinity("v2;h;k;notanumber;;").home == "v2;h;k;notanumber;;"


def test_claims_are_cut_at_the_limit_newest_first_and_a_torn_table_is_read_as_far_as_it_goes():
    packed = pack_claims([("old", 1.0), ("new", 3.0), ("mid", 2.0)], limit=2)
    assert set(owners({ReplicaName("a"): packed})) == {short_key("new"), short_key("mid")}
    assert set(owners({ReplicaName("a"): packed[:-3]})) == {short_key("new")}


def test_a_replica_that_has_not_published_counts_as_idle():
    assert load_from_stats({}) == ReplicaLoad()


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="spill_turns"):
        AffinitySettings(spill_turns=0)


@given(
    st.dictionaries(
        st.sampled_from("abcd"),
        st.lists(st.tuples(st.sampled_from("klmn"), st.integers(0, 9)), max_size=6),
        max_size=4,
    ),
    st.dictionaries(st.sampled_from("abcd"), st.just([("k", 5)]), max_size=4),
)
def test_owners_are_those_of_the_newest_claims_whatever_was_known_before(
    held: dict[str, list[tuple[str, int]]], before: dict[str, list[tuple[str, int]]]
):
    found = Owners()
    for claimed in (before, held):
        found.publish({ReplicaName(name): pack_claims([*claims_of], limit=9) for name, claims_of in claimed.items()})
    for key in "klmn":
        claimed = [(used, name) for name, own in held.items() for k, used in own if k == key]
        newest = max(claimed, default=(0, ""))[0]
        assert sorted(found.of(short_key(key))) == sorted({name for used, name in claimed if used == newest})


def test_of_equal_claims_the_one_nearest_to_the_conversations_home_counts_so_that_many_spread():
    first, names = router(), ("a", "b", "c")
    first.publish(claims(**{name: {f"k{n}": 5.0 for n in range(90)} for name in names}))
    keys = [AffinityKey(home=f"home-{n}", resident=(f"k{n}",), continues=True) for n in range(90)]
    rankings = [first.rank(key, views(*names)) for key in keys]
    assert [ranking.replicas[0] for ranking in rankings] == [rendezvous(key.home, list(names))[0] for key in keys]
    assert {ranking.reason for ranking in rankings} == {Reason.OWNER}
    assert len({ranking.replicas[0] for ranking in rankings}) == 3
    assert first.rank(keys[0], views(rankings[0].replicas[1], rankings[0].replicas[2])).reason is Reason.OWNER


@given(st.lists(st.sampled_from("abcdef"), unique=True, min_size=1), st.data())
def test_a_roster_that_was_kept_decides_as_one_made_anew(names: list[str], data: st.DataObject):
    roster, seen = Roster(views(*names)), {view.name: view for view in views(*names)}
    for _ in range(data.draw(st.integers(0, 6))):
        load = ReplicaLoad(running=data.draw(st.integers(0, 9)), accepting=data.draw(st.booleans()))
        view = ReplicaView(ReplicaName(data.draw(st.sampled_from(names))), load=load)
        roster.replace(view)
        seen[view.name] = view
        key = AffinityKey(home=data.draw(st.text(max_size=3)), avoid=data.draw(st.sampled_from([*names, ""])))
        assert router().rank(key, roster) == router().rank(key, list(seen.values()))


def test_homes_are_spread_as_evenly_as_chance_would_over_any_number_of_replicas():
    for number in (3, 10, 100):
        roster = Roster(views(*(f"replica-{index}" for index in range(number))))
        orders = [roster.order(key.home)[:2] for key in NEW]
        for rank in (0, 1):
            counts = Counter(order[rank] for order in orders)
            expected = len(NEW) / number
            chi_square = sum((counts[name] - expected) ** 2 / expected for name in roster.by_name)
            assert chi_square / (number - 1) < 2.5
