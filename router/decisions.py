"""Where a process hears of its router's decisions.

Serve constructs routers itself, from a copy of their module made by value: nothing can be handed to one, and the module's own state is not
that of its importers. This module is imported by name on both sides, hence shared by them.
"""

from collections.abc import Callable
from typing import ClassVar


class Decisions:
    """The one listener of this process; called with the reason and the seconds that the decision took."""

    listener: ClassVar[Callable[[str, float], None] | None] = None

    @classmethod
    def report(cls, reason: str, duration_s: float) -> None:
        """A decision was made."""
        if cls.listener is not None:
            cls.listener(reason, duration_s)
