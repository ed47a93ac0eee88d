"""Where `auto` turns sparse: what a table may say, which entry a place gets, and that the engine takes it once and tells why."""

import json
import logging
from dataclasses import asdict, replace

import pytest
from fake_device import Inbox, drain, fake_engine, small_config

from loopserve.config import DecodeSparsity, EngineConfig, PrefillSparsity
from loopserve.crossover import (
    NEVER_TOKENS,
    Crossover,
    Place,
    find_crossover,
    read_table,
    shape_key,
    shipped_table,
    write_entry,
)
from loopserve.dialogue import Mode, QualityContract, SamplingParams, SessionId, TokenId, TurnRequest
from loopserve.errors import ConfigError
from loopserve.loading import cpu_model
from loopserve.quality import TurnPolicy
from loopserve.reads import ModelShape

SHAPE = ModelShape(num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128)
H200 = Place("NVIDIA H200", "cuda", SHAPE)
ENTRY = Crossover("NVIDIA H200", "32/8/128", 4096, 8192, 4, "measured for a test")


def table(path, *entries):
    path.write_text(json.dumps({"entries": [asdict(entry) for entry in entries]}))
    return EngineConfig(crossover_file=str(path))


def test_the_shipped_table_knows_every_kind_of_device_and_says_why():
    entries = {entry.key: entry for entry in read_table(shipped_table())}
    assert {("cpu", "any"), ("cuda", "any"), ("any", "any")} <= entries.keys()
    for entry in entries.values():
        assert len(entry.reason) > 20
        assert (entry.decode_rows is None) != entry.reason.startswith("measured")
    assert "not measured" in entries["cuda", "any"].reason


@pytest.mark.parametrize(("device", "kind"), [("NVIDIA H9000", "cuda"), ("a new processor", "cpu"), ("M9", "mps")])
def test_a_device_that_nobody_measured_gets_the_entry_of_its_kind(device, kind):
    found = find_crossover(EngineConfig(), Place(device, kind, SHAPE))
    assert found.source == shipped_table()
    assert found.entry.key == (kind if kind in ("cpu", "cuda") else "any", "any")


def test_the_device_by_name_wins_over_its_kind_and_the_shape_over_any(tmp_path):
    any_shape = replace(ENTRY, shape="any", prefill_min_context_tokens=1)
    others = replace(ENTRY, shape="16/8/128"), replace(ENTRY, device="cuda", shape="32/8/128")
    config = table(tmp_path / "own.json", *others, any_shape, ENTRY)
    assert find_crossover(config, H200).entry == ENTRY
    assert find_crossover(config, replace(H200, shape=replace(SHAPE, num_heads=64))).entry == any_shape
    assert find_crossover(config, replace(H200, device="NVIDIA L4")).entry == others[1]


def test_the_users_table_is_asked_first_and_the_shipped_one_where_it_knows_nothing(tmp_path):
    config = table(tmp_path / "own.json", replace(ENTRY, device="cuda", shape="any"))
    assert find_crossover(config, H200).source == tmp_path / "own.json"
    assert find_crossover(config, Place("a processor", "cpu", SHAPE)).source == shipped_table()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        ("{", "no JSON"),
        ("\xff", "no JSON"),
        ("[]", "no object with one list"),
        ('{"entries": {}}', "no object with one list"),
        ('{"entries": [7]}', r"entries\[0\] is no object"),
        ('{"entries": [{"device": "cpu"}]}', r"entries\[0\]\.shape"),
        (json.dumps({"entries": [asdict(ENTRY) | {"speed": 3}]}), "no setting 'speed'"),
        (json.dumps({"entries": [asdict(ENTRY) | {"shape": "32x8"}]}), r"entries\[0\]: shape is '32x8'"),
        (json.dumps({"entries": [asdict(ENTRY) | {"decode_min_context_tokens": 0}]}), "decode_min_context_tokens is 0"),
        (json.dumps({"entries": [asdict(ENTRY) | {"prefill_min_context_tokens": "long"}]}), "'long' does not fit"),
        (json.dumps({"entries": [asdict(ENTRY), asdict(ENTRY)]}), "two entries"),
        (" " * (1 << 20) + "{}", "bytes"),
    ],
)
def test_an_unusable_table_is_refused_with_its_name_the_problem_and_a_remedy(tmp_path, content, problem):
    path = tmp_path / "own.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=problem) as refused:
        fake_engine(small_config(crossover_file=str(path)))
    assert str(path) in refused.value.message
    assert "loopserve bench --tune" in refused.value.message


def test_writing_an_entry_replaces_its_own_and_leaves_the_others(tmp_path):
    path = tmp_path / "own.json"
    write_entry(path, ENTRY)
    write_entry(path, replace(ENTRY, shape="any"))
    write_entry(path, replace(ENTRY, decode_min_context_tokens=None))
    assert read_table(path) == (replace(ENTRY, shape="any"), replace(ENTRY, decode_min_context_tokens=None))


def request(num_tokens: int):
    """A turn of nobody's wishes."""
    prompt = tuple(TokenId(1 + index % 5) for index in range(num_tokens))
    return TurnRequest(SessionId("s"), prompt, sampling=SamplingParams(max_tokens=6))


def own_table(path, **thresholds):
    """A table with the entry of this processor and the fake model."""
    engine, _ = fake_engine()
    entry = replace(ENTRY, device=cpu_model(), shape=shape_key(engine.model_shape), **thresholds)
    return table(path, entry).crossover_file


def unset(config):
    return replace(
        config,
        prefill=replace(config.prefill, auto_min_context_tokens=None),
        decode=replace(config.decode, auto_min_context_tokens=None),
    )


def test_what_is_not_set_is_filled_in_and_a_number_stays(tmp_path):
    config = replace(small_config(), crossover_file=table(tmp_path / "own.json", ENTRY).crossover_file)
    assert find_crossover(config, H200).applied_to(config) == config
    filled = find_crossover(config, H200).applied_to(unset(config))
    assert filled.prefill == replace(config.prefill, auto_min_context_tokens=4096)
    assert filled.decode == replace(config.decode, auto_min_context_tokens=8192)
    never = replace(find_crossover(config, H200), entry=replace(ENTRY, decode_min_context_tokens=None))
    assert never.applied_to(unset(config)).decode.auto_min_context_tokens == NEVER_TOKENS


def test_without_any_setting_auto_is_dense_on_a_processor_as_far_as_was_measured():
    config = EngineConfig()
    filled = find_crossover(config, Place("a new processor", "cpu", SHAPE)).applied_to(config)
    policy = TurnPolicy.resolve(QualityContract(), filled)
    assert not policy.prefill_is_sparse(16_384)
    assert not policy.decode_is_sparse(16_384, budget_tokens=64)


def test_what_was_taken_is_logged_once_with_its_reason(tmp_path, caplog):
    file = own_table(tmp_path / "own.json", prefill_min_context_tokens=40, decode_min_context_tokens=None)
    config = replace(small_config(), crossover_file=file)
    with caplog.at_level(logging.INFO, "loopserve.engine"):
        fake_engine(replace(config, prefill=replace(config.prefill, auto_min_context_tokens=None)))
    (message,) = [record.message for record in caplog.records if record.message.startswith("auto:")]
    assert "prefill sparse from 40 tokens on, decode sparse from 24 tokens on (as set)" in message
    assert file in message and "measured for a test" in message


@pytest.mark.parametrize(
    ("own", "measured", "chooses"),
    [(None, 24, True), (None, 48, False), (None, None, False), (24, None, True), (48, 24, False)],
)
def test_auto_follows_the_setting_and_else_the_table(tmp_path, own, measured, chooses):
    file = own_table(tmp_path / "own.json", prefill_min_context_tokens=None, decode_min_context_tokens=measured)
    config = replace(unset(small_config()), crossover_file=file)
    engine, _ = fake_engine(replace(config, decode=replace(config.decode, auto_min_context_tokens=own)))
    inbox = Inbox()
    engine.submit(request(32), inbox)
    drain(engine)
    (ended,) = inbox.ended.values()
    assert (ended.usage.quality.refreshes > 0) is chooses
    assert ended.usage.quality.prefill_cells_computed_share == 1.0


def test_a_request_for_sparse_asks_no_table():
    policy = TurnPolicy.resolve(QualityContract(mode=Mode.SPARSE), small_config())
    assert policy.prefill_is_sparse(1) and policy.decode_is_sparse(1, budget_tokens=8)


def test_a_negative_threshold_is_refused():
    for record in (PrefillSparsity, DecodeSparsity):
        with pytest.raises(ConfigError, match="auto_min_context_tokens is -1"):
            record(auto_min_context_tokens=-1)
