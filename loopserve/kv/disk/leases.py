"""Which engines use a directory, and which of them live: an engine's leases last as long as its heartbeat. Floor 2.

Every engine has two files in `engines/`, named by a token that no other has, and sometimes a third:

    <token>.json    who it is; its time is the last heartbeat. Gone: the engine left, and all its leases with it
    <token>.clock   touched to read the file system's clock: times of files are compared with times of files, never with a machine's
    <token>.pins    packs that a manifest of this engine is about to name (see `sweeper`)

A network file system may tell old times for as long as it caches attributes. Files are opened to be asked, which makes it ask its server;
a lease should last several times as long as that cache, all the same.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from loopserve.kv.disk.files import Files
from loopserve.kv.sealed import ImageRefused, checked_line, escaped, parsed, text_of

_FORGOTTEN_LEASES = 100  # an engine that has been silent for so many of its leases is not expected back
_TOKEN_BYTES = 8


@dataclass(frozen=True, slots=True)
class Process:
    """A process so described that another one on the same machine can tell whether it still runs."""

    host: str
    boot: str  # id of the machine's run; empty where there is none
    namespace: str  # that process ids are of; containers that share a host's name have their own
    pid: int
    started: str  # when, as the machine tells it: process ids come again

    @classmethod
    def this(cls) -> "Process":
        """The one that asks."""
        return cls(socket.gethostname(), _boot(), _namespace(), os.getpid(), _started(os.getpid()) or "")


def is_gone(process: Process) -> bool:
    """Whether a process certainly ran here and runs no more. False where that cannot be told from here."""
    if os.name != "posix" or (process.host, process.boot, process.namespace) != (
        socket.gethostname(),
        _boot(),
        _namespace(),
    ):
        return False
    try:
        os.kill(process.pid, 0)  # asks only
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it is there, and somebody else's
    return bool(process.started) and _started(process.pid) != process.started


@dataclass(frozen=True, slots=True)
class _Engine:
    name: str
    lease_s: float
    process: Process


@dataclass(frozen=True, slots=True)
class _Pins:
    packs: tuple[str, ...]


_ENGINE = TypeAdapter(_Engine)
_PINS = TypeAdapter(_Pins)


class Engines:
    """The engines of a directory, seen by one of them. `beat` and `enter_anew` may be called from any thread, the rest from one."""

    def __init__(
        self,
        directory: Path,
        files: Files,
        *,
        name: str,
        lease_s: float,
        process: Process,
        is_gone: Callable[[Process], bool],
    ) -> None:
        self._directory = directory
        self._files = files
        self._about = checked_line(json.dumps(asdict(_Engine(escaped(name), lease_s, process))))
        self._lease_s = lease_s
        self._is_gone = is_gone
        self._presence = threading.Lock()  # a heartbeat must not bring back an engine that has just left
        self.token = ""  # who this engine is to others; another one after each `enter_anew`

    def enter(self) -> None:
        """Be an engine that holds no lease yet; one that has entered stays what it is."""
        with self._presence:
            if not self.token:
                self._enter()

    def enter_anew(self) -> None:
        """Give all leases up at once and be another engine."""
        with self._presence:
            self._leave()
            self._enter()

    def leave(self) -> None:
        """Give all leases up at once; leaving again does nothing."""
        with self._presence:
            self._leave()

    def beat(self) -> None:
        """Renew all leases for `lease_s`."""
        with self._presence:
            if not self.token:
                return
            try:
                self._files.touch(self._path("json"))
            except (
                FileNotFoundError
            ):  # after a long silence others tidied up: what they claimed, they will not give back
                self._introduce()

    def now_s(self) -> float:
        """The file system's clock."""
        clock = self._path("clock")
        try:
            self._files.touch(clock)
        except FileNotFoundError:
            self._files.write_file(clock, [], durable=False)
        return self._files.modified_s(clock)

    def is_live(self, token: str) -> bool:
        """Whether an engine may still hold leases."""
        if token == self.token:
            return True
        path = self._path("json", token)
        lease_s = self._lease_s
        try:
            silent_since_s = self._files.modified_s(path)
            with contextlib.suppress(ImageRefused):  # who it is cannot be told: it has the lease that is usual here
                engine = parsed(_ENGINE, text_of(self._files.read_file(path)))
                lease_s = engine.lease_s
                if self._is_gone(engine.process):
                    return False
        except FileNotFoundError:
            return False
        return self.now_s() - silent_since_s < lease_s

    def census(self) -> Callable[[str], bool]:
        """`is_live`, asking once for each engine."""
        known: dict[str, bool] = {}

        def is_live(token: str) -> bool:
            if token not in known:
                known[token] = self.is_live(token)
            return known[token]

        return is_live

    def pin(self, packs: Collection[str]) -> None:
        """Let nobody remove these packs until `unpin`, where they are still there."""
        temporary = self._directory / temporary_name(self.token)
        try:
            pins = checked_line(json.dumps(asdict(_Pins(tuple(packs)))))
            self._files.write_file(temporary, [pins], durable=False)
            self._files.rename(temporary, self._path("pins"))
        except OSError:
            with contextlib.suppress(OSError):
                self._files.unlink(temporary)
            raise

    def unpin(self) -> None:
        """Nothing is pinned by this engine any more."""
        self._files.unlink(self._path("pins"))

    def pinned(self) -> set[str] | None:
        """The packs that live engines have pinned; None where somebody's pins cannot be read, and all must stay."""
        packs: set[str] = set()
        for name in self._files.names(self._directory):
            token, _, kind = name.partition(".")
            if kind != "pins" or not self.is_live(token):
                continue
            try:
                packs.update(parsed(_PINS, text_of(self._files.read_file(self._directory / name))).packs)
            except FileNotFoundError:
                continue  # unpinned just now
            except ImageRefused:
                return None
        return packs

    def tidy(self) -> None:
        """Remove the files of engines that left, or have been silent for very long, and what they left half written."""
        for name in self._files.names(self._directory):
            token = owner_of_temporary(name) or name.partition(".")[0]
            path = self._directory / name
            if token == self.token or self.is_live(token):
                continue
            with contextlib.suppress(FileNotFoundError):
                silent_s = self.now_s() - self._files.modified_s(path)
                if silent_s > self._lease_s * (_FORGOTTEN_LEASES if name.endswith(".json") else 1):
                    self._files.unlink(path)

    def _enter(self) -> None:
        self.token = secrets.token_hex(_TOKEN_BYTES)
        try:
            self._introduce()
        except BaseException:
            self.token = ""
            raise

    def _introduce(self) -> None:
        temporary = self._directory / temporary_name(self.token)
        try:
            self._files.write_file(temporary, [self._about], durable=False)
            self._files.touch(temporary)
            self._files.rename(temporary, self._path("json"))
        except OSError:
            with contextlib.suppress(OSError):
                self._files.unlink(temporary)
            raise

    def _leave(self) -> None:
        if self.token:
            for kind in ("json", "pins", "clock"):  # the first one ends it; the others are only litter
                self._files.unlink(self._path(kind))
        self.token = ""

    def _path(self, kind: str, token: str | None = None) -> Path:
        return self._directory / f"{self.token if token is None else token}.{kind}"


def temporary_name(token: str) -> str:
    """A new name for what an engine writes and will rename. It begins with a dot: nobody takes it for anything else."""
    return f".{token}-{secrets.token_hex(_TOKEN_BYTES)}.tmp"


def owner_of_temporary(name: str) -> str | None:
    """The token of the engine that writes under this name; None for other names."""
    token, dash, _ = name.removeprefix(".").partition("-")
    return token if name.startswith(".") and name.endswith(".tmp") and dash else None


def _boot() -> str:
    return _first_line(Path("/proc/sys/kernel/random/boot_id"))


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process was started; None where it has ended and only its parent has not noticed, or where nobody tells."""
    fields = _first_line(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else None


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except OSError:
        return ""
