"""What happened to each session, as entries that engines put one behind the other: who owns it, and what was saved last. Floor 2.

`sessions/<key>/` holds one session's entries, files that never change, named by a number:

    1795.json  SAVE     what was saved last: the manifest
    1796.json  RELEASE  its owner gave it up; `saved` is 1795
    1797.json  CLAIM    another engine took it; `saved` is 1795                <- the newest entry tells who owns the session

**One writer.** Whoever wants to claim, save, release or drop reads the newest entry and puts its own right behind it, under the next
number. A file gets that name by `link`, whole, and of many who try one succeeds. So a writer that was stopped for an hour finds its number
taken and has written nothing. The number of the claim is the epoch of all that its owner saves.

**Room.** Only the newest entry and the save that it names are kept, so numbers become free again. A late writer that takes one of these is
not the newest, and is named by nobody: it sees that, and takes its entry back. Readers go by the newest entry alone and look twice, so none
of them has seen it. A session that was dropped has no directory. The next one of its name begins at the time in milliseconds, above all
that came before, and its directory appears with its first entry in it, by `rename`: here, too, one of many succeeds.

An entry's file is two lines of JSON: what it is, behind a checksum, and for a save the block table, whose checksum is in the first.
"""

import contextlib
import errno
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from loopserve.dialogue import SessionId
from loopserve.kv.disk.errors import DiskFailed
from loopserve.kv.disk.files import Files
from loopserve.kv.disk.leases import owner_of_temporary, temporary_name
from loopserve.kv.sealed import ImageRefused, Refusal, checked_line, digest, escaped, parsed, text_of

VERSION = 2
_TRIES = 100  # entries that appear while one is read; each is somebody's progress
_PEEK_BYTES = 1 << 16  # most first lines are shorter


class Act(StrEnum):
    """What an entry says."""

    CLAIM = "claim"  # its engine owns the session
    SAVE = "save"  # its engine owns the session, and this is its content
    RELEASE = "release"  # nobody owns the session
    DROP = "drop"  # there is no session


@dataclass(frozen=True, slots=True)
class Saved:
    """What can be told of a saved session without its block table."""

    num_tokens: int  # computed, of the longest branch
    num_blocks: int
    saved_s: float  # by the file system's clock
    packs: tuple[str, ...]  # that its block table names
    table_bytes: int
    table_checksum: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry. `saved` numbers the newest save up to and including this entry. Dropping what cannot be read names no session."""

    key: str
    number: int
    epoch: int  # the number of the claim that it rests on
    act: Act
    engine: str  # token
    engine_name: str  # escaped
    session_id: str  # escaped
    salt: str  # escaped
    nonce: str  # nobody else's entry has it
    saved: int | None = None
    content: Saved | None = None  # of a save

    @property
    def is_owned(self) -> bool:
        """Whether somebody owns the session from here on, as long as that engine lives."""
        return self.act in (Act.CLAIM, Act.SAVE)


@dataclass(frozen=True, slots=True)
class Standing:
    """How one session stands. `newest` is None where that entry, number `last`, is unreadable, `content` where nothing is saved, or is."""

    key: str
    last: int
    newest: Entry | None
    content: Saved | None


_ENTRY = TypeAdapter(Entry)
_ABOUT = TypeAdapter(dict[str, Any])


def session_key(session_id: SessionId, salt: str) -> str:
    """The name of a session's directory, 32 hexadecimal digits, whatever the session is called."""
    return digest(f"{escaped(salt)}\n{escaped(session_id)}".encode("ascii")).hex()


class Journal:
    """The entries of all sessions in one directory."""

    def __init__(self, directory: Path, files: Files, *, kv_format: str) -> None:
        """`kv_format` is the digest of the format that entries must be of."""
        self._directory = directory
        self._files = files
        self._kv_format = kv_format
        self._seen: dict[tuple[str, int], Entry] = {}  # entries never change: a survey reads each once

    def keys(self) -> list[str]:
        """Every session's key, in no order; what they hold must be asked."""
        return [name for name in self._files.names(self._directory) if not name.startswith(".")]

    def numbers(self, key: str) -> list[int]:
        """The numbers of a session's entries, ascending; empty where there is none."""
        stems = (name.removesuffix(".json") for name in self._files.names(self._directory / key))
        return sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit())

    def newest(self, key: str) -> Entry | None:
        """What counts of a session now. Raises ImageRefused where it cannot be read, and DiskFailed where it changes all the time."""
        for _ in range(_TRIES):
            numbers = self.numbers(key)
            if not numbers:
                return None
            entry, refused = None, None
            try:
                entry = self.read(key, numbers[-1])
            except ImageRefused as error:
                refused = error
            except FileNotFoundError:
                continue
            if self.numbers(key)[-1:] == numbers[-1:]:
                if refused is not None:
                    raise refused
                return entry
        raise DiskFailed(f"{self._directory / key} changes faster than it can be read.")

    def read(self, key: str, number: int) -> Entry:
        """One entry. Raises ImageRefused, and FileNotFoundError."""
        with self._files.opened(self.path(key, number)) as fd:
            size, line = self._files.stat(fd).st_size, b""
            while b"\n" not in line and len(line) < size:
                more = bytearray(min(size - len(line), max(_PEEK_BYTES, len(line))))
                if not self._files.read_exactly(fd, memoryview(more), len(line)):
                    break
                line += more
        text = text_of(line.partition(b"\n")[0])
        about = parsed(_ABOUT, text)
        if about.get("version") != VERSION:
            raise ImageRefused(Refusal.VERSION, f"a manifest is of version {about.get('version')}, this is {VERSION}")
        if about.get("kv_format") != self._kv_format:
            raise ImageRefused(Refusal.FOREIGN, "a manifest is of another model, or of KV of another shape")
        entry = parsed(_ENTRY, json.dumps(about.get("entry")))
        if (entry.key, entry.number) != (key, number):
            raise ImageRefused(Refusal.CORRUPT, f"entry {number} of {key} is another one's")
        return entry

    def survey(self) -> list[Standing]:
        """All sessions, dropped ones included that are not erased yet. Reads what changed since the last time."""
        seen, self._seen = self._seen, {}
        standings: list[Standing] = []
        for key in self.keys():
            for number in self.numbers(key):
                if (key, number) in seen:
                    self._seen[key, number] = seen[key, number]
            standing = self._standing(key)
            if standing is not None:
                standings.append(standing)
        return standings

    def table(self, entry: Entry) -> bytes:
        """The block table of a save. Raises ImageRefused."""
        assert entry.content is not None, "only a save has a block table"
        try:
            _, _, table = self._files.read_file(self.path(entry.key, entry.number)).partition(b"\n")
        except FileNotFoundError:
            raise ImageRefused(Refusal.TRUNCATED, "the manifest is gone") from None
        if len(table) < entry.content.table_bytes:
            raise ImageRefused(Refusal.TRUNCATED, "the manifest's block table is cut off")
        if len(table) > entry.content.table_bytes or digest(table).hex() != entry.content.table_checksum:
            raise ImageRefused(Refusal.CORRUPT, "a checksum does not fit the block table")
        return table

    def packs_of(self, newest: Entry | None) -> tuple[str, ...]:
        """The packs that a session's newest entry keeps, as far as that can be read."""
        if newest is None or newest.saved is None:
            return ()
        with contextlib.suppress(ImageRefused, FileNotFoundError):
            content = self.read(newest.key, newest.saved).content
            return () if content is None else content.packs
        return ()

    def file_of(self, entry: Entry, table: bytes = b"") -> bytes:
        """The bytes of an entry's file."""
        about = {"version": VERSION, "kv_format": self._kv_format, "entry": asdict(entry)}
        return checked_line(json.dumps(about, separators=(",", ":"))) + table

    def append(self, entry: Entry, *, after: int | None, table: bytes = b"") -> bool:
        """Put an entry right behind the newest, number `after`; None: the session has no directory.

        False where another one was first: then nothing of it is left.
        """
        data = self.file_of(entry, table)
        if after is None:
            return self._begin(entry, data)
        assert entry.number == after + 1, "an entry takes the number behind the newest"
        for _ in range(_TRIES):
            named = self._give_name(entry, data)
            if named is not None:
                return named and self._stands(entry, after)
            if self.numbers(entry.key)[-1:] != [after]:
                return False  # the session was dropped
        raise DiskFailed(f"Files in {self._directory} vanish while they are written.")

    def prune(self, entry: Entry) -> None:
        """Remove what an entry that stands has made superfluous, as far as the disk lets us."""
        with contextlib.suppress(OSError):  # the next entry's turn comes
            for number in self.numbers(entry.key):
                if number < entry.number and number != entry.saved:
                    self._files.unlink(self.path(entry.key, number))

    def erase(self, key: str, last: int) -> None:
        """Remove a session's directory, whose newest entry, number `last`, dropped it, as far as the disk lets us."""
        with contextlib.suppress(OSError):  # somebody has begun it again, or else it is found there and erased later
            for number in self.numbers(key):
                if number <= last:  # the last one last: until then it says that there is no session
                    self._files.unlink(self.path(key, number))
            self._files.remove_dir(self._directory / key)

    def tidy(self, is_over: Callable[[str], bool]) -> None:
        """Remove what was half written by engines of which `is_over` says, by token, that they will not go on."""
        for name in self._files.names(self._directory):
            owner = owner_of_temporary(name)
            if owner is None or not is_over(owner):
                continue
            path = self._directory / name
            for inside in self._files.names(path) if path.is_dir() else ():
                self._files.unlink(path / inside)
            with contextlib.suppress(FileNotFoundError):  # another engine tidies up, too
                self._files.remove_dir(path) if path.is_dir() else self._files.unlink(path)

    def num_bytes(self, key: str) -> int:
        """The sizes of a session's entries."""
        return self._files.bytes_below(self._directory / key)

    def path(self, key: str, number: int) -> Path:
        """Where an entry lies."""
        return self._directory / key / f"{number}.json"

    def _standing(self, key: str) -> Standing | None:
        for _ in range(_TRIES):
            numbers = self.numbers(key)
            if not numbers:
                return None
            newest, content = None, None
            try:
                newest = self._known(key, numbers[-1])
                content = None if newest.saved is None else self._known(key, newest.saved).content
            except (ImageRefused, FileNotFoundError):
                pass  # it stays unread, unless it was just superseded
            standing = Standing(key, numbers[-1], newest, content)
            if self.numbers(key)[-1:] == numbers[-1:]:
                return standing
        raise DiskFailed(f"{self._directory / key} changes faster than it can be read.")

    def _known(self, key: str, number: int) -> Entry:
        if (key, number) not in self._seen:
            self._seen[key, number] = self.read(key, number)
        return self._seen[key, number]

    def _give_name(self, entry: Entry, data: bytes) -> bool | None:
        """Write an entry and give it its name; False where the name is taken, None where the file or the session's directory is gone."""
        temporary = self._directory / temporary_name(entry.engine)
        try:
            self._files.write_file(temporary, [data])
            self._files.link(temporary, self.path(entry.key, entry.number))
        except FileNotFoundError:
            return None  # the file: somebody thought that we were dead, and tidied up
        except FileExistsError:
            if not self._is_there(entry):  # it is where a server did it and its answer was lost
                return False
        finally:
            with contextlib.suppress(OSError):  # `tidy` removes it later; what happened above is what counts
                self._files.unlink(temporary)
        with contextlib.suppress(FileNotFoundError):  # it dropped the session, and somebody has erased that already
            self._files.sync_dir(self._directory / entry.key)
        return True

    def _begin(self, entry: Entry, data: bytes) -> bool:
        """Make the session's directory with its first entry in it."""
        temporary = self._directory / temporary_name(entry.engine)
        inside = temporary / f"{entry.number}.json"
        try:
            self._files.make_dir(temporary)
            self._files.write_file(inside, [data])
            self._files.sync_dir(temporary)
            self._files.rename(temporary, self._directory / entry.key)
            self._files.sync_dir(self._directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._files.unlink(inside)
                self._files.remove_dir(temporary)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return self._is_there(entry)
            raise
        return True

    def _is_there(self, entry: Entry) -> bool:
        """Whether an entry's number is taken by itself."""
        try:
            return self.read(entry.key, entry.number).nonce == entry.nonce
        except (ImageRefused, FileNotFoundError):
            return False

    def _stands(self, entry: Entry, after: int) -> bool:
        """Whether an entry that got its name counts; takes it back if not."""
        numbers = self.numbers(entry.key)
        if entry.number not in numbers:
            return False  # superseded
        if entry.number == numbers[-1]:
            stands = after in numbers  # else it fell into a session that was dropped and is just being erased
        else:
            try:
                newest = self.newest(entry.key)
                stands = newest is not None and newest.saved == entry.number
            except ImageRefused:
                return False  # somebody's claim came behind it and cannot be read: it stays, for whoever can
        if not stands:
            self._files.unlink(self.path(entry.key, entry.number))
        return stands
