"""The benchmark of routing decisions measures decisions that are right, of every kind that it names, and can miss its target."""

import json
import time
from pathlib import Path

from benchmarks.cluster.router_decision import KINDS, TARGET_US, Cost, Fleet, cost_table, main
from router.affinity import Affinity, AffinitySettings, Reason, ReplicaView, Roster, load_from_stats

SIZES = ["--sessions", "200", "--replicas", "5", "--requests", "20", "--publishes", "2", "--force"]


def test_requests_are_of_the_kind_they_are_called() -> None:
    fleet = Fleet(num_replicas=5, num_sessions=200, claims_max=400, seed=1)
    affinity = Affinity(AffinitySettings(), clock=time.monotonic)
    affinity.publish({name: stats["own"] for name, stats in fleet.stats.items()})
    roster = Roster([ReplicaView(name, load_from_stats(stats)) for name, stats in fleet.stats.items()])
    reasons = {kind: {affinity.rank(key, roster).reason for key in fleet.requests(kind, 50)} for kind in KINDS}
    assert reasons["resident"] == {Reason.OWNER}
    assert reasons["new"] <= {Reason.HOME, Reason.SPILL}
    assert reasons["goes on, not published"] == {Reason.HOME}


def test_a_replica_publishes_no_more_than_it_may() -> None:
    fleet = Fleet(num_replicas=2, num_sessions=200, claims_max=16, seed=1)
    assert {len(stats["own"]) for stats in fleet.stats.values()} == {16 * 8}


def test_a_median_over_the_target_is_a_miss_that_the_table_shows() -> None:
    slow = Cost("rank, new", TARGET_US + 0.1, 90.0, TARGET_US)
    assert not slow.passed and Cost("publish", 1e6, 2e6).passed
    assert cost_table([slow]).rows[0][-1] == "NO"


def test_a_tiny_run_writes_every_number_and_its_machine(tmp_path: Path) -> None:
    status = main([*SIZES, "--out", str(tmp_path), "--name", "tiny"])
    result = json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))
    assert status == (0 if result["passed"] else 1)
    assert [cost["what"] for cost in result["costs"]] == [
        *(f"{call}, {kind}" for call in ("rank", "choose_replicas") for kind in KINDS),
        *(f"publish, {what}" for what in ("all new", "one changed", "nothing changed")),
    ]
    assert all(0 < cost["median_us"] <= cost["p99_us"] for cost in result["costs"])
    assert result["machine"]["commit"] and result["versions"]["ray"]
    assert "| rank, resident |" in (tmp_path / "tiny.md").read_text(encoding="utf-8")
