"""Owns the model that accelerators are measured with: Llama-3.1-8B's shape with random weights, and what a decode step of it must
read.

Weights are drawn where they will stay, in the type in which they are used: no copy in float32, nothing is moved. Knows nothing
about what is measured. `random_model.py` is the small one, with float32 weights that several sides share.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.engine.random_model import ModelSize, fill_at_random, one_word_tokenizer
from loopserve.attention import SOCKET_NAME, register_socket
from loopserve.loading import LoadedModel, describe

LLAMA_8B = ModelSize(
    hidden=4096, layers=32, intermediate=14_336, vocab=128_256, heads=32, kv_heads=8, positions=131_072
)
TINY = ModelSize(hidden=64, layers=2, intermediate=96, vocab=256, heads=4, kv_heads=2, positions=4096)

_ROPE_THETA = 500_000.0  # of Llama 3; its scaling of long waves is left out: it costs nothing at run time


def build_model(size: ModelSize, *, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LoadedModel:
    """A Llama of that size behind the socket, random weights, drawn on the device; every layer's output is at its input's scale.

    With `size.verticals` above 0 queries have a bias that makes some keys heavy for all of them, see `random_model.py`.
    """
    register_socket()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(llama_config(size, attention=SOCKET_NAME))
    finally:
        torch.set_default_dtype(before)
    fill_at_random(model, size, torch.Generator(device).manual_seed(seed))
    return describe(model.eval(), one_word_tokenizer(), name="random-llama")


def llama_config(size: ModelSize, *, attention: str = "sdpa") -> LlamaConfig:
    """The configuration of such a model, input and output embedding apart, as Llama-3.1-8B has them."""
    return LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        intermediate_size=size.intermediate,
        vocab_size=size.vocab,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.positions,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
        tie_word_embeddings=False,
        attention_bias=size.verticals > 0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation=attention,
    )


def weight_bytes(loaded: LoadedModel) -> int:
    """Bytes of weights that every step reads: all but the input embedding, of which it reads one row a token."""
    embedding = loaded.model.get_input_embeddings().weight
    return sum(p.numel() * p.element_size() for p in loaded.model.parameters() if p is not embedding)


def kv_bytes_a_token(loaded: LoadedModel) -> int:
    """Bytes of one token's keys and values in all layers: 128 KiB for Llama-3.1-8B in bfloat16."""
    return 2 * loaded.num_layers * loaded.num_kv_heads * loaded.head_dim * loaded.dtype.itemsize


def step_bytes(loaded: LoadedModel, read_tokens: float) -> float:
    """Bytes that a decode step must read: the weights once, and `read_tokens` tokens' worth of KV over all sequences.

    How many tokens' worth a sparse step reads is `loopserve.reads.read_tokens`; a dense one reads its context.
    """
    return weight_bytes(loaded) + read_tokens * kv_bytes_a_token(loaded)
