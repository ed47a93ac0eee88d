"""What may go from the disk, and how it goes. Floor 2.

A pack goes when no manifest names it. Somebody may be about to name it, so nobody decides that alone:

    who saves                                 who removes
    1  pins the packs that it will name       1  takes the pack's name away (it is *doomed*)
    2  looks whether all are there            2  reads all pins
    3  puts its manifest in place             3  reads all manifests
    4  unpins                                 4  named or pinned: gives it its name back; else unlinks it

Whichever comes first is seen by the other one. Pins count while their engine lives; it renews its lease before it looks.

Sessions go when a quota asks for it, least recently saved first, and only those that no other live engine owns.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from loopserve.kv.disk.files import Files
from loopserve.kv.disk.journal import Act, Journal, Standing
from loopserve.kv.disk.leases import Engines
from loopserve.kv.disk.packs import Packs


class Sweeper:
    """Removes what is not wanted. Not thread-safe."""

    def __init__(self, root: Path, files: Files, engines: Engines, journal: Journal, packs: Packs) -> None:
        self._root = root
        self._files = files
        self._engines = engines
        self._journal = journal
        self._packs = packs

    def used_bytes(self) -> int:
        """The sizes of all files of this format, whoever wrote them."""
        return self._files.bytes_below(self._root)

    def collect(self, packs: Iterable[str]) -> None:
        """Remove those of these packs that no manifest names and no live engine has pinned."""
        named = self._named()
        doomed = [(pack, self._packs.doom(pack, self._engines.token)) for pack in packs if pack not in named]
        if not any(path for _, path in doomed):
            return
        pinned = self._engines.pinned()  # before the manifests: who unpins has named
        wanted = None if pinned is None else pinned | self._named()
        for pack, path in doomed:
            if path is None:
                continue
            if wanted is None or pack in wanted:
                self._packs.spare(pack, path)
            else:
                self._files.unlink(path)

    def tidy(self, drop: Callable[[Standing], bool]) -> None:
        """Remove what is of no use: what dead engines have half done, or this one before; sessions that nobody owns and nobody can read;
        packs that nobody names. `drop` ends one session, or finds that it may not.
        """
        is_live = self._engines.census()

        def is_over(token: str) -> bool:
            return token == self._engines.token or not is_live(token)

        self._engines.tidy()
        self._journal.tidy(is_over)
        self._packs.tidy(is_over)
        for standing in self._journal.survey():
            newest = standing.newest
            if newest is not None and newest.act is Act.DROP:
                self._journal.erase(standing.key, standing.last)
            elif standing.content is None and not (newest is not None and newest.is_owned and is_live(newest.engine)):
                drop(standing)
        self.collect(self._packs.names())

    def victims(self, num_bytes: int, *, spared: Collection[str]) -> list[Standing]:
        """The sessions to drop so that `num_bytes` become free, least recently saved first; none where all that may go are too few.

        `spared` are keys of sessions that must stay. What a session frees are the packs that only victims name.
        """
        is_live = self._engines.census()
        standings = [(s, s.newest, s.content) for s in self._journal.survey()]
        saved = [(s, newest, content) for s, newest, content in standings if newest and content]
        names = Counter(pack for _, _, content in saved for pack in content.packs)
        victims: list[Standing] = []
        for standing, newest, content in sorted(saved, key=lambda found: found[2].saved_s):
            is_elsewhere = newest.is_owned and newest.engine != self._engines.token and is_live(newest.engine)
            if standing.key in spared or is_elsewhere:
                continue
            victims.append(standing)
            names.subtract(content.packs)
            num_bytes -= self._journal.num_bytes(standing.key)
            num_bytes -= sum(self._packs.num_bytes(pack) for pack in content.packs if names[pack] == 0)
            if num_bytes <= 0:
                return victims
        return []

    def _named(self) -> set[str]:
        """All packs that a manifest names."""
        return {pack for standing in self._journal.survey() if standing.content for pack in standing.content.packs}
