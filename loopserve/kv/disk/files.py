"""What the disk tier asks of a file system: POSIX calls, one method each, and the few patterns made of them. Floor 2.

Everything that touches the disk goes through one of these, so that tests may fail any of them, or end the process there. Knows nothing
of sessions. Files are the owner's alone (0600): they hold what people said.
"""

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_NO_DIRECTORY_SYNC = (
    errno.EINVAL,
    errno.ENOTSUP,
)  # some network file systems: a name is durable there, or nothing makes it so


class Files:
    """The operating system's files. All methods raise OSError."""

    def create(self, path: Path) -> int:
        """Open a file for writing that is not there yet. Raises FileExistsError where it is."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def open(self, path: Path) -> int:
        """Open a file for reading."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def write(self, fd: int, data: memoryview) -> int:
        """Write some leading bytes of `data` at the end; how many."""
        return os.write(fd, data)

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        """Fill some leading bytes of `into` from `offset` on; how many, 0 at the end."""
        return os.preadv(fd, [into], offset)

    def sync(self, fd: int) -> None:
        """Make durable what a file, or a directory, holds."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Give the descriptor back."""
        os.close(fd)

    def stat(self, fd: int) -> os.stat_result:
        """Size and times, asked of an open file: a network file system then tells them as they are, not as they were."""
        return os.fstat(fd)

    def touch(self, path: Path) -> None:
        """Set a file's time to now, by the file system's clock."""
        os.utime(path)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or directory another name. A directory takes the place of an empty one only."""
        source.rename(target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name. Raises FileExistsError where that is taken: of many who try, one succeeds."""
        target.hardlink_to(source)

    def unlink(self, path: Path) -> None:
        """Take a file's name away, if it is there."""
        path.unlink(missing_ok=True)

    def make_dir(self, path: Path) -> None:
        """Make a directory. Raises FileExistsError where there is one."""
        path.mkdir(mode=0o700)

    def remove_dir(self, path: Path) -> None:
        """Remove an empty directory."""
        path.rmdir()

    def names(self, path: Path) -> list[str]:
        """What lies in a directory, in no order; nothing where that is not there."""
        try:
            with os.scandir(path) as found:
                return [item.name for item in found]
        except FileNotFoundError:
            return []

    def bytes_below(self, path: Path) -> int:
        """The sizes of all files below a directory, summed. Linear in their number."""
        total = 0
        try:
            with os.scandir(path) as found:
                for item in found:
                    with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                        is_dir = item.is_dir(follow_symlinks=False)
                        total += self.bytes_below(Path(item)) if is_dir else item.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            return 0
        return total

    def free_bytes(self, path: Path) -> int:
        """What the file system that holds a directory still takes from us."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

    @contextlib.contextmanager
    def opened(self, path: Path) -> Iterator[int]:
        """A file open for reading."""
        fd = self.open(path)
        try:
            yield fd
        finally:
            self.close(fd)

    def write_file(self, path: Path, parts: Iterable[bytes | memoryview], *, durable: bool = True) -> None:
        """Write a new file, and wait until the disk has it. A file that fails is left as it is."""
        fd = self.create(path)
        try:
            for part in parts:
                rest = memoryview(part)
                while rest:
                    rest = rest[self.write(fd, rest) :]
            if durable:
                self.sync(fd)
        finally:
            self.close(fd)

    def read_exactly(self, fd: int, into: memoryview, offset: int) -> bool:
        """Fill `into` from `offset` on; False where the file ends before."""
        while into:
            length = self.read(fd, into, offset)
            if length == 0:
                return False
            into, offset = into[length:], offset + length
        return True

    def read_file(self, path: Path) -> bytes:
        """All of a file."""
        with self.opened(path) as fd:
            data = bytearray(self.stat(fd).st_size)
            return bytes(data) if self.read_exactly(fd, memoryview(data), 0) else b""

    def modified_s(self, path: Path) -> float:
        """When a file was last written or touched, by the file system's clock."""
        with self.opened(path) as fd:
            return self.stat(fd).st_mtime

    def sync_dir(self, path: Path) -> None:
        """Make durable which names a directory has."""
        with self.opened(path) as fd:
            try:
                self.sync(fd)
            except OSError as error:
                if error.errno not in _NO_DIRECTORY_SYNC:
                    raise

    def ensure_dir(self, path: Path) -> None:
        """Make a directory and all above it, where they are missing."""
        if path.parent != path and not path.parent.is_dir():
            self.ensure_dir(path.parent)
        with contextlib.suppress(FileExistsError):
            self.make_dir(path)
