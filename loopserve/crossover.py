"""From which context length on sparse attention pays, by device and shape of heads: the table, and what `auto` takes of it. Host only.

Where no number is set, the engine asks the table once, when it is built. A table of the user's own (`EngineConfig.crossover_file`, written
by `loopserve bench --tune`) is asked before the one that comes with the package. Knows nothing about how anything is measured: `tuning/`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path

from loopserve.config import EngineConfig
from loopserve.environment import record_from
from loopserve.errors import ConfigError
from loopserve.reads import ModelShape

ANY = "any"
NEVER_TOKENS = 1 << 62  # of context: longer than any conversation
_SHAPE = re.compile(r"\d+/\d+/\d+")
_TABLE_BYTES_MAX = 1 << 20  # some thousand entries; a file that is larger is something else


@dataclass(frozen=True, slots=True)
class Crossover:
    """From where on sparse attention is faster than dense on one device, for models whose heads have one shape."""

    device: (
        str  # "NVIDIA H200", as CUDA has it, or a processor's model name; "cpu" or "cuda": others of the kind; or "any"
    )
    shape: str  # query heads / KV heads / channels of a head, "32/8/128"; or "any"
    prefill_min_context_tokens: int | None  # context at a chunk's end; None: dense was never slower
    decode_min_context_tokens: int | None  # context of the first step; None: dense was never slower
    decode_rows: int | None  # turns that decoded side by side when decode was measured; None: nothing was measured
    reason: str  # what was measured, or why this was assumed

    def __post_init__(self) -> None:
        _check(bool(self.device), "device is empty")
        _check(
            self.shape == ANY or _SHAPE.fullmatch(self.shape) is not None,
            f"shape is {self.shape!r}; write query heads/KV heads/channels, as 32/8/128, or {ANY}",
        )
        for name in ("prefill_min_context_tokens", "decode_min_context_tokens", "decode_rows"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"{name} is {value}; at least 1, or null")

    @property
    def key(self) -> tuple[str, str]:
        """What a table has one entry for."""
        return self.device, self.shape


@dataclass(frozen=True, slots=True)
class Place:
    """Where an engine runs, and what, as far as a table tells places apart."""

    device: str  # its name
    kind: str  # "cpu" | "cuda"
    shape: ModelShape


@dataclass(frozen=True, slots=True)
class Found:
    """The entry for a place, and the file that it is from."""

    entry: Crossover
    source: Path

    def applied_to(self, config: EngineConfig) -> EngineConfig:
        """The settings with every threshold a number; those that were numbers stay as they are."""
        prefill, decode = config.prefill, config.decode
        if prefill.auto_min_context_tokens is None:
            prefill = replace(prefill, auto_min_context_tokens=_tokens(self.entry.prefill_min_context_tokens))
        if decode.auto_min_context_tokens is None:
            decode = replace(decode, auto_min_context_tokens=_tokens(self.entry.decode_min_context_tokens))
        return replace(config, prefill=prefill, decode=decode)

    def sentence(self, config: EngineConfig) -> str:
        """What `auto` will do under `config`, the settings before they were filled in, and why."""
        entry = self.entry
        phases = (
            ("prefill", config.prefill.auto_min_context_tokens, entry.prefill_min_context_tokens),
            ("decode", config.decode.auto_min_context_tokens, entry.decode_min_context_tokens),
        )
        said = [
            f"{phase} {from_where(own if own is not None else taken)}" + (" (as set)" if own is not None else "")
            for phase, own, taken in phases
        ]
        return f"auto: {', '.join(said)}. {self.source} has {entry.device!r}, heads {entry.shape}: {entry.reason.rstrip('.')}."


def from_where(min_context_tokens: int | None) -> str:
    """A threshold in words."""
    return "dense at every length" if min_context_tokens is None else f"sparse from {min_context_tokens} tokens on"


def shape_key(shape: ModelShape) -> str:
    """What of a model's shape a table distinguishes: layers only multiply both sides alike."""
    return f"{shape.num_heads}/{shape.num_kv_heads}/{shape.head_dim}"


def shipped_table() -> Path:
    """The table that comes with the package. It has an entry for any device, so that every place is found."""
    return Path(str(resources.files("loopserve"))) / "assets" / "crossover.json"


def find_crossover(config: EngineConfig, place: Place) -> Found:
    """The entry for a place: the user's own table first, then the shipped one; in each the device by name before its kind before any,
    and the model's shape before any. Raises ConfigError where a table cannot be read."""
    own = [Path(config.crossover_file).expanduser()] if config.crossover_file else []
    for source in (*own, shipped_table()):
        entries = {entry.key: entry for entry in read_table(source)}
        for device in (place.device, place.kind, ANY):
            for shape in (shape_key(place.shape), ANY):
                if (device, shape) in entries:
                    return Found(entries[device, shape], source)
    raise AssertionError(f"{shipped_table()} has no entry for any device")


def read_table(path: Path) -> tuple[Crossover, ...]:
    """The entries of a file. Raises ConfigError that names the file, what is wrong with it, and what to do."""
    try:
        size = path.stat().st_size
        _check(size <= _TABLE_BYTES_MAX, f"it has {size} bytes, a table has at most {_TABLE_BYTES_MAX}")
        content = json.loads(path.read_text(encoding="utf-8"))
        is_table = isinstance(content, dict) and content.keys() == {"entries"} and isinstance(content["entries"], list)
        _check(is_table, 'it is no object with one list, "entries"')
        entries = [_entry(values, index) for index, values in enumerate(content["entries"])]
        keys = [entry.key for entry in entries]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        _check(twice is None, f"it has two entries for {twice}")
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    except ValueError as error:  # no UTF-8, no JSON
        raise _unusable(path, f"it is no JSON: {error}") from error
    except ConfigError as error:
        raise _unusable(path, error.message) from error
    return tuple(entries)


def write_entry(path: Path, entry: Crossover) -> None:
    """Put an entry into a table, in place of the one for the same device and shape; others stay. Makes the file where there is none.

    Raises ConfigError where the file is no table, or cannot be written.
    """
    others = read_table(path) if path.exists() else ()
    entries: Sequence[Crossover] = (*(other for other in others if other.key != entry.key), entry)
    text = json.dumps({"entries": [asdict(each) for each in entries]}, indent=1, ensure_ascii=False) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}; name another file.") from error


def _entry(values: object, index: int) -> Crossover:
    _check(isinstance(values, dict), f"entries[{index}] is no object")
    assert isinstance(values, dict)
    try:
        entry: Crossover = record_from(Crossover, values, name=f"entries[{index}]")
    except ConfigError as error:
        where = f"entries[{index}]"
        raise ConfigError(error.message if error.message.startswith(where) else f"{where}: {error.message}") from error
    return entry


def _unusable(path: Path, problem: str) -> ConfigError:
    return ConfigError(
        f"The crossover table {path} cannot be used: {problem}. Write it anew with `loopserve bench --tune --out FILE`, mend it, "
        "or leave crossover_file empty for the table that comes with the package."
    )


def _tokens(min_context_tokens: int | None) -> int:
    return NEVER_TOKENS if min_context_tokens is None else min_context_tokens


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
