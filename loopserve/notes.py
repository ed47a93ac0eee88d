"""What somebody else knows of sessions and keeps beside them on disk. Floor 0: a contract, no torch in sight."""

from typing import Protocol

from loopserve.dialogue import SessionId


class SessionNotes(Protocol):
    """The notes' owner. Both are called on a thread that works on the disk, and should not make it wait."""

    def of(self, session_id: SessionId) -> bytes:
        """What is to be kept beside a session that is being saved."""

    def found(self, session_id: SessionId, notes: bytes) -> None:
        """What lies beside a session that no engine holds: what this one left at its end, or one that is gone. Told once a save."""
