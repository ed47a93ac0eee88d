"""Checkpoints: finds one, refuses what the engine would silently compute wrongly, and loads the rest unmodified.

Floor 4 beside attention: needs the socket's name. Knows nothing about turns or caches.
"""

import hashlib
import json
import platform
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from loopserve.attention import SOCKET_NAME, register_socket
from loopserve.config import BLOCK_TOKENS, EngineConfig
from loopserve.errors import ConfigError, UnsupportedModel
from loopserve.reads import ModelShape

SHIPPED_MODEL = "loopserve-recall"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # those whose outputs are tested to equal `generate`
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # frequencies change with the length: cached keys would be stale


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A stock `transformers` model behind the socket, and the facts about it that the engine needs."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    eos_ids: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    fingerprint: str  # model, dtype and block size: KV may be shared only where it agrees

    @property
    def shape(self) -> ModelShape:
        """What of it decides how much decode reads."""
        return ModelShape(self.num_layers, self.num_heads, self.num_kv_heads, self.head_dim)


def load_model(config: EngineConfig) -> LoadedModel:
    """Load `config.model` onto the device. Raises ConfigError when it cannot be found, UnsupportedModel when it cannot be served."""
    source = config.model or str(shipped_model_dir())
    device = _device(config.device)
    try:
        model_config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The model {source!r} cannot be read: {error}. Give a hub id or a directory with config.json."
        ) from error
    check_supported(model_config, max_session_tokens=config.max_session_tokens)
    dtype = _dtype(config.dtype, device, model_config)
    register_socket()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, config=model_config, dtype=dtype, attn_implementation=SOCKET_NAME
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The model {source!r} cannot be loaded: {error}") from error
    return describe(model.to(device).eval(), tokenizer, name=_served_name(source))


def describe(model: PreTrainedModel, tokenizer: Tokenizer, *, name: str) -> LoadedModel:
    """The facts about a model that is already in memory and behind the socket."""
    config = model.config
    num_heads = config.num_attention_heads
    parameter = next(model.parameters())
    identity = json.dumps(config.to_diff_dict(), sort_keys=True, default=str)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=config.num_key_value_heads or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        eos_ids=_eos_ids(model.generation_config, tokenizer),
        dtype=parameter.dtype,
        device=parameter.device,
        fingerprint=hashlib.sha256(f"{name}|{identity}|{parameter.dtype}|{BLOCK_TOKENS}".encode()).hexdigest(),
    )


def check_supported(config: Any, *, max_session_tokens: int | None) -> None:
    """Raise UnsupportedModel if the architecture needs anything but full causal attention over absolute rotary positions."""
    if config.model_type not in FAMILIES:
        raise UnsupportedModel(
            f"Models of type {config.model_type!r} are not served: only {', '.join(FAMILIES)} are known to be computed rightly."
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UnsupportedModel(
            f"The model has layers of kind {', '.join(sorted(kinds))}; only full attention is served."
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and (max_session_tokens is None or max_session_tokens > window):
        raise UnsupportedModel(
            f"The model attends to a sliding window of {window} tokens; longer sessions would be computed wrongly. "
            f"Set max_session_tokens to at most {window}, within which it is the same as full attention."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
        raise UnsupportedModel(
            f"Rotary embeddings of type {rope['rope_type']!r} change with the length of the input, so cached keys would be wrong."
        )


def shipped_model_dir() -> Path:
    """The directory of the model that comes with the package. Raises ConfigError when the installation lacks it."""
    path = Path(str(resources.files("loopserve"))) / "assets" / SHIPPED_MODEL
    if not (path / "config.json").is_file():
        raise ConfigError(f"The shipped model is missing from {path}; reinstall, or name a model.")
    return path


def device_name(device: torch.device) -> str:
    """The name under which numbers measured on a device are kept: as CUDA has it, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def cpu_model() -> str:
    """The processor's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"device {wanted!r} is unknown; use auto, cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {wanted!r}, but no CUDA device is here; use auto or cpu.")
    return device


def _dtype(wanted: str, device: torch.device, model_config: Any) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if wanted != "auto":
        if wanted not in known:
            raise ConfigError(f"dtype {wanted!r} is unknown; use auto, {', '.join(known)}.")
        return known[wanted]
    if device.type == "cpu":
        return torch.float32  # half types are emulated on most CPUs, and slower
    stored = getattr(model_config, "dtype", None)
    if isinstance(stored, torch.dtype) and stored in (torch.bfloat16, torch.float16):
        return stored
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _eos_ids(generation: GenerationConfig | None, tokenizer: Tokenizer) -> tuple[int, ...]:
    declared = generation.eos_token_id if generation is not None else None
    ids = set(declared if isinstance(declared, list) else [declared])
    ids.add(tokenizer.eos_token_id)
    return tuple(sorted(token_id for token_id in ids if token_id is not None))


def _served_name(source: str) -> str:
    path = Path(source)
    return path.resolve().name if path.exists() else source
