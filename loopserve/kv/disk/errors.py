"""What the disk tier answers where it cannot do what it was asked. None of it ends a turn: what is not kept or brought is computed again.

TierError
|-- LeasedElsewhere   another live engine owns the session
|-- LeaseLost         it was ours, and another engine owns it now, or did
`-- DiskFailed        the operating system said no
    `-- DiskFull        the quota or the file system has no room
"""


class TierError(Exception):
    """Base of the tree."""


class LeasedElsewhere(TierError):
    """Another live engine owns the session. `owner` is what that engine calls itself."""

    def __init__(self, message: str, /, *, owner: str) -> None:
        super().__init__(message)
        self.owner = owner


class LeaseLost(TierError):
    """Another engine claimed the session meanwhile, and nothing was written. What this engine holds of it may be older than the disk's."""


class DiskFailed(TierError):
    """Reading or writing failed. What was saved before is as it was, or as it should be now: the caller cannot tell which."""


class DiskFull(DiskFailed):
    """There is no room, by the quota or on the file system; `make_room` may help. By the quota nothing was written."""
