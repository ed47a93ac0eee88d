"""API keys: the file they come from, who each of them is, and what it may do. Hop 1 of a turn; knows no HTTP, no Ray, no engine.

The file holds hashes only. A key is 256 random bits, so a plain SHA-256 is right: a slow hash is for secrets that people choose, where
an attacker tries likely ones; nobody tries 2^256, and a slow hash would cost every request what it costs the attacker.

    keys:                                    YAML, or the same as JSON
      - sha256: 5b1c...                      of the key; `loopserve keys new` writes the entry
        tenant: acme                         sessions and shared prefixes never cross tenants
        role: user                           user | operator (may also read /metrics, /v1/autopilot and /observe)
        label: billing service               free text, for people
        expires: 2027-01-31T00:00:00Z        a date alone is its first moment in UTC; left out: never
        disabled: false
        limits: {requests_per_minute: 60, tokens_per_minute: 100000, concurrent_turns: 8, max_tokens: 4096}

Nothing in here prints a value of the file: an error names the entry and the field, never what stands there.
"""

import hmac
import json
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from loopserve.errors import ConfigError

KEY_PREFIX = "ls-"
FILE_BYTES_MAX = 4 << 20  # about 15,000 keys; a Kubernetes Secret holds 1 MiB
_KEY_BYTES = 32
_KEY_IN_TEXT = re.compile(r"ls-[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])")
_log = logging.getLogger(__name__)


class Role(StrEnum):
    """What a key opens. An operator's key also opens what a user's does, inside its own tenant."""

    USER = "user"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What one key may use; None: as much as there is. See `deploy.limits`."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt and generated
    concurrent_turns: int | None = None
    max_tokens: int | None = None  # of one answer


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request: all that the routes need to know of authentication."""

    tenant: str
    key_id: str  # safe to show; "" where no keys are in use
    role: Role
    limits: KeyLimits = KeyLimits()


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """One entry of the file. `sha256` is lower-case hex."""

    sha256: str = field(repr=False)
    tenant: str
    role: Role = Role.USER
    label: str = ""
    expires_unix_s: float | None = None
    disabled: bool = False
    limits: KeyLimits = KeyLimits()

    @property
    def key_id(self) -> str:
        """A name for logs and listings: the beginning of the hash, from which no key can be found."""
        return self.sha256[:12]

    def is_valid_at(self, unix_s: float) -> bool:
        """Whether the key opens anything at this time."""
        return not self.disabled and (self.expires_unix_s is None or unix_s < self.expires_unix_s)

    def caller(self) -> Caller:
        """Who uses the key."""
        return Caller(self.tenant, self.key_id, self.role, self.limits)


def new_key() -> str:
    """A fresh key: `ls-` and 43 url-safe characters, 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def hash_key(key: str) -> str:
    """What the file holds of a key."""
    return sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


_NOBODY = KeyEntry(sha256=hash_key(new_key()), tenant="", disabled=True)


class KeyRing:
    """The keys of a file as it is now. Not thread-safe: one event loop.

    Kubernetes updates a mounted Secret by swapping a symlink: the file's inode changes, its path does not. A file that became wrong
    changes nothing: the keys read last stay in force, the reason is logged once and `reload_failed` says so.
    """

    def __init__(self, path: Path, *, unix_time: Callable[[], float] = time.time) -> None:
        """Raises ConfigError for a file that is missing or wrong: a server that should ask for keys does not start without."""
        self._path = path
        self._unix_time = unix_time
        self._stamp = self._stat()
        self._by_hash = {entry.sha256: entry for entry in load_keys(path)}
        self._failure = ""

    @property
    def reload_failed(self) -> bool:
        """Whether the file is newer than the keys in force, because it cannot be read."""
        return bool(self._failure)

    def find(self, key: str) -> KeyEntry | None:
        """The entry of a key that is valid now. An unknown, a disabled and an expired one take the same way and get the same answer.

        The lookup goes by hash: how long it takes says nothing of any key, because nobody can choose a hash's beginning.
        """
        digest = hash_key(key)
        entry = self._by_hash.get(digest, _NOBODY)
        is_same = hmac.compare_digest(entry.sha256, digest)
        return entry if entry.is_valid_at(self._unix_time()) and is_same else None

    def refresh(self) -> None:
        """Read the file again if it changed. Costs one `stat` where it did not: a few microseconds, so every request may ask."""
        stamp = self._stat()
        if stamp == self._stamp and stamp is not None:
            return
        try:
            self._by_hash = {entry.sha256: entry for entry in load_keys(self._path)}
        except ConfigError as error:
            if error.message != self._failure:
                _log.error("the keys read last stay in force: %s", error.message)
            self._failure = error.message
        else:
            _log.info("%d keys read from %s", len(self._by_hash), self._path)
            self._failure = ""
        self._stamp = stamp

    def _stat(self) -> tuple[int, int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def load_keys(path: Path) -> tuple[KeyEntry, ...]:
    """Every entry of a file. Raises ConfigError, which never holds a value of the file."""
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"The keys file {path} cannot be read ({error.strerror}).") from None
    if len(raw) > FILE_BYTES_MAX:
        raise ConfigError(f"The keys file {path} is longer than {FILE_BYTES_MAX} bytes; remove keys that have expired.")
    try:
        return parse_keys(raw.decode())
    except UnicodeDecodeError:
        raise ConfigError(f"The keys file {path} is not UTF-8 text.") from None
    except ConfigError as error:
        raise ConfigError(f"The keys file {path} is wrong: {error.message}") from None


def parse_keys(text: str) -> tuple[KeyEntry, ...]:
    """Every entry of a file's text. Raises ConfigError."""
    plain = _KEY_IN_TEXT.search(text)
    if plain is not None:
        line = text.count("\n", 0, plain.start()) + 1
        raise ConfigError(
            f"line {line} holds a key itself; only its SHA-256 belongs there. Replace the key: a file is not a safe place for it."
        )
    try:
        found = _File.model_validate(_read_json(text) if text.lstrip().startswith("{") else _read_yaml(text))
    except ValidationError as error:
        raise ConfigError(_told(error)) from None
    entries = tuple(entry.record() for entry in found.keys)
    _check_each_is_there_once(entries)
    return entries


def _check_each_is_there_once(entries: Sequence[KeyEntry]) -> None:
    places: dict[str, int] = {}
    for number, entry in enumerate(entries, start=1):
        first = places.setdefault(entry.sha256, number)
        if first != number:
            raise ConfigError(f"entries {first} and {number} are of the same key; remove one.")


def _unix_seconds(value: Any) -> float | None:
    """A moment as YAML, JSON or a person writes it."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError("a date or a date with time and zone is needed, such as 2027-01-31T00:00:00Z") from None
    if isinstance(value, datetime):
        if value.tzinfo is None and (value.hour, value.minute, value.second) != (0, 0, 0):
            raise ValueError("a time needs its zone, such as 2027-01-31T12:00:00Z")
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp()
    if value is not None:
        raise ValueError("a date is needed, such as 2027-01-31T00:00:00Z")
    return None


_Count = Annotated[int, Field(ge=1, le=10**12)]
_STRICT = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)


class _Limits(BaseModel):
    model_config = _STRICT
    requests_per_minute: _Count | None = None
    tokens_per_minute: _Count | None = None
    concurrent_turns: _Count | None = None
    max_tokens: _Count | None = None


class _Entry(BaseModel):
    model_config = _STRICT
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tenant: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    role: Annotated[Role, Field(strict=False)] = Role.USER
    label: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{0,128}$")] = ""
    expires: Annotated[float | None, BeforeValidator(_unix_seconds)] = None
    disabled: bool = False
    limits: _Limits = _Limits()

    def record(self) -> KeyEntry:
        """The entry as the rest of the server knows it."""
        limits = KeyLimits(**self.limits.model_dump())
        return KeyEntry(self.sha256, self.tenant, self.role, self.label, self.expires, self.disabled, limits)


class _File(BaseModel):
    model_config = _STRICT
    keys: list[_Entry]


def _told(error: ValidationError) -> str:
    """The first fault: where it is and what is needed, without what stands there (a field's name may be a slip of the hand, too)."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = [f"entry {step + 1}" if isinstance(step, int) else str(step) for step in first["loc"] if step != "keys"]
    if first["type"] == "extra_forbidden":
        known = path[-1] if re.fullmatch(r"[a-z_]{1,24}", path[-1]) else "(not shown)"
        return f"{', '.join(path[:-1]) or 'the file'}: there is no field {known}."
    return f"{', '.join(path) or 'the file'}: {first['msg'].removeprefix('Value error, ')}."


def _read_json(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ConfigError("a field is there twice in one place; keep one of them.")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ConfigError(f"it is no valid JSON at line {error.lineno}, column {error.colno}.") from None


class _StrictLoader(yaml.SafeLoader):
    """YAML as JSON is: a field stands once. Plain `safe_load` lets the last of two win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = Counter(name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode))
        if names and max(names.values()) > 1:
            raise ConfigError(f"a field is there twice near line {node.start_mark.line + 1}; keep one of them.")
        return super().construct_mapping(node, deep)


def _read_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark  # the error's own text would show the line
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"it is no valid YAML{where}.") from None
    except (yaml.YAMLError, ValueError):
        raise ConfigError("it is no valid YAML.") from None
