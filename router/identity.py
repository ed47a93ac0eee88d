"""Names of conversations: which session a request belongs to, and which replica is its home. Pure; imports nothing of `loopserve`.

Hop 1 of a turn computes these keys, hop 2 (`router.affinity`) ranks replicas by them. Two kinds of name exist:

    session key        a client's header or `metadata.session_id`, inside its tenant: the same for all turns
    continuation key   the conversation so far: changes with every turn, and is what a client without a header brings back

Everything that decides whose KV is used is blake2b, 128 bits wide: a collision there would join two conversations. Knows nothing
about replicas, load or HTTP frameworks.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NewType, Protocol

ConversationKey = NewType("ConversationKey", str)  # 32 hex digits

SESSION_HEADERS = ("x-session-id", "x-session-affinity")  # first one present wins
USER_HINT_HEADER = "x-user-id"
SESSION_NAME_CHARS_MAX = 256

_GENERATED_NAME = re.compile(r"conv-([0-9a-f]{32})-[0-9a-f]{8,32}")


class SpokenMessage(Protocol):
    """What this module reads of a message."""

    @property
    def role(self) -> str:
        """Who speaks: system, developer, user, assistant, tool."""

    @property
    def content(self) -> str:
        """What is said, as plain text."""


@dataclass(frozen=True, slots=True)
class PlacementHints:
    """Names of people and buckets. They choose a home for a new conversation and never a session."""

    cache_key: str = ""  # body `prompt_cache_key`: its conversations share one home
    user: str = ""  # body `user` or header `x-user-id`: spreads a common opening over users


def _digest(kind: str, parts: Iterable[str]) -> ConversationKey:
    hasher = blake2b(kind.encode(), digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        hasher.update(len(data).to_bytes(8, "little"))  # a length before each part: no two lists of parts look alike
        hasher.update(data)
    return ConversationKey(hasher.hexdigest())


def session_key(tenant: str, session_name: str) -> ConversationKey:
    """Key of a conversation that the client names itself; tenants never share a key."""
    return _digest("session", (tenant, session_name))


def home_key(
    tenant: str, messages: Sequence[SpokenMessage], hints: PlacementHints = PlacementHints()
) -> ConversationKey:
    """Key of the replica that a nameless conversation calls home: the same for all its turns, computable by every router.

    It covers the leading system (or developer) messages and the first user message, because these stay while the dialogue grows.
    """
    if hints.cache_key:
        return _digest("bucket", (tenant, hints.cache_key))
    opening = []
    for message in messages:
        opening += [message.role, message.content]
        if message.role not in ("system", "developer"):
            break
    return _digest("home", (tenant, hints.user, *opening))


def prompt_home_key(
    tenant: str, prompt: str | Sequence[int], hints: PlacementHints = PlacementHints()
) -> ConversationKey:
    """Home of a raw prompt: its first 1024 characters (or 256 token ids), so that prompts with one long prefix meet."""
    if hints.cache_key:
        return _digest("bucket", (tenant, hints.cache_key))
    opening = prompt[:1024] if isinstance(prompt, str) else " ".join(map(str, prompt[:256]))
    return _digest("prompt", (tenant, hints.user, opening))


def continuation_key(tenant: str, messages: Sequence[SpokenMessage]) -> ConversationKey:
    """Key of the whole conversation; surrounding white space of a message is ignored, because clients strip answers."""
    return _digest("talk", (tenant, *(part for m in messages for part in (m.role, m.content.strip()))))


def known_part(messages: Sequence[SpokenMessage]) -> Sequence[SpokenMessage]:
    """The messages up to the last answer: what a server that gave this answer has seen before. Empty for a first turn."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].role == "assistant":
            return messages[: index + 1]
    return ()


def generated_session_name(home: ConversationKey, token: str) -> str:
    """Name for a conversation that has none, from its home and a random hex `token`.

    The home is part of the name, so a client that starts to send the name back stays where its KV is.
    """
    name = f"conv-{home}-{token}"
    assert _GENERATED_NAME.fullmatch(name), name
    return name


def home_of_name(tenant: str, session_name: str) -> ConversationKey:
    """Home of a named conversation: the one inside a generated name, otherwise the hash of the name itself."""
    match = _GENERATED_NAME.fullmatch(session_name)
    return ConversationKey(match.group(1)) if match else session_key(tenant, session_name)


def session_from_headers(headers: Mapping[str, str], metadata: Mapping[str, object] | None = None) -> str | None:
    """The session that a client names: a header of `SESSION_HEADERS` (any case, `-` or `_`), else body `metadata.session_id`.

    Returns None where there is none. Raises ValueError for a name that is too long or not printable.
    """
    by_name = {name.lower().replace("_", "-"): value for name, value in headers.items()}
    candidates = [by_name.get(header, "") for header in SESSION_HEADERS]
    named = (metadata or {}).get("session_id")
    candidates.append(named if isinstance(named, str) else "")
    for candidate in candidates:
        name = candidate.strip()
        if not name:
            continue
        if len(name) > SESSION_NAME_CHARS_MAX:
            raise ValueError(
                f"a session name has at most {SESSION_NAME_CHARS_MAX} characters; this one has {len(name)}"
            )
        if not (name.isascii() and name.isprintable()):
            raise ValueError("a session name consists of printable ASCII characters; it travels in a header")
        return name
    return None


def placement_hints(headers: Mapping[str, str], *, cache_key: str | None, user: str | None) -> PlacementHints:
    """Collect the hints of one request; `user` of the body goes before the header `x-user-id`."""
    by_name = {name.lower().replace("_", "-"): value for name, value in headers.items()}
    return PlacementHints(cache_key=cache_key or "", user=user or by_name.get(USER_HINT_HEADER, ""))
