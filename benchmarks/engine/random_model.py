"""Owns the model that speed is measured with: a small Llama with random weights, behind the socket and as `transformers` has it.

Knows nothing about what is measured. Random weights cost exactly what trained ones do wherever the work does not depend on values;
where it does (sparse prefill), `verticals` makes some tokens heavy for all queries, as trained models have it, and results must name it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loopserve.attention import SOCKET_NAME, register_socket
from loopserve.loading import LoadedModel, describe


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of the model; the defaults have 6.6 million parameters and Llama-3's four query heads to a KV head."""

    hidden: int = 256
    layers: int = 8
    intermediate: int = 688
    vocab: int = 4096
    heads: int = 8
    kv_heads: int = 2
    positions: int = 32_768
    verticals: float = 0.0  # spread of the attention scores that depends on the key alone; above 0, queries have a bias


def model_flags() -> dict[str, int]:
    """Command line flags that set a ModelSize, in its order, with their defaults; `positions` is no flag."""
    size = ModelSize()
    return {
        "--hidden": size.hidden,
        "--layers": size.layers,
        "--intermediate": size.intermediate,
        "--vocab": size.vocab,
        "--heads": size.heads,
        "--kv-heads": size.kv_heads,
    }


def build_weights(size: ModelSize, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Float32 weights, every layer's output at its input's scale."""
    model = _model(size, "sdpa")
    fill_at_random(model, size, torch.Generator().manual_seed(seed))
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


def fill_at_random(model: torch.nn.Module, size: ModelSize, generator: torch.Generator) -> None:
    """Draw the matrices so that activations keep their size, and let `size.verticals` bias the queries. Mutates the model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
            if name.endswith("q_proj.bias"):
                parameter.view(size.heads, -1)[:, slow_dims(size)] = query_bias(size)


def slow_dims(size: ModelSize) -> list[int]:
    """The slowest quarter of the rotary pairs, both members: they hardly turn within a chunk, so a bias there marks columns."""
    half = size.hidden // size.heads // 2
    slow = range(half - max(1, half // 4), half)
    return [*slow, *(half + dim for dim in slow)]


def query_bias(size: ModelSize) -> float:
    """So large that the scores it causes, over keys of unit variance, spread by `verticals`."""
    head_dim = size.hidden // size.heads
    return float(size.verticals * (head_dim / len(slow_dims(size))) ** 0.5)


def stock_model(size: ModelSize, weights: dict[str, torch.Tensor], *, attention: str = "sdpa") -> Any:
    """The model as `transformers` runs it."""
    model = _model(size, attention)
    model.load_state_dict(weights)
    return model


def loaded_model(size: ModelSize, weights: dict[str, torch.Tensor]) -> LoadedModel:
    """The same model as our engine runs it."""
    register_socket()
    model = _model(size, SOCKET_NAME)
    model.load_state_dict(weights)
    return describe(model, one_word_tokenizer(), name="random-llama")


def num_parameters(weights: dict[str, torch.Tensor]) -> int:
    """Parameters, the tied embedding once."""
    return sum(tensor.numel() for name, tensor in weights.items() if name != "lm_head.weight")


def _model(size: ModelSize, attention: str) -> Any:
    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        intermediate_size=size.intermediate,
        vocab_size=size.vocab,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.positions,
        tie_word_embeddings=True,
        attention_bias=size.verticals > 0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).float().eval()


def one_word_tokenizer() -> PreTrainedTokenizerFast:
    """Nothing is ever tokenised; the engine only wants to have one."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")))
