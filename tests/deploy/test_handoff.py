"""Replicas give sessions away and take them over, in this process: what the next turn finds, and what happens when things go wrong."""

import asyncio
import json
import threading
from array import array
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fake_backend import MODEL, FakeEngine
from local_fleet import LocalFleet, client_of

from deploy.calls import Accepted, TurnCall, engine_session_id
from deploy.conversations import ConversationRecord
from deploy.handoff.arrivals import Arrivals
from deploy.handoff.departures import Departures
from deploy.handoff.holdings import Doors
from deploy.handoff.papers import Papers, encode_papers
from deploy.handoff.records import PROTOCOL_VERSION, Offer, Piece, Receipt, Result, Said, Standing
from deploy.handoff.settings import HandoffSettings
from deploy.protocol import parse_chat
from deploy.replica import Replica
from deploy.settings import DeploySettings
from loopserve.transcripts import Mark, Transcript
from router.affinity import ReplicaName, rendezvous
from router.identity import home_of_name, session_key

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
SMALL_PIECES = HandoffSettings(piece_bytes=64)  # an image takes several


class LocalPeers:
    """The other replicas of a `LocalFleet`. `before_piece` is called with each piece that is about to arrive."""

    def __init__(self, fleet: LocalFleet, own: str) -> None:
        self.fleet, self.own = fleet, own
        self.before_piece: Callable[[str, Piece], Awaitable[None]] | None = None
        self.offers: list[tuple[str, Offer]] = []
        self.pieces: list[Piece] = []
        self.receipts: list[Receipt] = []
        self.told: list[tuple[str, dict[str, int]]] = []

    async def standings(self) -> Mapping[str, Standing]:
        return {name: replica.standing() for name, replica in self.fleet.replicas.items() if name != self.own}

    async def offer(self, target: str, offer: Offer) -> Receipt:
        self.offers.append((target, offer))
        self.receipts.append(await self.fleet.replicas[target].arrivals.offer(offer))
        return self.receipts[-1]

    async def piece(self, target: str, piece: Piece) -> Receipt:
        self.pieces.append(piece)
        if self.before_piece is not None:
            await self.before_piece(target, piece)
        self.receipts.append(await self.fleet.replicas[target].arrivals.piece(piece))
        return self.receipts[-1]

    async def count_left(self, target: str, counts: Mapping[str, int]) -> None:
        self.told.append((target, dict(counts)))
        self.fleet.replicas[target].arrivals.count_left(counts)


def fleet_of(*names: str, handoff: HandoffSettings = SMALL_PIECES, **fields: Any) -> LocalFleet:
    return LocalFleet(DeploySettings(handoff=handoff, **fields), names=names)


def body(*texts: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    return {"model": MODEL, "messages": messages, **fields}


def departures(fleet: LocalFleet, name: str) -> Departures:
    return fleet.replicas[name]._departures


def gone(fleet: LocalFleet, name: str) -> None:
    """As Serve does: the replica is not routed to any more, and then it ends."""
    del fleet.replicas[name]


def counted(fleet: LocalFleet, name: str) -> dict[str, float]:
    """Hand-offs on a replica's page, by result; those that came are there."""
    families = fleet.measured[name]._page.families()
    found = [sample for family in families for sample in family.samples if sample.name == "loopserve_handoffs_total"]
    return {sample.labels["result"]: sample.value for sample in found if sample.value}


def cached(response: httpx.Response) -> int:
    assert response.status_code == 200, response.text
    return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


async def talk(client: httpx.AsyncClient, opening: str, headers: dict[str, str]) -> tuple[str, list[str]]:
    """Two turns; the replica that answered, and what was said, the next question included."""
    texts = [opening]
    for turn in range(2):
        answer = await client.post(CHAT, json=body(*texts), headers=headers)
        assert answer.status_code == 200, answer.text
        texts += [answer.json()["choices"][0]["message"]["content"], f"turn {turn}"]
    return answer.headers["x-loopserve-replica"], texts


async def dialogues(client: httpx.AsyncClient, number: int = 12) -> dict[str, list[tuple[dict[str, str], list[str]]]]:
    """Named ones, nameless ones, and those of a tenant, by the replica that holds them."""
    held: dict[str, list[tuple[dict[str, str], list[str]]]] = {}
    for n in range(number):
        headers = {"x-session-id": f"named-{n}"} if n % 3 == 0 else {"x-tenant-id": "acme"} if n % 3 == 1 else {}
        replica, texts = await talk(client, f"dialogue {n}", headers)
        held.setdefault(replica, []).append((headers, texts))
    return held


async def test_what_a_draining_replica_held_goes_on_at_its_next_home_and_nothing_is_computed_again():
    fleet = fleet_of("a", "b", "c")
    async with client_of(fleet) as client:
        held = await dialogues(client)
        assert {"a", "b", "c"} == set(held)
        peers = LocalPeers(fleet, "a")
        results = await departures(fleet, "a").drain(peers)
        assert results == {Result.MOVED: len(held["a"])}
        assert fleet.engines["a"].kept == {} and fleet.replicas["a"].routing_stats()["own"] == b""
        gone(fleet, "a")
        for headers, texts in (dialogue for of_one in held.values() for dialogue in of_one):
            answer = await client.post(CHAT, json=body(*texts), headers=headers)
            words = sum(len(text.split()) for text in texts)
            assert cached(answer) == words - 2, "all that was said before the new question"
    assert sum(counted(fleet, name)["moved"] for name in "bc") == len(held["a"])
    assert peers.told == [], "there is nothing that only the ending replica knows"
    assert len({target for target, _ in peers.offers}) == 2


async def test_before_the_new_holder_is_published_routers_find_it_by_its_place_and_after_by_its_claim():
    fleet = fleet_of("a", "b", "c")
    async with client_of(fleet) as client:
        held = await dialogues(client)
        peers = LocalPeers(fleet, "a")
        await departures(fleet, "a").drain(peers)
        places = {offer.transfer: target for target, offer in peers.offers}
        gone(fleet, "a")
        for claims_are_seen in (False, True):
            if not claims_are_seen:
                for replica in fleet.replicas.values():
                    replica.routing_stats = lambda own=replica: {"own": b"", **own._load_stats()}  # type: ignore[method-assign]
            else:
                for replica in fleet.replicas.values():
                    del replica.routing_stats
            for headers, texts in held["a"]:
                assert cached(await client.post(CHAT, json=body(*texts), headers=headers)) > 0
    assert len(places) == len(held["a"])


async def test_transcripts_go_with_their_session():
    fleet = fleet_of("a", "b")
    async with client_of(fleet) as client:
        held = await dialogues(client)
        kept = Transcript(array("I", [5, 6]), (Mark(3, 2, b"m" * 16),))
        for session_id in fleet.engines["a"].kept:
            fleet.chats["a"].transcripts[session_id] = (kept,)
        await departures(fleet, "a").drain(LocalPeers(fleet, "a"))
    assert len(fleet.chats["b"].transcripts) == len(held["a"])
    assert all(found == (kept,) for found in fleet.chats["b"].transcripts.values())
    assert fleet.chats["a"].transcripts == {}


async def test_a_replica_that_drains_takes_neither_turns_nor_sessions():
    fleet = fleet_of("a", "b")
    async with client_of(fleet) as client:
        held = await dialogues(client)
        await departures(fleet, "a").drain(LocalPeers(fleet, "a"))
        assert fleet.replicas["a"].routing_stats()["accepting"] is False
        peers = LocalPeers(fleet, "b")
        results = await departures(fleet, "b").drain(peers)
        assert results == {} and peers.offers == [], "the last one has nobody to give them to"
        assert len(fleet.engines["b"].kept) == sum(map(len, held.values()))


async def test_a_replica_without_sessions_asks_nobody():
    fleet = fleet_of("a", "b")
    peers = LocalPeers(fleet, "a")
    peers.standings = None  # type: ignore[method-assign, assignment]
    assert await departures(fleet, "a").drain(peers) == {}
    off = fleet_of("a", "b", handoff=HandoffSettings(enabled=False))
    async with client_of(off) as client:
        await dialogues(client)
    assert await departures(off, "a").drain(peers) == {}


def _refused_import(fleet: LocalFleet, target: str) -> None:
    fleet.engines[target].import_session = _raises(ValueError("a checksum"))  # type: ignore[method-assign]


def _raises(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


async def _hangs(*_: object) -> Any:
    await asyncio.sleep(3600)


@pytest.mark.parametrize(
    ("trouble", "result"),
    [
        ("refused", Result.REFUSED),
        ("dead engine", Result.REFUSED),
        ("target gone", Result.FAILED),
        ("target silent", Result.TIMED_OUT),
        ("export", Result.FAILED),
        ("flipped bit", Result.REFUSED),
        ("cut off", Result.REFUSED),
    ],
)
async def test_whatever_goes_wrong_is_counted_and_the_next_turn_is_answered(trouble: str, result: Result):
    fleet = fleet_of("a", "b", handoff=replace(SMALL_PIECES, move_timeout_s=0.2))
    async with client_of(fleet) as client:
        headers = {"x-session-id": next(n for n in map(str, range(99)) if _home(n, "a", "b") == "a")}
        _, texts = await talk(client, "hello", headers)
        peers = LocalPeers(fleet, "a")
        if trouble == "refused":
            _refused_import(fleet, "b")
        elif trouble == "dead engine":
            peers.before_piece = lambda *_: _stop(fleet.engines["b"])
        elif trouble == "target gone":
            peers.piece = _raises(ConnectionError("gone"))  # type: ignore[method-assign]
        elif trouble == "target silent":
            peers.piece = _hangs  # type: ignore[method-assign]
        elif trouble == "export":
            fleet.engines["a"].export_session = _raises(RuntimeError("no"))  # type: ignore[method-assign]
        else:
            original = peers.piece

            async def damaged(target: str, piece: Piece) -> Receipt:
                data = piece.data[:-1] if trouble == "cut off" else bytes([piece.data[0] ^ 1]) + piece.data[1:]
                return await original(target, replace(piece, data=data))

            peers.piece = damaged  # type: ignore[method-assign]
        assert await departures(fleet, "a").drain(peers) == {result: 1}
        assert counted(fleet, "b") == {result.value: 1.0}, "by one who lives, once"
        assert len(fleet.engines["a"].kept) == 1, "it stays where it was"
        fleet.engines["b"].is_running = True
        gone(fleet, "a")
        answer = await client.post(CHAT, json=body(*texts), headers=headers)
        assert cached(answer) == 0
        assert fleet.replicas["b"].arrivals._incoming == {} or trouble in ("target gone", "target silent")


async def _stop(engine: FakeEngine) -> None:
    engine.is_running = False


def _home(name: str, *replicas: str) -> str:
    return rendezvous(home_of_name("", name), [ReplicaName(replica) for replica in replicas])[0]


async def test_a_target_that_is_gone_is_not_tried_for_every_session():
    fleet = fleet_of("a", "b")
    async with client_of(fleet) as client:
        held = await dialogues(client)
        peers = LocalPeers(fleet, "a")
        tries: list[str] = []

        async def offer(target: str, _: Offer) -> Receipt:
            tries.append(target)
            raise ConnectionError("gone")

        peers.offer = offer  # type: ignore[method-assign]
        assert await departures(fleet, "a").drain(peers) == {Result.FAILED: len(held["a"])}
    assert tries == ["b"] and peers.told == [("b", {"failed": len(held["a"])})]


async def test_a_drain_ends_in_time_with_the_hottest_moved_and_the_rest_counted():
    fleet = fleet_of("a", "b", stop_timeout_s=1.0)
    async with client_of(fleet) as client:
        held = await dialogues(client)
        order = []
        for age, session_id in enumerate(fleet.engines["a"].kept):
            fleet.engines["a"].kept[session_id] = replace(fleet.engines["a"].kept[session_id], idle_s=100.0 - age)
            order.append(session_id)
        peers = LocalPeers(fleet, "a")

        async def stands_still_after_two(*_: object) -> None:
            if sum(receipt.said is Said.MOVED for receipt in peers.receipts) == 2:
                await asyncio.sleep(3600)

        peers.before_piece = stands_still_after_two
        results = await departures(fleet, "a").drain(peers)
    assert results == {Result.MOVED: 2, Result.TIMED_OUT: 1, Result.OVER_LIMIT: len(held["a"]) - 3}
    moved = set(fleet.engines["b"].kept) & set(order)
    assert moved == set(order[-2:]), "those that were used last"
    assert counted(fleet, "b") == {str(result): float(count) for result, count in results.items()}


async def test_what_does_not_pay_or_is_too_large_stays_and_is_counted():
    fleet = fleet_of("a", "b")
    async with client_of(fleet) as client:
        held = await dialogues(client)
    fleet.replicas["b"]._load.prefill_s_per_token = 1e-3
    kept = fleet.engines["a"].kept
    large, dear, *_ = kept
    kept[large] = replace(kept[large], num_kv_bytes=3 << 30, num_cached_tokens=1_000_000)
    for session_id in kept:
        if session_id not in (large, dear):
            kept[session_id] = replace(kept[session_id], num_cached_tokens=2000)
    results = await departures(fleet, "a").drain(LocalPeers(fleet, "a"))
    number = len(held["a"])
    assert results == {Result.MOVED: number - 2, Result.NOT_WORTH_IT: 1, Result.OVER_LIMIT: 1}
    assert set(kept) == {large, dear}


def turn_call(name: str | None, *texts: str, continuation: str | None = None, tenant: str = "") -> TurnCall:
    request = parse_chat(json.dumps(body(*texts)).encode(), branches_max=1)
    home = home_of_name(tenant, name or "x")
    return TurnCall(request, tenant, name, home, continuation, "id", 0)


async def answered(replica: Replica, call: TurnCall) -> Accepted:
    items = [item async for item in replica.chat(call)]
    assert isinstance(items[0], Accepted), items
    return items[0]


async def test_a_turn_that_comes_while_its_session_is_sent_goes_first_and_keeps_it():
    fleet = fleet_of("a", "b")
    replica = fleet.replicas["a"]
    await answered(replica, turn_call("s", "one two three"))
    peers = LocalPeers(fleet, "a")
    seen: list[Accepted] = []

    async def a_turn_comes(_: str, piece: Piece) -> None:
        if piece.index == 1:
            seen.append(await answered(replica, turn_call("s", "one two three", "word word word", "more")))

    peers.before_piece = a_turn_comes
    assert await departures(fleet, "a").drain(peers) == {Result.BUSY: 1}
    assert seen[0].cached_tokens == 6
    assert engine_session_id("", "s") in fleet.engines["a"].kept
    assert fleet.engines["b"].kept == {}


async def test_a_turn_that_comes_with_the_last_piece_keeps_the_newer_state_and_the_newer_claim():
    fleet = fleet_of("a", "b")
    replica = fleet.replicas["a"]
    clock = {"s": 1000.0}
    for one in fleet.replicas.values():
        one._conversations._clock = lambda: clock["s"]
    await answered(replica, turn_call("s", "one two three"))
    clock["s"] += 60
    peers = LocalPeers(fleet, "a")
    number = {"last": 0}

    async def a_turn_comes(_: str, piece: Piece) -> None:
        size = sum(len(p.data) for p in peers.pieces)
        if size == peers.offers[0][1].papers_bytes + peers.offers[0][1].image_bytes:
            number["last"] = piece.index
            await answered(replica, turn_call("s", "one two three", "word word word", "more"))

    peers.before_piece = a_turn_comes
    assert await departures(fleet, "a").drain(peers) == {Result.MOVED: 1}
    assert number["last"] > 1
    assert engine_session_id("", "s") in fleet.engines["a"].kept, "the newer state is not thrown away"
    key = session_key("", "s")
    claims = {name: dict(one._conversations.claims(9))[key] for name, one in fleet.replicas.items()}
    assert claims["a"] > claims["b"]


class SlowEngine(FakeEngine):
    """Takes and lets go of sessions only when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.may = threading.Event()
        self.began = threading.Event()

    def import_session(self, data: bytes) -> Any:
        self.began.set()
        assert self.may.wait(10)
        return super().import_session(data)

    def release(self, session_id: Any, *, cache_salt: str | None = None) -> None:
        self.began.set()
        assert self.may.wait(10)
        super().release(session_id, cache_salt=cache_salt)


def slow(fleet: LocalFleet, name: str) -> SlowEngine:
    """Put a slow engine into a replica."""
    engine, old = SlowEngine(), fleet.engines[name]
    engine.is_running, engine.kept = True, old.kept
    fleet.engines[name] = fleet.chats[name].engine = engine
    fleet.replicas[name]._engine = fleet.replicas[name]._holdings._engine = engine
    return engine


@pytest.mark.parametrize("named", [True, False])
async def test_a_turn_that_comes_while_its_session_is_taken_in_waits_and_finds_it(named: bool):
    fleet = fleet_of("a", "b")
    async with client_of(fleet) as client:
        headers = {"x-session-id": "s"} if named else {}
        first, texts = await talk(client, "one two three", headers)
        other = "b" if first == "a" else "a"
        engine = slow(fleet, other)
        draining = asyncio.create_task(departures(fleet, first).drain(LocalPeers(fleet, first)))
        await asyncio.to_thread(engine.began.wait, 10)
        gone(fleet, first)
        turn = asyncio.create_task(client.post(CHAT, json=body(*texts), headers=headers))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not turn.done() and fleet.chats[other].requests == []
        engine.may.set()
        assert cached(await turn) > 0
        assert await draining == {Result.MOVED: 1}


async def test_a_turn_that_comes_while_its_session_is_let_go_begins_anew_and_is_not_cancelled():
    fleet = fleet_of("a", "b")
    replica = fleet.replicas["a"]
    await answered(replica, turn_call("s", "one two three"))
    engine = slow(fleet, "a")
    draining = asyncio.create_task(departures(fleet, "a").drain(LocalPeers(fleet, "a")))
    await asyncio.to_thread(engine.began.wait, 10)
    turn = asyncio.create_task(answered(replica, turn_call("s", "one two three", "word word word", "more")))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not turn.done()
    engine.may.set()
    assert (await turn).cached_tokens == 0
    assert await draining == {Result.MOVED: 1}
    assert engine.kept[engine_session_id("", "s")].num_turns == 1


async def test_a_door_that_stays_closed_holds_nobody_for_ever():
    doors = Doors(wait_s=0.05)
    with doors.closed(["k"]):
        await doors.passed("other", None)
        await doors.passed("k")
    await doors.passed("k")


async def offered(arrivals: Arrivals, papers: Papers, image: bytes, *, transfer: str = "t", **fields: Any) -> Receipt:
    """Offer a session as its holder does, in two pieces."""
    data = encode_papers(papers)
    offer = Offer(PROTOCOL_VERSION, transfer, "source", len(data), len(image))
    receipt = await arrivals.offer(replace(offer, **fields))
    for index, part in enumerate((data, image)):
        if receipt.said is Said.GO_ON:
            receipt = await arrivals.piece(Piece(transfer, index, part))
    return receipt


async def parcel(name: str = "s", tenant: str = "t1", last_used_s: float = 5.0) -> tuple[Papers, bytes]:
    """A session as some other replica would send it."""
    fleet = fleet_of("x")
    await answered(fleet.replicas["x"], turn_call(name, "one two three", tenant=tenant))
    session_id, key = engine_session_id(tenant, name), session_key(tenant, name)
    record = ConversationRecord(name, key, "home", last_used_s, (("c", "c"),))
    return Papers(session_id, record, ()), fleet.engines["x"].export_session(session_id)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"version": PROTOCOL_VERSION + 1}, "version"),
        ({"image_bytes": 0}, "image_size"),
        ({"image_bytes": (2 << 30) + 1}, "image_size"),
        ({"papers_bytes": 1 << 30}, "papers_size"),
    ],
)
async def test_an_offer_that_cannot_be_is_refused_before_anything_of_it_comes(fields: dict[str, int], code: str):
    fleet = fleet_of("a")
    receipt = await offered(fleet.replicas["a"].arrivals, *await parcel(), **fields)
    assert receipt == Receipt(Said.REFUSED, code)
    assert counted(fleet, "a") == {"refused": 1.0}


@pytest.mark.parametrize("arrived", [0, 1])
async def test_a_replica_that_begins_to_drain_refuses_what_is_offered_and_what_is_on_its_way(arrived: int):
    papers, image = await parcel()
    fleet = fleet_of("a")
    arrivals, data = fleet.replicas["a"].arrivals, encode_papers(papers)
    receipts = []
    for number in range(2):
        if number == arrived:
            departures(fleet, "a").is_draining = True
        if number == 0:
            receipts.append(await arrivals.offer(Offer(PROTOCOL_VERSION, "t", "source", len(data), len(image))))
        elif arrived:
            receipts.append(await arrivals.piece(Piece("t", 0, data)))
    assert receipts[-1] == Receipt(Said.REFUSED, "not_accepting") and arrivals._incoming == {}


async def test_papers_must_be_of_the_session_whose_image_comes():
    papers, image = await parcel()
    fleet = fleet_of("a")
    arrivals = fleet.replicas["a"].arrivals
    renamed = replace(papers, conversation=replace(papers.conversation, name="other"))
    assert (await offered(arrivals, renamed, image)).code == "papers_mismatch"
    _, foreign = await parcel(tenant="t2")
    assert (await offered(arrivals, papers, foreign)).code == "another_session"
    assert fleet.engines["a"].kept == {} and len(fleet.replicas["a"]._conversations) == 0
    assert (await offered(arrivals, papers, image)).said is Said.MOVED


async def test_pieces_come_in_order_once_and_no_more_than_announced():
    papers, image = await parcel()
    data = encode_papers(papers)
    arrivals = fleet_of("a").replicas["a"].arrivals
    offer = Offer(PROTOCOL_VERSION, "t", "source", len(data), len(image))
    for pieces in (
        [(1, data)],
        [(0, data), (0, image)],
        [(0, data + b"x")],
        [(0, data), (1, image + b"x")],
        [(0, b"")],
    ):
        assert (await arrivals.offer(offer)).said is Said.GO_ON
        receipts = [await arrivals.piece(Piece("t", index, part)) for index, part in pieces]
        assert receipts[-1] == Receipt(Said.REFUSED, "out_of_order")
        assert (await arrivals.piece(Piece("t", 1, image))).code == "unknown_transfer"


async def test_few_sessions_come_at_once_and_one_that_stops_coming_makes_room():
    papers, image = await parcel()
    clock = {"s": 0.0}
    arrivals = fleet_of("a").replicas["a"].arrivals
    arrivals._clock = lambda: clock["s"]
    offer = Offer(PROTOCOL_VERSION, "t0", "source", 50, 50)
    assert (await arrivals.offer(offer)).said is Said.GO_ON
    assert (await arrivals.offer(offer)).code == "overloaded", "twice the same"
    assert (await arrivals.offer(replace(offer, transfer="t1"))).said is Said.GO_ON
    assert (await offered(arrivals, papers, image, transfer="t2")).code == "overloaded"
    clock["s"] += SMALL_PIECES.move_timeout_s + 1
    assert (await offered(arrivals, papers, image, transfer="t3")).said is Said.MOVED
    assert arrivals._incoming == {}


async def test_a_session_that_has_gone_on_here_is_not_replaced_by_what_it_was_elsewhere():
    papers, image = await parcel(tenant="")
    fleet = fleet_of("a")
    replica = fleet.replicas["a"]
    await answered(replica, turn_call("s", "one two three", "word", "and more"))
    before = fleet.engines["a"].kept[papers.session_id]
    assert (await offered(replica.arrivals, papers, image)).code == "newer_here"
    assert fleet.engines["a"].kept[papers.session_id] == before


async def test_a_session_whose_turn_runs_here_is_not_replaced():
    papers, image = await parcel(tenant="", last_used_s=1e12)
    fleet = fleet_of("a")
    running = fleet.replicas["a"].chat(turn_call("s", "tokens=5"))
    await anext(running)
    assert (await offered(fleet.replicas["a"].arrivals, papers, image)).code == "busy"
    await running.aclose()


@pytest.mark.parametrize("when", ["before", "between pieces", "while it is taken in"])
async def test_what_was_deleted_does_not_come_back_with_a_move_that_was_under_way(when: str):
    papers, image = await parcel()
    fleet = fleet_of("a")
    replica = fleet.replicas["a"]
    data = encode_papers(papers)
    if when != "while it is taken in":  # not even for a moment
        fleet.engines["a"].import_session = _raises(AssertionError("the engine is not to see it"))  # type: ignore[method-assign]
    if when == "before":
        assert await replica.release("t1", "s") is False
        assert (await offered(replica.arrivals, papers, image)).code == "released"
    elif when == "between pieces":
        await replica.arrivals.offer(Offer(PROTOCOL_VERSION, "t", "source", len(data), len(image)))
        await replica.arrivals.piece(Piece("t", 0, data))
        await replica.release("t1", "s")
        assert (await replica.arrivals.piece(Piece("t", 1, image))).code == "released"
    else:
        engine = slow(fleet, "a")
        engine.release = super(SlowEngine, engine).release  # type: ignore[method-assign]  # only taking in is slow
        coming = asyncio.create_task(offered(replica.arrivals, papers, image))
        await asyncio.to_thread(engine.began.wait, 10)
        releasing = asyncio.create_task(replica.release("t1", "s"))
        await asyncio.wait([releasing], timeout=0.05)
        assert not releasing.done(), "who deletes is told when it is gone"
        engine.may.set()
        await releasing
        assert (await coming).code == "released"
    assert fleet.engines["a"].kept == {} and len(replica._conversations) == 0
    fleet.engines["a"].__dict__.pop("import_session", None)
    other, other_image = await parcel(name="other")
    assert (await offered(replica.arrivals, other, other_image)).said is Said.MOVED


async def test_what_was_deleted_while_its_replica_drained_is_not_given_to_one_that_has_just_started():
    fleet = fleet_of("a", "b", "c")
    async with client_of(fleet) as client:
        held = await dialogues(client)
        named = [headers["x-session-id"] for headers, _ in held["a"] if "x-session-id" in headers]
        draining = fleet.replicas.pop("a")  # Serve does not ask it any more
        assert (await client.delete(f"/v1/sessions/{named[0]}")).status_code == 404
        fleet.replicas["c"].arrivals._released.clear()  # as one that came later
        peers = LocalPeers(fleet, "a")
        assert await draining._departures.drain(peers) == {Result.MOVED: len(held["a"]) - 1}
    session_id = engine_session_id("", named[0])
    assert not any(session_id in engine.kept for engine in fleet.engines.values())


async def test_a_deletion_is_remembered_as_long_as_a_drain_may_last_and_too_many_close_the_door(
    monkeypatch: pytest.MonkeyPatch,
):
    papers, image = await parcel()
    clock = {"s": 0.0}
    arrivals = fleet_of("a", stop_timeout_s=300.0).replicas["a"].arrivals
    arrivals._clock = lambda: clock["s"]
    monkeypatch.setattr("deploy.handoff.arrivals._RELEASED_MAX", 2)
    key = session_key("t1", "s")
    for name in (key, "x", "y"):  # one more than is remembered
        arrivals.released(name)
    assert arrivals.all_released() == {"x", "y"}
    clock["s"] += 300.0
    assert (await offered(arrivals, papers, image)).code == "released"
    clock["s"] += 61.0
    assert arrivals.all_released() == frozenset()
    assert (await offered(arrivals, papers, image)).said is Said.MOVED


async def test_a_sender_that_gives_up_leaves_no_session_that_nobody_knows():
    papers, image = await parcel()
    fleet = fleet_of("a")
    engine = slow(fleet, "a")
    coming = asyncio.create_task(offered(fleet.replicas["a"].arrivals, papers, image))
    await asyncio.to_thread(engine.began.wait, 10)
    coming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await coming
    engine.may.set()
    for _ in range(200):
        if len(fleet.replicas["a"]._conversations):
            break
        await asyncio.sleep(0.01)
    assert set(engine.kept) == {papers.session_id}
    assert fleet.replicas["a"]._conversations.holds(session_key("t1", "s"))


async def test_a_tenants_session_is_not_found_by_another_after_a_move():
    papers, image = await parcel(tenant="t1")
    fleet = fleet_of("a")
    replica = fleet.replicas["a"]
    assert (await offered(replica.arrivals, papers, image)).said is Said.MOVED
    theirs = await answered(replica, turn_call("s", "one two three", "word word word", "x", tenant="t2"))
    assert theirs.cached_tokens == 0
    mine = await answered(replica, turn_call("s", "one two three", "word word word", "x", tenant="t1"))
    assert mine.cached_tokens == 6
    assert [view.id for view in await replica.sessions("t1")] == ["s"]


def test_only_results_are_counted_for_a_replica_that_ends():
    fleet = fleet_of("a")
    fleet.replicas["a"].arrivals.count_left({"failed": 2, "moved": 5, "nonsense": 3, "busy": -1, "timed_out": 1 << 40})
    assert counted(fleet, "a") == {"failed": 2.0}


async def test_an_overloaded_replica_gives_a_session_back_to_its_home_and_counts_what_it_could_not():
    fleet = fleet_of("a", "b")
    displaced = [name for name in map(str, range(40)) if _home(name, "a", "b") == "b"][:3]
    replica = fleet.replicas["a"]
    for name in displaced:
        await answered(replica, turn_call(name, "one two three"))
    peers = LocalPeers(fleet, "a")
    assert await departures(fleet, "a").rebalance(peers) == {} and peers.offers == []
    replica._load.waited_s, replica._load.num_waiting = 60.0, 3
    waiting = [asyncio.create_task(answered(replica, turn_call(f"w{n}", "tokens=1 wait_ms=500"))) for n in range(3)]
    while replica.standing().load.queue_s == 0:
        await asyncio.sleep(0)
    assert await departures(fleet, "a").rebalance(peers) == {Result.MOVED: 2}
    assert {target for target, _ in peers.offers} == {"b"} and len(fleet.engines["b"].kept) == 2
    peers.offer = _raises(ConnectionError("gone"))  # type: ignore[method-assign]
    assert await departures(fleet, "a").rebalance(peers) == {Result.FAILED: 1}
    assert counted(fleet, "a") == {"failed": 1.0} and counted(fleet, "b") == {"moved": 2.0}
    for task in waiting:
        await task
