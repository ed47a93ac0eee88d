"""Checkpoints: what is loaded as it is, and what is refused because it would silently be computed wrongly."""

import pytest
import torch
from tiny_models import byte_tokenizer, loaded_model, reference_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from loopserve.attention import SOCKET_NAME
from loopserve.config import EngineConfig
from loopserve.errors import ConfigError, UnsupportedModel
from loopserve.loading import check_supported, load_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved tiny model with its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    reference_model("llama").save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def check(config, *, max_session_tokens=None):
    check_supported(config, max_session_tokens=max_session_tokens)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_plain_families_are_served(kind):
    check(kind())


def test_checkpoint_is_loaded_behind_the_socket_with_its_facts(checkpoint):
    loaded = load_model(EngineConfig(model=str(checkpoint), device="cpu"))
    assert loaded.name == "tiny-llama"
    assert (loaded.num_layers, loaded.num_heads, loaded.num_kv_heads, loaded.head_dim) == (2, 4, 2, 16)
    assert (loaded.vocab_size, loaded.max_positions, loaded.eos_ids) == (260, 2048, (257,))
    assert (loaded.dtype, loaded.device.type) == (torch.float32, "cpu")
    assert loaded.model.config._attn_implementation == SOCKET_NAME
    assert not loaded.model.training


def test_fingerprint_tells_apart_what_must_not_share_kv(checkpoint):
    config = EngineConfig(model=str(checkpoint), device="cpu")
    loaded = load_model(config)
    assert load_model(config).fingerprint == loaded.fingerprint
    half = load_model(EngineConfig(model=str(checkpoint), device="cpu", dtype="bfloat16"))
    assert half.dtype == torch.bfloat16
    assert half.fingerprint != loaded.fingerprint
    assert loaded_model("qwen2").fingerprint != loaded_model("llama").fingerprint


def test_two_models_of_one_checkpoint_do_not_share_their_configuration(checkpoint):
    config = EngineConfig(model=str(checkpoint), device="cpu")
    assert load_model(config).model.config is not load_model(config).model.config
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    assert stock.config._attn_implementation == "eager"


def test_unknown_family_is_refused_and_the_known_ones_named():
    with pytest.raises(UnsupportedModel, match=r"'gpt2' are not served: only llama, mistral, qwen2, qwen3"):
        check(GPT2Config())


def test_sliding_window_is_refused_unless_every_session_fits_in_it():
    config = MistralConfig(sliding_window=4096)
    for limit in (None, 4097):
        with pytest.raises(UnsupportedModel, match="Set max_session_tokens to at most 4096"):
            check(config, max_session_tokens=limit)
    check(config, max_session_tokens=4096)
    check(MistralConfig(sliding_window=None))


def test_window_that_a_model_declares_and_does_not_use_is_no_window():
    check(Qwen2Config(sliding_window=4096, use_sliding_window=False))
    with pytest.raises(UnsupportedModel, match="sliding window"):
        check(Qwen2Config(sliding_window=4096, use_sliding_window=True, max_window_layers=1))


def test_layers_of_another_kind_are_refused_by_name():
    config = Qwen3Config(num_hidden_layers=2)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UnsupportedModel, match="layers of kind linear_attention"):
        check(config, max_session_tokens=10)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotary_embeddings_that_change_with_the_length_are_refused(rope_type):
    config = LlamaConfig()
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedModel, match=f"'{rope_type}' change with the length"):
        check(config)


@pytest.mark.parametrize("rope_type", ["default", "linear", "yarn", "llama3"])
def test_rotary_embeddings_that_do_not_are_served(rope_type):
    config = LlamaConfig()
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    check(config)


def test_directory_that_is_not_there_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read.*Give a hub id or a directory"):
        load_model(EngineConfig(model=str(tmp_path / "nothing")))


def test_directory_without_weights_is_a_configuration_error(tmp_path):
    LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(EngineConfig(model=str(tmp_path), device="cpu"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "warp"}, "device 'warp' is unknown"),
        ({"dtype": "float8", "device": "cpu"}, "dtype 'float8' is unknown"),
    ],
)
def test_unknown_device_and_dtype_are_refused_with_the_known_ones(checkpoint, settings, message):
    with pytest.raises(ConfigError, match=message):
        load_model(EngineConfig(model=str(checkpoint), **settings))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_missing_cuda_device_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="no CUDA device is here"):
        load_model(EngineConfig(model=str(checkpoint), device="cuda"))
