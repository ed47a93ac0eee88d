"""A file system on which time stands still unless it is moved, and anything may happen before any operation."""

import errno
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from loopserve.kv.disk.files import Files

CHANGES = (
    "create",
    "write",
    "touch",
    "rename",
    "link",
    "unlink",
    "make_dir",
    "remove_dir",
)  # the disk is another one afterwards
LOOKS = ("open", "names")
OPERATIONS = (*CHANGES, *LOOKS, "read", "sync", "close", "stat", "bytes_below", "free_bytes")
SHORT_BYTES = 1500  # of what is asked; some files of the tests are longer
NEED_ROOM = ("create", "write", "sync", "link", "make_dir")


class Killed(BaseException):
    """The process has ended."""


@dataclass
class FakeTime:
    """The clock of a file system."""

    now_s: float = 1_800_000_000.0

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


class ShakyFiles(Files):
    """Real files. `before` is called with the name of each `counted` operation, and its number, from 1; what it raises happens instead.

    A write that fails has written a half. Nothing waits for the disk.
    """

    def __init__(self, time: FakeTime) -> None:
        self.time = time
        self.num_operations = 0
        self.num_bytes_read = 0
        self.counted: Collection[str] = OPERATIONS
        self.before: Callable[[str, int], None] = lambda name, number: None
        self.free = 1 << 40

    def _set_time(self, target: Path | int) -> None:
        os.utime(target, (self.time.now_s, self.time.now_s))

    def create(self, path):
        self._happen("create")
        fd = super().create(path)
        self._set_time(fd)
        return fd

    def write(self, fd, data):
        try:
            self._happen("write")
        except BaseException:
            super().write(fd, data[: len(data) // 2])
            raise
        length = super().write(fd, data[:SHORT_BYTES])  # a short write is no failure
        self._set_time(fd)
        return length

    def read(self, fd, into, offset):
        self._happen("read")
        length = super().read(fd, into[:SHORT_BYTES], offset)
        self.num_bytes_read += length
        return length

    def sync(self, fd):
        self._happen("sync")

    def close(self, fd):
        super().close(fd)
        self._happen("close")

    def touch(self, path):
        self._happen("touch")
        self._set_time(path)

    def bytes_below(self, path):
        self._happen("bytes_below")
        return Files().bytes_below(path)

    def free_bytes(self, path):
        self._happen("free_bytes")
        return self.free

    def _happen(self, name: str) -> None:
        if name in self.counted:
            self.num_operations += 1
            self.before(name, self.num_operations)


def _as_it_is(name: str):
    real = getattr(Files, name)

    def method(self, *paths):
        self._happen(name)
        return real(self, *paths)

    return method


for _name in OPERATIONS:
    if _name not in vars(ShakyFiles):
        setattr(ShakyFiles, _name, _as_it_is(_name))


def killing_at(number: int) -> Callable[[str, int], None]:
    """The process ends before its operation `number`: nothing that it does happens from then on."""

    def before(name: str, now: int) -> None:
        if now >= number:
            raise Killed(name)

    return before


def failing_at(number: int) -> Callable[[str, int], None]:
    """One operation fails."""

    def before(name: str, now: int) -> None:
        if now == number:
            raise OSError(errno.EIO, f"{name} failed")

    return before


def full_from(number: int) -> Callable[[str, int], None]:
    """From operation `number` on the disk is full; it is told about those that need room."""

    def before(name: str, now: int) -> None:
        if now >= number:
            raise OSError(errno.ENOSPC, f"no room for {name}")

    return before


def once_at(number: int, act: Callable[[], None]) -> Callable[[str, int], None]:
    """Something else happens before operation `number`."""

    def before(name: str, now: int) -> None:
        if now == number:
            act()

    return before
