"""Settings from the environment: what is understood, and that nothing else is taken silently."""

import pytest

from loopserve.config import DecodeSparsity, EngineConfig, PrefillSparsity
from loopserve.errors import ConfigError


def from_env(**variables) -> EngineConfig:
    return EngineConfig.from_env({f"LOOPSERVE_ENGINE_{name}": text for name, text in variables.items()})


def test_environment_without_settings_gives_the_defaults():
    assert EngineConfig.from_env({"PATH": "/bin", "LOOPSERVE_OTHER": "1"}) == EngineConfig()


def test_settings_of_every_type_are_read():
    config = from_env(
        MODEL="org/model",
        KV_BLOCKS="64",
        KV_MEMORY_RATIO="1",
        MAX_QUEUE_S="2.5",
        REUSE="false",
        DEFAULT_MIN_COVERAGE="0.5",
    )
    assert (config.model, config.kv_blocks, config.reuse) == ("org/model", 64, False)
    assert (config.kv_memory_ratio, config.max_queue_s, config.default_min_coverage) == (1.0, 2.5, 0.5)


def test_optional_setting_can_be_unset_and_text_may_look_like_a_number():
    assert from_env(KV_BLOCKS="null").kv_blocks is None
    assert from_env(MODEL="7").model == "7"
    assert from_env(MODEL='"quoted"').model == "quoted"


def test_nested_settings_are_read_and_leave_the_rest_of_their_group():
    config = from_env(DECODE__BUDGET_TOKENS="128", DECODE__EARLY_REFRESHES="[2, 3]", PREFILL__METHOD="a_shape")
    assert config.decode == DecodeSparsity(budget_tokens=128, early_refreshes=(2, 3))
    assert config.prefill == PrefillSparsity(method="a_shape")


@pytest.mark.parametrize("reverse", [False, True])
def test_settings_that_are_right_only_together_may_come_in_any_order(reverse):
    pairs = [("LOOPSERVE_ENGINE_MAX_STEP_PREFILL_TOKENS", "128"), ("LOOPSERVE_ENGINE_PREFILL__CHUNK_TOKENS", "128")]
    config = EngineConfig.from_env(dict(reversed(pairs) if reverse else pairs))
    assert config.max_step_prefill_tokens == config.prefill.chunk_tokens == 128
    with pytest.raises(ConfigError, match="no chunk would ever fit"):
        EngineConfig.from_env(dict(pairs[:1]))


def test_overrides_win_over_the_environment():
    environ = {"LOOPSERVE_ENGINE_KV_BLOCKS": "64", "LOOPSERVE_ENGINE_DECODE__BUDGET_TOKENS": "128"}
    config = EngineConfig.from_env(environ, kv_blocks=32, decode=DecodeSparsity(budget_tokens=99))
    assert (config.kv_blocks, config.decode.budget_tokens) == (32, 99)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("KV_BLOCKS", "many"),
        ("KV_BLOCKS", "1.5"),
        ("KV_BLOCKS", "true"),
        ("KV_BLOCKS", ""),
        ("MAX_RUNNING_TURNS", "4.0"),
        ("REUSE", "yes"),
        ("REUSE", "1"),
        ("MAX_QUEUE_S", "soon"),
        ("DECODE__EARLY_REFRESHES", "4"),
        ("DECODE__EARLY_REFRESHES", '["4"]'),
        ("DECODE__COVERAGE_ALPHA", "[0.5]"),
    ],
)
def test_value_of_another_type_is_refused_by_the_variables_name(name, text):
    with pytest.raises(ConfigError, match=f"LOOPSERVE_ENGINE_{name}: "):
        from_env(**{name: text})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("KV_BLOKS", "no setting 'kv_bloks'; known: .*kv_blocks"),
        ("DECODE__BUDGET", "no setting 'budget'; known: .*budget_tokens"),
        ("DECODER__BUDGET_TOKENS", "no group 'decoder'; known: decode, disk, prefill"),
        ("MODEL__NAME", "no group 'model'"),
        ("DECODE", "'decode' is a group"),
        ("DECODE__BUDGET_TOKENS__X", "no group"),
        ("", "no setting ''"),
    ],
)
def test_unknown_names_are_refused_and_the_known_ones_named(name, message):
    with pytest.raises(ConfigError, match=f"LOOPSERVE_ENGINE_{name}: .*{message}"):
        from_env(**{name: "1"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_blocks": 1}, "kv_blocks must be at least 2"),
        ({"max_running_turns": 0}, "max_running_turns"),
        ({"max_sessions": 32}, "max_sessions must exceed max_running_turns"),
        ({"default_mode": "fast"}, "default_mode 'fast'"),
        ({"kv_memory_ratio": float("nan")}, "kv_memory_ratio"),
        ({"max_step_prefill_tokens": 511}, "no chunk would ever fit"),
    ],
)
def test_contradicting_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


@pytest.mark.parametrize(
    ("group", "settings"),
    [
        (PrefillSparsity, {"chunk_tokens": 15}),
        (PrefillSparsity, {"alpha": 0.0}),
        (PrefillSparsity, {"row_sampling": "first"}),
        (PrefillSparsity, {"fixed_columns": 0}),
        (DecodeSparsity, {"budget_tokens": 63}),
        (DecodeSparsity, {"pooling_tokens": 6}),
        (DecodeSparsity, {"coverage_alpha": 1.5}),
        (DecodeSparsity, {"select_per": "layer"}),
    ],
)
def test_sparsity_outside_its_range_is_refused_by_name(group, settings):
    (name,) = settings
    with pytest.raises(ConfigError, match=name):
        group(**settings)
