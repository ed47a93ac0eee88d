"""Who may do what with a session: it is claimed, given up and dropped here, and nobody writes who does not own it. Floor 2.

Decides by the session's newest entry (`journal`) and by whether the engine that put it there lives (`leases`):

    no entry, RELEASE, DROP       anybody may claim it
    CLAIM, SAVE of a live engine  nobody else may
    CLAIM, SAVE of a dead one     anybody may
    an entry that is unreadable   anybody may, once it is older than a lease; its owner loses the session then, if there is one
"""

import contextlib
import secrets
from dataclasses import replace

from loopserve.dialogue import SessionId
from loopserve.kv.disk.errors import LeasedElsewhere, LeaseLost
from loopserve.kv.disk.files import Files
from loopserve.kv.disk.journal import Act, Entry, Journal, Standing, session_key
from loopserve.kv.disk.leases import Engines
from loopserve.kv.sealed import ImageRefused, escaped, unescaped

TRIES = 10  # for what others can undo or forestall; each try that fails is their progress


class Owners:
    """What one engine owns. Not thread-safe."""

    def __init__(self, files: Files, engines: Engines, journal: Journal, *, name: str, lease_s: float) -> None:
        self._files = files
        self._engines = engines
        self._journal = journal
        self._name = name
        self._lease_s = lease_s
        self._held: dict[str, Entry] = {}  # by key: our newest entry of each session that is ours as far as we know

    def own(self, session_id: SessionId, salt: str) -> Entry:
        """Our newest entry of a session, claimed where it was not ours. Raises LeasedElsewhere."""
        key = session_key(session_id, salt)
        with contextlib.suppress(LeaseLost):
            held = self.still_ours(key)
            if held is not None:
                return held
        for _ in range(TRIES):
            base, newest = self.claimable(key)
            if newest is not None and newest.is_owned and newest.engine == self._engines.token:
                self.hold(newest)  # an answer was lost, or something failed behind it
                return newest
            number = int(self._engines.now_s() * 1000) if base is None else base + 1
            entry = Entry(
                key=key,
                number=number,
                epoch=number,
                act=Act.CLAIM,
                engine=self._engines.token,
                engine_name=escaped(self._name),
                session_id=escaped(session_id),
                salt=escaped(salt),
                nonce=secrets.token_hex(8),
                saved=None if newest is None else newest.saved,
            )
            if self._journal.append(entry, after=base):
                self.hold(entry)
                self._journal.prune(entry)
                return entry
        raise LeasedElsewhere("Other engines claim the session again and again.", owner="several")

    def still_ours(self, key: str) -> Entry | None:
        """Our newest entry of a session that is ours; None for one that was not. Raises LeaseLost."""
        held = self._held.get(key)
        if held is None or self._journal.numbers(key)[-1:] == [held.number]:
            return held
        self.forget(key)
        raise LeaseLost("Another engine has claimed the session since this one did; what it saved counts.")

    def hold(self, entry: Entry) -> None:
        """An entry of ours is the newest one."""
        self._held[entry.key] = entry

    def forget(self, key: str) -> None:
        """Whether a session is ours is to be read anew."""
        self._held.pop(key, None)

    def forget_all(self) -> None:
        """Nothing is known to be ours."""
        self._held.clear()

    def claimable(self, key: str) -> tuple[int | None, Entry | None]:
        """The number of a session's newest entry, None where it has none, and the entry, None where it has none that can be read.

        Raises LeasedElsewhere where another live engine owns the session, or may.
        """
        try:
            newest = self._journal.newest(key)
        except ImageRefused:
            number = self._journal.numbers(key)[-1]
            age_s = self._engines.now_s() - self._files.modified_s(self._journal.path(key, number))
            if age_s < self._lease_s:
                wait = f"Who owns the session cannot be read; it can be claimed in {self._lease_s - age_s:.0f} s."
                raise LeasedElsewhere(wait, owner="unknown") from None
            return number, None
        if newest is None:
            return None, None
        if newest.is_owned and newest.engine != self._engines.token and self._engines.is_live(newest.engine):
            owner = unescaped(newest.engine_name)
            raise LeasedElsewhere(f"The session is owned by engine {owner!r}, which lives.", owner=owner)
        return newest.number, newest

    def give_up(self, key: str) -> None:
        """Let anybody claim a session; one of which nothing is saved goes. Nothing is done where it is not ours."""
        self.forget(key)
        try:
            newest = self._journal.newest(key)
        except ImageRefused:
            return  # our lease on it ends with us
        if newest is None or not newest.is_owned or newest.engine != self._engines.token:
            return
        if newest.saved is None:
            self.drop(key, newest.number, newest)
            return
        entry = replace(newest, number=newest.number + 1, act=Act.RELEASE, nonce=secrets.token_hex(8), content=None)
        if self._journal.append(entry, after=newest.number):
            self._journal.prune(entry)

    def drop(self, key: str, base: int, newest: Entry | None) -> bool:
        """End a session that is `claimable` as it says; False where that is not its newest entry any more."""
        entry = Entry(
            key=key,
            number=base + 1,
            epoch=base + 1,
            act=Act.DROP,
            engine=self._engines.token,
            engine_name=escaped(self._name),
            session_id="" if newest is None else newest.session_id,
            salt="" if newest is None else newest.salt,
            nonce=secrets.token_hex(8),
        )
        self.forget(key)
        if not self._journal.append(entry, after=base):
            return False
        self._journal.erase(key, entry.number)
        return True

    def drop_unread(self, standing: Standing) -> bool:
        """End a session of which nothing can be read, unless somebody owns it, or may."""
        held = self._held.get(standing.key)
        if held is not None and held.number == standing.last:
            return False
        try:
            base, newest = self.claimable(standing.key)
        except LeasedElsewhere:
            return False
        return base == standing.last and self.drop(standing.key, standing.last, newest)
