"""Who a request is: its session, its home, the conversation it continues, and the key that routers rank replicas by. Hop 1 of a turn.

One reading for everybody who has to agree: the ingress, and in topology `direct` both the session router and the replica. Knows nothing
about Ray, HTTP frameworks or replicas; the hashes are `router.identity`'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from deploy.protocol import CompletionCall
from loopserve.errors import InvalidRequest
from router.affinity import AffinityKey
from router.identity import (
    continuation_key,
    home_key,
    home_of_name,
    known_part,
    placement_hints,
    prompt_home_key,
    session_from_headers,
    session_key,
)

_CHARS_PER_TOKEN = 4  # rough; only weighs what moving a conversation would cost


@dataclass(frozen=True, slots=True)
class Identity:
    """The names of one request inside one tenant."""

    tenant: str
    session_name: str | None  # as the client named it; None: the conversation so far is the identity
    home: str
    continuation: str | None  # of a nameless conversation up to its last answer; None for a first turn


def in_tenant(tenant: str, cache_salt: str) -> str:
    """Tenant and cache salt in one name; sessions and shared prefixes never cross it."""
    return f"{tenant}\x1f{cache_salt}" if cache_salt else tenant


def identify(parsed: CompletionCall, headers: Mapping[str, str], tenant: str) -> Identity:
    """Name a request from its body and its headers. Raises InvalidRequest for a session name that cannot be one."""
    try:
        name = session_from_headers(headers, {"session_id": parsed.session_id})
    except ValueError as error:
        raise InvalidRequest(str(error), param="metadata.session_id") from error
    hints = placement_hints(headers, cache_key=parsed.cache_key, user=parsed.user)
    known = known_part(parsed.messages or ())
    if name is not None:
        home = home_of_name(tenant, name)
    elif parsed.messages is not None:
        home = home_key(tenant, parsed.messages, hints)
    else:
        home = prompt_home_key(tenant, parsed.prompt or "", hints)
    continuation = continuation_key(tenant, known) if known and name is None else None
    return Identity(tenant, name, home, continuation)


def affinity_key(parsed: CompletionCall, identity: Identity) -> AffinityKey:
    """What routers rank replicas by."""
    num_tokens = sum(len(message.content) for message in parsed.messages or ()) // _CHARS_PER_TOKEN
    if parsed.prompt is not None:
        num_tokens = len(parsed.prompt) // (_CHARS_PER_TOKEN if isinstance(parsed.prompt, str) else 1)
    if identity.session_name is not None:
        resident: tuple[str, ...] = (session_key(identity.tenant, identity.session_name),)
    else:
        resident = () if identity.continuation is None else (identity.continuation,)
    continues = bool(known_part(parsed.messages or ()))
    return AffinityKey(home=identity.home, resident=resident, prompt_tokens=num_tokens, continues=continues)
