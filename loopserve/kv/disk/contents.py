"""The content of sessions on its way to packs and manifests, and back. Floor 2. Who may write is asked before.

A save is planned, then carried out: nothing is written before it is known to fit. Packs come first, under names that nobody looks for, so
that running out of room leaves nothing behind; then they get their own; the manifest comes last, and it is what counts.
"""

import base64
import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter

from loopserve.dialogue import SessionId
from loopserve.kv.disk.errors import DiskFailed, DiskFull, LeaseLost
from loopserve.kv.disk.files import Files
from loopserve.kv.disk.journal import Act, Entry, Journal, Saved
from loopserve.kv.disk.leases import Engines
from loopserve.kv.disk.owners import TRIES, Owners
from loopserve.kv.disk.packs import NewBlock, NewPack, Packs, Place
from loopserve.kv.disk.sweeper import Sweeper
from loopserve.kv.image import (
    BlockNamer,
    BranchImage,
    ImageRefused,
    KVFormat,
    Refusal,
    SessionImage,
    filled_tokens,
    gather_block,
    image_fault,
)
from loopserve.kv.sealed import digest, parsed, unescaped


@dataclass(frozen=True, slots=True)
class SavedSession:
    """What one save did."""

    epoch: int
    num_bytes_written: int  # packs and manifest
    num_blocks_written: int
    num_blocks_shared: int  # of the image, those that were stored already, or lie twice in it


@dataclass(frozen=True, slots=True)
class _Table:
    """What a manifest says beside its entry: block b lies in pack `packs[pack_of[b]]` at `index_of[b]`."""

    num_turns: int
    branches: tuple[BranchImage, ...]
    pack_of: tuple[int, ...]
    index_of: tuple[int, ...]
    notes: str  # base64


@dataclass(frozen=True, slots=True)
class _Plan:
    """A save, before anything is written."""

    entry: Entry
    table: bytes
    packs: tuple[NewPack, ...]
    shared_packs: frozenset[str]
    num_bytes: int


_TABLE = TypeAdapter(_Table)


class Contents:
    """Saves and loads sessions of one format. Not thread-safe."""

    def __init__(
        self,
        fmt: KVFormat,
        files: Files,
        engines: Engines,
        journal: Journal,
        packs: Packs,
        sweeper: Sweeper,
        owners: Owners,
        *,
        quota_bytes: int,
    ) -> None:
        self._fmt = fmt
        self._files = files
        self._engines = engines
        self._journal = journal
        self._packs = packs
        self._sweeper = sweeper
        self._owners = owners
        self._quota_bytes = quota_bytes

    def save(self, image: SessionImage, notes: bytes, held: Entry) -> SavedSession:
        """Store a session behind our newest entry of it. Raises LeaseLost, DiskFull, DiskFailed, OSError."""
        blocks = self._named(image)
        for _ in range(TRIES):
            plan = self._planned(image, notes, blocks, held)
            if self._carry_out(plan, image):
                num_written = sum(len(pack.blocks) for pack in plan.packs)
                return SavedSession(held.epoch, plan.num_bytes, num_written, image.num_blocks - num_written)
            held = self._owners.still_ours(held.key) or self._owners.own(image.session_id, image.salt)
        raise DiskFailed("Packs vanish while sessions are saved; is somebody removing files of the KV directory?")

    def load(self, entry: Entry) -> SessionImage:
        """The image that an entry saved. Reads no other blocks than its own. Raises ImageRefused, OSError."""
        if entry.content is None:
            raise ImageRefused(Refusal.CORRUPT, f"entry {entry.number} saved nothing")
        table = parsed(_TABLE, self._journal.table(entry))
        num_blocks, packs = entry.content.num_blocks, entry.content.packs
        if len(table.pack_of) != num_blocks or len(table.index_of) != num_blocks:
            raise ImageRefused(Refusal.CORRUPT, "the block table has more or fewer blocks than its entry says")
        if not all(0 <= number < len(packs) for number in table.pack_of):
            raise ImageRefused(Refusal.CORRUPT, "the block table names a pack that its entry does not")
        keys, values = (torch.empty(self._fmt.pool_shape(num_blocks), dtype=self._fmt.dtype) for _ in range(2))
        image = SessionImage(
            session_id=SessionId(unescaped(entry.session_id)),
            salt=unescaped(entry.salt),
            num_turns=table.num_turns,
            branches=table.branches,
            keys=keys,
            values=values,
        )
        fault = image_fault(image, self._fmt)
        if fault is not None:
            raise ImageRefused(Refusal.CORRUPT, fault)
        wanted: dict[str, list[tuple[int, int]]] = {}
        for block, (number, index) in enumerate(zip(table.pack_of, table.index_of, strict=True)):
            wanted.setdefault(packs[number], []).append((index, block))
        namer = BlockNamer(self._fmt, image.salt)
        for pack, places in wanted.items():
            self._packs.read(pack, sorted(places), namer, keys, values)
        return image

    def notes(self, entry: Entry) -> bytes:
        """What was put beside the image that an entry saved. Raises ImageRefused, OSError."""
        try:
            return base64.b64decode(parsed(_TABLE, self._journal.table(entry)).notes, validate=True)
        except ValueError:
            raise ImageRefused(Refusal.CORRUPT, "the notes are not in base64") from None

    def _named(self, image: SessionImage) -> list[NewBlock]:
        """The blocks of an image, by index, under the names that their content gives them."""
        namer, block = BlockNamer(self._fmt, image.salt), torch.empty(self._fmt.block_shape, dtype=self._fmt.dtype)
        blocks: list[NewBlock] = []
        for index, num_filled in enumerate(filled_tokens(image.branches, image.num_blocks, self._fmt.block_tokens)):
            gather_block(image, index, num_filled, block)
            blocks.append(NewBlock(index, namer.name(block), num_filled))
        return blocks

    def _planned(self, image: SessionImage, notes: bytes, blocks: Sequence[NewBlock], held: Entry) -> _Plan:
        """What a save will write behind the entry that we hold. Raises DiskFull where the quota forbids it."""
        known = self._packs.known(image.salt)
        fresh = {block.name: block for block in reversed(blocks) if block.name not in known}
        packs = self._packs.plan(image.salt, list(reversed(fresh.values())))
        places = {block.name: Place(pack.name, index) for pack in packs for index, block in enumerate(pack.blocks)}
        found = [places[block.name] if block.name in places else known[block.name] for block in blocks]
        names = tuple(dict.fromkeys(place.pack for place in found))
        number_of = {name: number for number, name in enumerate(names)}
        table = _TABLE.dump_json(
            _Table(
                num_turns=image.num_turns,
                branches=image.branches,
                pack_of=tuple(number_of[place.pack] for place in found),
                index_of=tuple(place.index for place in found),
                notes=base64.b64encode(notes).decode("ascii"),
            )
        )
        content = Saved(
            num_tokens=image.num_tokens,
            num_blocks=image.num_blocks,
            saved_s=self._engines.now_s(),
            packs=names,
            table_bytes=len(table),
            table_checksum=digest(table).hex(),
        )
        entry = replace(
            held,
            number=held.number + 1,
            act=Act.SAVE,
            nonce=secrets.token_hex(8),
            saved=held.number + 1,
            content=content,
        )
        num_bytes = sum(pack.num_bytes for pack in packs) + len(self._journal.file_of(entry, table))
        used_bytes = self._sweeper.used_bytes()
        if used_bytes + num_bytes > self._quota_bytes:
            raise DiskFull(
                f"The KV directory may hold {self._quota_bytes} bytes and holds {used_bytes}; {num_bytes} more do not fit. "
                "Raise its quota, or let sessions go."
            )
        new_names = {pack.name for pack in packs}
        return _Plan(entry, table, tuple(packs), frozenset(names) - new_names, num_bytes)

    def _carry_out(self, plan: _Plan, image: SessionImage) -> bool:
        """Write what was planned; False where packs that are shared, or were just written, are gone, and all must be planned anew.

        Raises LeaseLost. Where it fails nothing is left of it, as far as the disk lets us.
        """
        entry = plan.entry
        names = plan.shared_packs | {pack.name for pack in plan.packs}
        written: list[tuple[NewPack, Path]] = []
        stands = False
        try:
            self._engines.pin(names)
            self._engines.beat()  # pins count while we live
            if not plan.shared_packs <= set(self._packs.names()):
                return False
            for pack in plan.packs:
                written.append((pack, self._packs.write(pack, image, self._engines.token)))
                self._engines.beat()
            try:
                for pack, temporary in written:
                    self._files.rename(temporary, self._packs.path(pack.name))
            except FileNotFoundError:
                return False  # somebody thought that we were dead, and tidied up
            self._packs.sync()
            stands = self._journal.append(entry, after=entry.number - 1, table=plan.table)
            if not stands:
                raise LeaseLost("Another engine has claimed the session while it was saved; nothing was saved.")
            self._owners.hold(entry)
            self._journal.prune(entry)
            return names <= set(self._packs.names())
        except Exception:
            self._owners.forget(entry.key)  # whether it stands will be read
            raise
        finally:
            with contextlib.suppress(OSError):  # pins of ours that stay keep packs until the next save
                self._engines.unpin()
            if not stands:
                self._undo(written)

    def _undo(self, written: Sequence[tuple[NewPack, Path]]) -> None:
        """Remove packs that were written for nothing, unless somebody shares them by now. What stays is found by `make_room`."""
        with contextlib.suppress(OSError):
            for _, temporary in written:
                self._files.unlink(temporary)
            self._sweeper.collect(pack.name for pack, _ in written)
