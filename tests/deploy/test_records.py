"""Settings, errors, conversations and load: the small rooms of the deployment."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.app import application
from deploy.calls import SessionParts, engine_session_id, name_in_tenant, parts_of_session_id
from deploy.conversations import KEYS_PER_CONVERSATION, ConversationRecord, Conversations
from deploy.errors import STATUS, BodyTooLarge, ModelNotFound, ReplicaLost, error_answer, error_event
from deploy.load import LoadMeter
from deploy.local import check_port_is_free, start_failure
from deploy.settings import DeploySettings
from loopserve import errors
from loopserve.dialogue import FinishReason, Mode, QualityReport, SessionId, TurnUsage
from loopserve.stats import StepStats, TurnStats


def test_every_error_of_the_tree_has_a_status():
    tree = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LoopServeError)
    ]
    assert len(tree) >= 9
    assert set(tree) <= set(STATUS)


@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (errors.InvalidRequest("no", param="x"), 400, "invalid_request", None),
        (errors.ContextLengthExceeded("long"), 400, "context_length_exceeded", None),
        (errors.UnsupportedField("no"), 400, "unsupported_parameter", None),
        (BodyTooLarge("big"), 413, "request_too_large", None),
        (errors.NotFound("gone"), 404, "not_found", None),
        (ModelNotFound("gone"), 404, "model_not_found", None),
        (errors.Overloaded("full", retry_after_s=7.2), 429, "overloaded", "8"),
        (errors.Overloaded("full", retry_after_s=0.0), 429, "overloaded", "1"),
        (errors.EngineUnavailable("dead"), 503, "engine_unavailable", "2"),
        (ReplicaLost("lost"), 503, "replica_lost", "2"),
        (errors.LoopServeError("?"), 500, "internal_error", None),
    ],
)
def test_errors_leave_in_openai_shape(error: errors.LoopServeError, status: int, code: str, retry: str | None):
    answer = error_answer(error)
    inside = json.loads(answer.body)["error"]
    assert (answer.status, inside["code"], answer.headers.get("retry-after")) == (status, code, retry)
    assert set(inside) == {"message", "type", "param", "code"}
    assert (inside["message"], inside["param"]) == (error.message, error.param)


def test_what_is_not_ours_tells_nothing_of_its_inside():
    answer = error_answer(KeyError("secret"))
    assert answer.status == 500
    assert b"secret" not in answer.body


def test_an_error_event_is_one_event_and_claims_no_success():
    event = error_event(errors.EngineUnavailable("line\nbreak"))
    assert event.startswith(b"data: {") and event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2 and b"[DONE]" not in event


def test_settings_come_from_plain_names_then_prefixed_ones_then_arguments():
    env = {"HOST": "0.0.0.0", "PORT": "9000", "REPLICAS": "2", "LOOPSERVE_REPLICAS": "3", "LOOPSERVE_ENGINE_SEED": "1"}
    settings = DeploySettings.from_env({**env, "LOOPSERVE_ASK_TIMEOUT_S": "1.5", "MODEL": ""}, replicas=4)
    assert (settings.host, settings.port, settings.replicas, settings.ask_timeout_s) == ("0.0.0.0", 9000, 4, 1.5)
    assert DeploySettings.from_env(env).replicas == 3
    assert DeploySettings.from_env({"LOOPSERVE_TORCH_THREADS": "null"}).torch_threads is None


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"PORT": "http"}, "PORT"),
        ({"PORT": "70000"}, "port"),
        ({"REPLICAS": "0"}, "replicas"),
        ({"LOOPSERVE_REPLICAS": "true"}, "int is needed"),
        ({"LOOPSERVE_REPLIKAS": "1"}, "replikas"),
        ({"LOOPSERVE_IDLE_TIMEOUT_S": "soon"}, "float is needed"),
        ({"LOOPSERVE_IDLE_TIMEOUT_S": "0"}, "idle_timeout_s"),
    ],
)
def test_settings_that_cannot_be_are_refused(env: dict[str, str], said: str):
    with pytest.raises(errors.ConfigError, match=said):
        DeploySettings.from_env(env)


def test_a_port_in_use_is_named_with_its_remedy():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(errors.ConfigError, match=f"127.0.0.1:{port}.*PORT"):
            check_port_is_free("127.0.0.1", port)
    check_port_is_free("127.0.0.1", port)


def test_the_reason_of_a_failed_start_is_found_in_serves_message():
    message = "DEPLOY_FAILED Traceback ...\nRuntimeError: loopserve start failed [UnsupportedModel] Sliding window\nis on. [end]\n more"
    failure = start_failure(message)
    assert isinstance(failure, errors.UnsupportedModel)
    assert failure.message == "Sliding window\nis on."
    assert isinstance(start_failure("DEPLOY_FAILED x\nImportError: no"), errors.EngineUnavailable)
    assert start_failure("still starting") is None


@given(st.text(max_size=5), st.text(max_size=5), st.text(max_size=5), st.text(max_size=5))
def test_sessions_of_two_tenants_never_meet(tenant: str, other: str, name: str, other_name: str):
    mine, theirs = engine_session_id(tenant, name), engine_session_id(other, other_name)
    assert (mine == theirs) == ((tenant, name) == (other, other_name))
    assert name_in_tenant(tenant, mine) == name
    assert parts_of_session_id(mine) == SessionParts(tenant, name)
    assert name_in_tenant(other, mine) == (name if tenant == other else None)


def test_a_session_of_another_making_belongs_to_nobody():
    assert name_in_tenant("t", SessionId("plain")) is None
    for other in ("plain", "74", "7/s", "ff/s", "xx/s"):
        assert parts_of_session_id(SessionId(other)) is None


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_a_conversation_is_found_by_its_last_answers():
    table = Conversations(limit=10, clock=Clock())
    table.use("s", "name")
    table.learn("s", "c1")
    table.learn("s", "c2")
    assert table.name_of("c1") == table.name_of("c2") == "name"
    assert table.name_of("c3") is None and table.name_of(None) is None
    assert table.claims(10) == [("s", 1.0), ("c2", 1.0), ("c1", 1.0)]
    table.forget("s")
    assert table.name_of("c1") is None and table.claims(10) == [] and len(table) == 0


def test_branches_are_published_after_the_newest_answer_of_every_conversation():
    table = Conversations(limit=10, clock=Clock())
    for session in ("s", "t"):
        table.use(session, session)
        for number in (1, 2, 3):
            table.learn(session, f"{session}{number}")
    assert [key for key, _ in table.claims(10)] == ["t", "t3", "s", "s3", "t2", "t1", "s2", "s1"]
    assert [key for key, _ in table.claims(5)] == ["t", "t3", "s", "s3", "t2"]


def test_what_was_never_used_or_is_forgotten_learns_nothing():
    table = Conversations(limit=10, clock=Clock())
    table.learn("s", "c")
    assert table.name_of("c") is None


def test_the_least_recently_used_conversation_is_forgotten_first():
    table = Conversations(limit=2, clock=Clock())
    for key in ("a", "b"):
        table.use(key, key)
        table.learn(key, f"{key}-said")
    table.use("a", "a")
    table.use("c", "c")
    assert (table.name_of("a-said"), table.name_of("b-said")) == ("a", None)
    assert [key for key, _ in table.claims(10)] == ["c", "a", "a-said"]
    assert len(table.claims(1)) == 1


def test_a_conversation_is_found_where_it_moved_by_all_its_keys_and_claimed_over_its_old_holder():
    old, new = (Conversations(limit=10, clock=Clock()) for _ in range(2))
    old.use("s", "name", claim="claimed", home="home")
    for said in ("c1", "c2"):
        old.learn("s", said, claim=f"claim-{said}")
    record = old.export("s")
    assert record is not None and old.export("unknown") is None
    new.adopt("s", record, takes_over=True)
    assert new.name_of("c1") == new.name_of("c2") == "name" and new.holds("s")
    assert [key for key, _ in new.claims(9)] == [key for key, _ in old.claims(9)] == ["claimed", "claim-c2", "claim-c1"]
    assert int(new.claims(9)[0][1]) > int(old.claims(9)[0][1]), "in whole seconds, as claims are"
    again = new.export("s")
    assert again is not None and (again.home, again.keys) == ("home", ("c1", "c2"))


def test_who_finds_a_conversation_on_disk_claims_it_no_more_than_who_had_it():
    old, found = (Conversations(limit=10, clock=Clock()) for _ in range(2))
    old.use("s", "name", claim="claimed", home="home")
    old.learn("s", "c")
    record = old.export("s")
    assert record is not None
    found.adopt("s", record, takes_over=False)
    assert found.name_of("c") == "name" and found.claims(9) == old.claims(9)
    for _ in range(5):
        found.use("s", "name")
    found.learn("s", "later")
    newer = found.export("s")
    found.adopt("s", record, takes_over=False)
    assert newer is not None and found.claims(9)[0][1] == newer.last_used_s and found.name_of("later") == "name"


@pytest.mark.parametrize("takes_over", [True, False])
@pytest.mark.parametrize("num_newer", [1, 4, 8])
def test_what_was_said_elsewhere_since_is_newer_than_an_old_copy_here(num_newer: int, takes_over: bool):
    elsewhere, here = (Conversations(limit=10, clock=Clock()) for _ in range(2))
    elsewhere.use("s", "name", home="old home")
    for number in range(8):
        elsewhere.learn("s", f"c{number}")
    copy = elsewhere.export("s")
    assert copy is not None
    here.adopt("s", copy, takes_over=False)
    for number in range(8, 8 + num_newer):
        elsewhere.use("s", "name", home="new home")
        elsewhere.learn("s", f"c{number}")
    newer = elsewhere.export("s")
    assert newer is not None
    here.adopt("s", newer, takes_over=takes_over)
    found = here.export("s")
    assert found is not None and (found.keys, found.home) == (newer.keys, "new home")
    assert [here.name_of(f"c{number}") for number in range(8 + num_newer)] == [None] * num_newer + ["name"] * 8


def test_what_lies_on_disk_takes_nobodys_place():
    table, elsewhere = Conversations(limit=2, clock=Clock()), Conversations(limit=9, clock=Clock())
    for key in ("x", "y"):
        elsewhere.use(key, key)
    table.use("a", "a")
    records = [elsewhere.export(key) for key in ("x", "y")]
    held = [table.adopt(r.name, r, takes_over=False) for r in records if r is not None]
    assert held == [True, False] and [table.holds(key) for key in "axy"] == [True, True, False]
    table.use("b", "b")
    assert [table.holds(key) for key in "abx"] == [True, True, False]


def test_a_record_is_another_one_once_a_turn_was_accepted_or_has_ended():
    table = Conversations(limit=10, clock=Clock())
    table.use("s", "name", home="h")
    records = [table.export("s")]
    table.use("s", "name", home="h")
    records.append(table.export("s"))
    table.learn("s", "c")
    records.append(table.export("s"))
    assert len(set(records)) == 3 and table.export("s") == records[2]


def test_what_was_said_here_is_newer_than_what_came_with_a_move():
    table, elsewhere = (Conversations(limit=10, clock=Clock()) for _ in range(2))
    elsewhere.use("s", "name")
    for number in range(KEYS_PER_CONVERSATION):
        elsewhere.learn("s", f"there{number}")
    elsewhere.learn("s", "shared")
    table.use("t", "other")
    table.learn("t", "shared")
    for _ in range(9):
        table.use("s", "name")
    for said in ("first here", "here"):
        table.learn("s", said)
    record = elsewhere.export("s")
    assert record is not None
    table.adopt("s", record, takes_over=True)
    assert (table.name_of("here"), table.name_of("shared")) == ("name", "other")
    assert table.name_of(f"there{KEYS_PER_CONVERSATION - 1}") == "name" and table.name_of("there1") is None
    kept = table.export("s")
    assert kept is not None and kept.keys[-1] == "here" and len(kept.keys) == KEYS_PER_CONVERSATION
    assert kept.last_used_s == 10.0, "its own use here was later"


def test_a_session_that_moves_in_takes_the_place_of_the_least_recently_used():
    table, elsewhere = Conversations(limit=2, clock=Clock()), Conversations(limit=9, clock=Clock())
    for key in ("a", "b"):
        table.use(key, key)
    elsewhere.use("s", "s")
    record = elsewhere.export("s")
    assert record is not None
    table.adopt("s", record, takes_over=True)
    assert [table.holds(key) for key in "abs"] == [False, True, True]


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(0, 30), st.sampled_from(["use", "learn", "forget", "adopt"]))
    )
)
def test_the_table_never_outgrows_its_limits_and_never_points_nowhere(acts: list[tuple[str, int, str]]):
    table = Conversations(limit=3, clock=Clock())
    for session, said, act in acts:
        if act == "use":
            table.use(session, session)
        elif act == "learn":
            table.learn(session, f"c{said}")
        elif act == "adopt":
            keys = tuple((f"c{number}", f"c{number}") for number in range(said, min(said + 4, 31)))
            record = ConversationRecord(session, session, "", float(said), keys)
            table.adopt(session, record, takes_over=said % 2 == 0)
        else:
            table.forget(session)
    found = [table.name_of(f"c{said}") for said in range(31)]
    held = {key for key, _ in table.claims(1000)}
    assert len(table) <= 3
    assert {name for name in found if name} <= held
    assert all(found.count(name) <= KEYS_PER_CONVERSATION for name in set(found) - {None})


def _turn(queue_s: float | None, total_s: float) -> TurnStats:
    usage = TurnUsage(1, 0, 1, QualityReport(Mode.EXACT))
    return TurnStats(SessionId("s"), 1, FinishReason.STOP, usage, queue_s, 1.0, total_s, 0)


def _step(**counts: int) -> StepStats:
    values = {"num_prefill_tokens": 0, "num_decode_tokens": 1, "num_running": 1, "num_waiting": 0, **counts}
    return StepStats(step_index=1, duration_s=0.5, num_preempted=0, num_free_blocks=9, **values)


def test_load_is_the_turns_without_a_place_over_the_rate_of_a_full_batch():
    meter = LoadMeter(max_running_turns=4)
    meter.on_step(_step(num_running=4, num_waiting=8, num_prefill_tokens=100))
    assert meter.queue_s == 0.0  # nothing is known of a turn's length
    meter.on_turn(_turn(queue_s=0.0, total_s=2.0))
    assert meter.queue_s == pytest.approx(8 * 2.0 / 4)
    assert meter.prefill_s_per_token == pytest.approx(0.005)


def test_a_burst_for_which_the_batch_has_places_is_no_load():
    meter = LoadMeter(max_running_turns=32)
    meter.on_turn(_turn(queue_s=0.01, total_s=2.0))
    meter.on_step(_step(num_running=1, num_waiting=8))
    assert meter.queue_s == pytest.approx(0.01)


def test_turns_that_wait_for_memory_are_load():
    meter = LoadMeter(max_running_turns=32)
    meter.on_turn(_turn(queue_s=3.0, total_s=5.0))
    meter.on_step(_step(num_running=2, num_waiting=8))
    assert meter.queue_s == pytest.approx(3.0)
    meter.on_step(_step(num_running=2, num_waiting=0))
    assert meter.queue_s == 0.0


def test_a_turn_that_never_ran_and_a_step_of_decode_measure_nothing():
    meter = LoadMeter(max_running_turns=4)
    meter.on_turn(_turn(queue_s=None, total_s=99.0))
    meter.on_step(_step(num_prefill_tokens=3))
    assert (meter.service_s, meter.prefill_s_per_token) == (0.0, 0.0)


def test_load_passes_everything_on():
    inner = LoadMeter(max_running_turns=4)
    outer = LoadMeter([inner], max_running_turns=4)
    outer.on_step(_step(num_waiting=3))
    outer.on_turn(_turn(queue_s=0.0, total_s=2.0))
    assert (inner.num_waiting, inner.service_s) == (3, 2.0)


def test_a_clusters_yaml_can_name_the_application_and_overrule_settings():
    with pytest.raises(errors.ConfigError, match="replicas"):
        application({"replicas": 0})
    assert application({"replicas": 2, "device": "cpu"}) is not None
