"""What the shipped model attends with: queries, keys and values of all its layers, recorded over made dialogues. Knows no kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from benchmarks.kernels.segments import measured_dtype
from loopserve.config import EngineConfig
from loopserve.evaluation.dialogues import TASKS, Split, make_dialogues
from loopserve.loading import LoadedModel, load_model

_RECORDER = "benchmark_recorder"
_DIALOGUE_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Recorded:
    """One layer of the shipped model over one dialogue."""

    query: Tensor  # [N, H, D], turned by their positions
    key: Tensor  # [N, Hkv, D]
    value: Tensor


def record_shipped(num_tokens: int, *, device: torch.device, seed: int) -> list[Recorded]:
    """What every layer of the shipped model attends with, over made dialogues one after the other."""
    loaded = load_model(EngineConfig(device=device.type, dtype=str(measured_dtype(device)).removeprefix("torch.")))
    layers: list[Recorded] = []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any) -> Any:
        layers.append(Recorded(*(tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))))
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2), None

    AttentionInterface.register(_RECORDER, attention)
    loaded.model.set_attn_implementation(_RECORDER)
    ids = _dialogue_ids(loaded, num_tokens, seed=seed)
    with torch.inference_mode():
        loaded.model.model(torch.tensor([ids], device=device), use_cache=False)
    assert len(layers) == loaded.num_layers, "every layer was recorded"
    return layers


def _dialogue_ids(loaded: LoadedModel, num_tokens: int, *, seed: int) -> list[int]:
    """Made dialogues, rendered one after the other, until there are enough tokens."""

    def count(text: str) -> int:
        return len(loaded.tokenizer.encode(text, add_special_tokens=False)) + 2

    ids: list[int] = []
    num = -(-4 * num_tokens // _DIALOGUE_TOKENS) + 4  # more than enough: they are made one by one
    for dialogue in make_dialogues(
        TASKS, split=Split.TEST, num=num, tokens=_DIALOGUE_TOKENS, seed=seed, count_tokens=count
    ):
        turns = ((("user", turn.user), ("assistant", turn.answer)) for turn in dialogue.turns)
        messages = [{"role": role, "content": text} for turn in turns for role, text in turn]
        text = loaded.tokenizer.apply_chat_template(messages, tokenize=False)
        ids += loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= num_tokens:
            return ids[:num_tokens]
    raise ValueError(f"the dialogues have {len(ids)} tokens, {num_tokens} are needed")
