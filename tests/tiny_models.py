"""Tiny random models of every served family, built in memory, and the reference answers of stock `transformers`."""

from dataclasses import replace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from loopserve.attention import SOCKET_NAME, register_socket
from loopserve.loading import LoadedModel, describe

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
VOCAB = 260  # 256 bytes and a few special tokens
EOS_ID = 257
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 256,
    "eos_token_id": EOS_ID,
    "pad_token_id": 258,
}
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: any text, no training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def _config(family: str):
    match family:
        case "llama":
            return LlamaConfig(**_SHAPE)
        case "mistral":
            return MistralConfig(**_SHAPE, sliding_window=None)
        case "qwen2":
            return Qwen2Config(**_SHAPE)
        case "qwen3":
            return Qwen3Config(**_SHAPE, head_dim=32)
    raise AssertionError(family)


def reference_model(family: str, *, seed: int = 0):
    """The stock model with eager attention, float32. Weights are scaled up so that attention is peaked, not flat."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(family), attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.12 if "embed" not in name else 0.5)
    return model


def loaded_model(family: str = "llama", *, seed: int = 0, device: str = "cpu") -> LoadedModel:
    """The same weights behind the attention socket, with a configuration object of their own."""
    register_socket()
    reference = reference_model(family, seed=seed)
    model = AutoModelForCausalLM.from_config(_config(family), attn_implementation=SOCKET_NAME).float().eval()
    model.load_state_dict(reference.state_dict())
    return replace(describe(model.to(device), byte_tokenizer(), name=f"tiny-{family}"), eos_ids=(EOS_ID,))


@torch.inference_mode()
def greedy_reference(model, prompt_ids: list[int], num_tokens: int) -> list[int]:
    """What `generate` answers, greedily, without stopping at end-of-sequence."""
    output = model.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=258,
    )
    return output[0, len(prompt_ids) :].tolist()


@torch.inference_mode()
def reference_logits(model, token_ids: list[int]) -> torch.Tensor:
    """Float32 logits `[T, V]` of the stock model over the whole sequence."""
    return model(torch.tensor([token_ids])).logits[0]
