"""The disk tier of the KV memory: sessions kept in a directory that several engines use at once, each session written by one of them.

    <directory>/<format digest>/    one KV format, one version; others are not ours
        engines/                    who uses it, and lives                      (`leases`)
        sessions/<session key>/     what happened to each session               (`journal`)
        packs/                      blocks, each once in a tenant               (`packs`)

It is memory, not an archive: all of it can be computed again. So what is damaged is refused, never mended, and what does not fit goes
(`sweeper`). What is promised instead: one owner a session, the owner's last save or nothing, and no byte that was not checked. An engine
may be killed between any two system calls; the others go on, and clear up after it.
"""

from loopserve.kv.disk.contents import SavedSession
from loopserve.kv.disk.errors import DiskFailed, DiskFull, LeasedElsewhere, LeaseLost, TierError
from loopserve.kv.disk.tier import DiskTier, Freed, StoredSession

__all__ = [
    "DiskFailed",
    "DiskFull",
    "DiskTier",
    "Freed",
    "LeaseLost",
    "LeasedElsewhere",
    "SavedSession",
    "StoredSession",
    "TierError",
]
