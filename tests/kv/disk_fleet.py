"""Engines that use one directory, for tests of the disk tier: who they are, what lies there, and how it looks when all is well."""

import itertools
from collections.abc import Collection
from pathlib import Path

from kv_images import FORMAT, bits
from safetensors.torch import load_file
from shaky_files import FakeTime, ShakyFiles

from loopserve.dialogue import SessionId
from loopserve.kv.disk import DiskTier
from loopserve.kv.disk.leases import Process
from loopserve.kv.image import SessionImage, format_digest

LEASE_S = 30.0
QUOTA = 1 << 20
S, T, U = SessionId("s"), SessionId("t"), SessionId("u")


class Fleet:
    """Engines on one directory and one clock. Each is a process of its own; killing one is all that others see of it."""

    def __init__(self, directory: Path, *, quota_bytes: int = QUOTA) -> None:
        self.directory = directory
        self.time = FakeTime()
        self.quota_bytes = quota_bytes
        self.gone: set[int] = set()
        self._pids = itertools.count(1)
        self._tiers: dict[int, tuple[DiskTier, ShakyFiles]] = {}

    def tier(self, **options) -> DiskTier:
        pid = next(self._pids)
        files = options.pop("files", None) or ShakyFiles(self.time)
        chosen = {
            "fmt": FORMAT,
            "quota_bytes": self.quota_bytes,
            "lease_s": LEASE_S,
            "engine_id": f"engine {pid}",
        } | options
        process = Process("host", "", "", pid, "")
        made = DiskTier(self.directory, files=files, process=process, is_gone=lambda p: p.pid in self.gone, **chosen)
        self._tiers[id(made)] = (made, files)
        made.pid = pid
        return made

    def files(self, tier: DiskTier) -> ShakyFiles:
        return self._tiers[id(tier)][1]

    def kill(self, tier: DiskTier) -> None:
        self.gone.add(tier.pid)

    def paths(self, *kinds: str) -> list[Path]:
        root = self.directory / format_digest(FORMAT)
        return sorted(
            p for kind in kinds or ("engines", "sessions", "packs") for p in (root / kind).rglob("*") if p.is_file()
        )

    def contents(self, *kinds: str) -> dict[str, bytes]:
        return {str(p.relative_to(self.directory)): p.read_bytes() for p in self.paths(*kinds)}

    def stored_blocks(self, packs: Collection[str] | None = None) -> list[str]:
        """Every block in some packs, or in all, by tenant and content."""
        return [
            path.name.partition(".")[0] + bits(block).numpy().tobytes().hex()
            for path in self.paths("packs")
            if packs is None or path.name.removesuffix(".safetensors") in packs
            for block in load_file(path)["blocks"]
        ]


def load(tier: DiskTier, name: SessionId, salt: str = "") -> SessionImage | None:
    """What the tier finds, owned by nobody afterwards."""
    image = tier.load(name, salt)
    tier.release(name, salt)
    return image


def assert_tidy(fleet: Fleet, tier: DiskTier, *, num_twice: int = 0) -> None:
    """After making room nothing lies about that nobody needs, and all of it is counted. `num_twice` blocks may lie there twice."""
    tier.make_room(0)
    for path in fleet.paths("sessions", "packs"):
        assert path.suffix in (".json", ".safetensors"), path
    named = {pack for standing in tier._journal.survey() if standing.content for pack in standing.content.packs}
    assert {path.name.removesuffix(".safetensors") for path in fleet.paths("packs")} == named
    assert len(fleet.paths("sessions")) <= 2 * len(tier.sessions()), "a session keeps its newest entry and its save"
    assert tier.used_bytes == sum(path.stat().st_size for path in fleet.paths())
    blocks = fleet.stored_blocks()
    assert len(blocks) - len(set(blocks)) <= num_twice, "a block is stored twice"
