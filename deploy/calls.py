"""What travels between ingress and replica: plain picklable records. Hops 1, 3 and 12 of a turn.

    ingress -> replica    TurnCall
    replica -> ingress    Accepted, bytes*, Spent        or        Refusal

`bytes` are ready for the wire: server-sent events of a stream, or the one JSON body. A `Refusal` may also come after `Accepted`, for a
request without a stream. Whoever reads them parses nothing, so an answer is formatted once, where its tokens arise.
"""

from dataclasses import dataclass

from deploy.errors import ErrorAnswer
from deploy.protocol import CompletionCall
from loopserve.dialogue import SessionId


@dataclass(frozen=True, slots=True)
class TurnCall:
    """One request on its way to a replica."""

    request: CompletionCall
    tenant: str  # tenant and cache salt in one; "" where there is neither
    session_name: str | None  # as the client named it; None: the conversation so far is the identity
    home: str  # key of its home, see router.identity
    continuation: str | None  # key of the conversation up to its last answer; None for a first turn
    response_id: str
    created: int  # unix seconds
    placed_in: str | None = None  # tenant as routers know it, in which claims are published; None: `tenant`
    trace_parent: str = ""  # W3C; empty where the request is not traced

    @property
    def claim_tenant(self) -> str:
        """The tenant in whose keys routers look for this conversation. It decides a placement, never whose KV is used."""
        return self.tenant if self.placed_in is None else self.placed_in


@dataclass(frozen=True, slots=True)
class Accepted:
    """The turn is in the batch: the status may be 200."""

    session_name: str
    replica: str
    cached_tokens: int
    received_unix_s: float = 0.0  # when the call had reached the replica
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """The turn was not taken, or failed before anything of it was sent."""

    answer: ErrorAnswer
    replica: str
    elsewhere: bool  # another replica may well take it


@dataclass(frozen=True, slots=True)
class Spent:
    """The turn is over and came to its end by itself. After the last bytes."""

    generated_tokens: int  # of all branches


Item = Accepted | Refusal | bytes | Spent


@dataclass(frozen=True, slots=True)
class SessionView:
    """One session as `/v1/sessions` shows it."""

    id: str
    replica: str
    num_tokens: int
    num_cached_tokens: int
    num_branches: int
    num_turns: int
    is_active: bool
    idle_s: float


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica as `/ready` and `/v1/models` need it."""

    replica: str
    model: str
    max_session_tokens: int
    alive: bool
    loaded_at: int  # unix seconds


@dataclass(frozen=True, slots=True)
class ReplicaSignals:
    """What the autopilot needs to know of one replica, counted at one moment."""

    replica: str
    unix_time: float
    accepting: bool
    capacity_bytes: int
    active_bytes: int
    warm_bytes: int
    shared_bytes: int
    demand: tuple[
        tuple[int | None, int, int], ...
    ]  # budget (None: all), device bytes of active and of warm conversations
    num_running: int
    num_waiting: int
    max_running: int
    budget_ceiling_tokens: int | None
    budget_max_tokens: int
    budget_floor_tokens: int
    compact_above_ratio: float = 1.0  # in force: the engine's own, or an autopilot's word
    host_capacity_bytes: int = 0  # 0: there is no host tier
    host_live_bytes: int = 0  # of turns in the batch, and shared ones
    host_warm_bytes: int = 0


@dataclass(frozen=True, slots=True)
class BudgetOrder:
    """The autopilot's word to every replica. It counts for `lease_s`; meanwhile only an autopilot with a smaller id is heard instead."""

    autopilot: str
    ceiling_tokens: int | None  # None: no ceiling
    lease_s: float
    compact_above_ratio: float | None = None  # None: as the engine has it


@dataclass(frozen=True, slots=True)
class BudgetReply:
    """What became of an order."""

    obeyed: bool
    ceiling_tokens: int | None  # now in force
    holder: str  # autopilot whose word counts
    compact_above_ratio: float | None = None  # ordered and in force; None: as the engine has it


def engine_session_id(tenant: str, session_name: str) -> SessionId:
    """The engine's id of a session: tenants are apart, whatever characters their names hold."""
    return SessionId(f"{tenant.encode().hex()}/{session_name}")


@dataclass(frozen=True, slots=True)
class SessionParts:
    """What an engine's session id is made of."""

    tenant: str
    name: str


def parts_of_session_id(session_id: SessionId) -> SessionParts | None:
    """The inverse of `engine_session_id`; None for an id that it has not made."""
    owner, slash, name = session_id.partition("/")
    try:
        tenant = bytes.fromhex(owner).decode()
    except ValueError:
        return None
    return SessionParts(tenant, name) if slash else None


def name_in_tenant(tenant: str, session_id: SessionId) -> str | None:
    """The client's name of an engine session; None if it belongs to another tenant."""
    owner, _, name = session_id.partition("/")
    return name if owner == tenant.encode().hex() else None
