"""What travels between two replicas while a session changes hands: plain picklable records, and the names of what may come of it."""

from dataclasses import dataclass
from enum import StrEnum

from router.affinity import ReplicaLoad

PROTOCOL_VERSION = 1


class Result(StrEnum):
    """What came of one session that a replica had to give away. Counted once each, by a replica that lives on.

    The one exception: who gave up waiting counts `timed_out`, and the other side, where it came to an end all the same, `moved`.
    """

    MOVED = "moved"  # it is where its next turn will be sent; counted there
    REFUSED = "refused"  # the other replica did not take it; counted there
    FAILED = "failed"  # the other replica went away, or the session could not be exported
    TIMED_OUT = "timed_out"
    BUSY = "busy"  # a turn of it runs here, or came while it was on its way
    NOT_WORTH_IT = "not_worth_it"  # computing it again is quicker
    OVER_LIMIT = "over_limit"  # there was no time left, or it was too large


class Said(StrEnum):
    """What a replica says to an offer or a piece."""

    GO_ON = "go_on"
    MOVED = "moved"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Standing:
    """What a replica says of itself to one that looks for new homes for its sessions."""

    load: ReplicaLoad  # as routers see it
    released: frozenset[str]  # keys of sessions that were deleted a short time ago: who drains was not told


@dataclass(frozen=True, slots=True)
class Offer:
    """A session is about to come: its papers, then the engine's image, each in pieces."""

    version: int
    transfer: str  # random: names what follows
    source: str  # the replica that has it
    papers_bytes: int
    image_bytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """The next bytes of a transfer. None holds both of the papers' bytes and of the image's."""

    transfer: str
    index: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Receipt:
    """The answer to an offer or a piece. `code` says why where it is a refusal."""

    said: Said
    code: str = ""
