"""Packs: files of blocks, each block once in a tenant, found again by its content. Floor 2.

`packs/<salt key>.<nonce>.safetensors` is a sealed file (`sealed`) of blocks of one salt:

    blocks    [N, 2, L, T, Hkv, D]   keys and values; a block is one run of bytes, so that bringing some reads nothing else
    about     KVFormat, the pack's own name, the names of its blocks (`BlockNamer`)

The packs are their own index: their headers say which blocks a tenant has, and are read when it first saves. A pack is written under a
temporary name and never changes. When it goes is decided by `sweeper`. Full blocks and partly filled ones lie in packs of their own: the
latter are superseded by the next save, and their packs with them. Two engines that store one block at the same moment store it twice; and
a pack stays whole while one of its blocks is needed, so what was dropped may lie there beside what another session of the tenant shares.
"""

import contextlib
import json
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from loopserve.kv.disk.files import Files
from loopserve.kv.disk.leases import owner_of_temporary, temporary_name
from loopserve.kv.image import BlockNamer, KVFormat, SessionImage, gather_block
from loopserve.kv.sealed import (
    DIGEST_BYTES,
    ImageRefused,
    Part,
    Refusal,
    digest,
    escaped,
    make_head,
    make_seal,
    parsed,
    raw,
    read_head,
)

VERSION = 1
SUFFIX = ".safetensors"
DOOMED = ".doomed"
_KIND = "loopserve.kv_pack"
_PACK_BYTES_MAX = 64 << 20  # a few packs a second on any disk, so heartbeats go out between them; and few files
_PACK_BLOCKS_MAX = 4096  # of small models: a header stays below 200 KB
_SCRATCH_BYTES = 4 << 20  # blocks on their way between an image's layout and a pack's
_INDEX_BLOCKS_MAX = 1 << 20  # about 250 bytes each; what is not in the index is stored again


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block lies."""

    pack: str
    index: int


@dataclass(frozen=True, slots=True)
class NewBlock:
    """A block of an image that is to be stored."""

    index: int
    name: bytes
    num_filled: int  # computed tokens


@dataclass(frozen=True, slots=True)
class NewPack:
    """A pack to be written."""

    name: str
    blocks: tuple[NewBlock, ...]
    head: bytes
    num_bytes: int  # of its file


@dataclass(frozen=True, slots=True)
class _About:
    kv_format: str
    pack: str
    blocks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Head:
    blocks: tuple[bytes, ...]  # names, by index
    first_byte: int


_ABOUT = TypeAdapter(_About)


@dataclass(slots=True)
class _TenantIndex:
    """Which blocks the packs of one salt hold."""

    places: dict[bytes, Place] = field(default_factory=dict)
    packs: dict[str, tuple[bytes, ...]] = field(default_factory=dict)

    def add(self, pack: str, blocks: tuple[bytes, ...]) -> None:
        self.packs[pack] = blocks
        for index, block in enumerate(blocks):
            self.places.setdefault(block, Place(pack, index))

    def forget(self, packs: set[str]) -> None:
        for pack in packs:
            for block in self.packs.pop(pack):
                place = self.places.get(block)  # None: it lay in two packs, and the other one was forgotten before
                if place is not None and place.pack == pack:
                    del self.places[block]


class Packs:
    """The packs of one directory. Not thread-safe."""

    def __init__(self, directory: Path, files: Files, fmt: KVFormat) -> None:
        self._directory = directory
        self._files = files
        self._fmt = fmt
        self._kv_format = fmt.as_text()
        self._tenants: OrderedDict[str, _TenantIndex] = OrderedDict()  # by salt key, least recently used first
        self._distrusted: set[str] = set()  # packs in which something was wrong; what they have is stored again
        self._num_scratch = max(1, _SCRATCH_BYTES // fmt.block_bytes)

    def names(self) -> list[str]:
        """Every pack, in no order."""
        return [name.removesuffix(SUFFIX) for name in self._files.names(self._directory) if name.endswith(SUFFIX)]

    def known(self, salt: str) -> Mapping[bytes, Place]:
        """The blocks of a tenant that are stored, by name, as its packs say now. Valid until the next call."""
        key = salt_key(salt)
        tenant = self._tenants.setdefault(key, _TenantIndex())
        self._tenants.move_to_end(key)
        there = {name for name in self.names() if name.startswith(f"{key}.")} - self._distrusted
        tenant.forget(tenant.packs.keys() - there)
        for name in sorted(there - tenant.packs.keys()):
            if len(tenant.places) >= _INDEX_BLOCKS_MAX:
                break
            try:
                with self._files.opened(self.path(name)) as fd:
                    tenant.add(name, self._read_head(name, fd).blocks)
            except FileNotFoundError:
                continue  # removed since it was listed
            except ImageRefused:
                self._distrusted.add(name)
        while len(self._tenants) > 1 and sum(len(t.places) for t in self._tenants.values()) > _INDEX_BLOCKS_MAX:
            self._tenants.popitem(last=False)
        return tenant.places

    def plan(self, salt: str, blocks: Sequence[NewBlock]) -> list[NewPack]:
        """Packs that hold these blocks, full ones and others apart."""
        most = max(1, min(_PACK_BLOCKS_MAX, _PACK_BYTES_MAX // self._fmt.block_bytes))
        full = [block for block in blocks if block.num_filled == self._fmt.block_tokens]
        partial = [block for block in blocks if block.num_filled < self._fmt.block_tokens]
        return [
            self._planned(salt, kind[start : start + most])
            for kind in (full, partial)
            for start in range(0, len(kind), most)
        ]

    def write(self, pack: NewPack, image: SessionImage, token: str) -> Path:
        """Write a pack durably under a temporary name, which the caller renames to `path` or unlinks. Where it fails nothing is left."""
        temporary = self._directory / temporary_name(token)
        try:
            self._files.write_file(temporary, self._pieces(pack, image))
        except OSError:
            with contextlib.suppress(OSError):
                self._files.unlink(temporary)
            raise
        return temporary

    def read(
        self, pack: str, wanted: Sequence[tuple[int, int]], namer: BlockNamer, keys: Tensor, values: Tensor
    ) -> None:
        """Bring blocks of a pack: index there, ascending, and index in `keys` and `values` [L, B, T, Hkv, D], which are written.

        Reads the header and what is wanted, and checks it. Raises ImageRefused.
        """
        try:
            with self._files.opened(self._found(pack)) as fd:
                self._read(pack, fd, wanted, namer, keys, values)
        except FileNotFoundError:
            raise ImageRefused(Refusal.TRUNCATED, f"pack {pack} is gone") from None
        except ImageRefused:
            self._distrusted.add(pack)
            raise

    def path(self, pack: str) -> Path:
        """Where a pack lies."""
        return self._directory / f"{pack}{SUFFIX}"

    def doom(self, pack: str, token: str) -> Path | None:
        """Take a pack's name away, so that nobody finds it: the path where it lies now, or None where it is not there."""
        doomed = self._directory / f"{pack}.{token}{DOOMED}"
        try:
            self._files.rename(self.path(pack), doomed)
        except FileNotFoundError:
            return None
        return doomed

    def spare(self, pack: str, doomed: Path) -> None:
        """Give a doomed pack its name back."""
        with contextlib.suppress(FileNotFoundError):  # somebody who needed it did
            self._files.rename(doomed, self.path(pack))

    def num_bytes(self, pack: str) -> int:
        """The size of a pack's file; 0 where it is gone."""
        try:
            with self._files.opened(self.path(pack)) as fd:
                return self._files.stat(fd).st_size
        except FileNotFoundError:
            return 0

    def tidy(self, is_over: Callable[[str], bool]) -> None:
        """Give packs their name back that were doomed, and remove what was half written, by engines that will not go on (`is_over`)."""
        for name in self._files.names(self._directory):
            owner = owner_of_temporary(name)
            if owner is not None and is_over(owner):
                self._files.unlink(self._directory / name)
            elif name.endswith(DOOMED):
                pack, _, token = name.removesuffix(DOOMED).rpartition(".")
                if is_over(token):
                    self.spare(pack, self._directory / name)

    def sync(self) -> None:
        """Make the packs' names durable."""
        self._files.sync_dir(self._directory)

    def _found(self, pack: str) -> Path:
        """Where a pack lies that a manifest names: it gets its name back where it was doomed before that."""
        path = self.path(pack)
        names = self._files.names(self._directory)
        if path.name not in names:
            for name in names:
                if name.startswith(f"{pack}.") and name.endswith(DOOMED):
                    self.spare(pack, self._directory / name)
        return path

    def _planned(self, salt: str, blocks: Sequence[NewBlock]) -> NewPack:
        name = f"{salt_key(salt)}.{secrets.token_hex(8)}"
        about = _About(self._kv_format, name, tuple(block.name.hex() for block in blocks))
        part = self._part(len(blocks))
        head = make_head(_KIND, VERSION, json.dumps(asdict(about), separators=(",", ":")), (part,))
        return NewPack(name, tuple(blocks), head, len(head) + part.num_bytes + DIGEST_BYTES)

    def _part(self, num_blocks: int) -> Part:
        return Part("blocks", self._fmt.dtype, (num_blocks, *self._fmt.block_shape))

    def _pieces(self, pack: NewPack, image: SessionImage) -> Iterator[bytes | memoryview]:
        """A pack's file, piece by piece; each is valid until the next one is asked for."""
        yield pack.head
        scratch = self._scratch(len(pack.blocks))
        for start in range(0, len(pack.blocks), self._num_scratch):
            some = pack.blocks[start : start + self._num_scratch]
            for place, block in enumerate(some):
                gather_block(image, block.index, block.num_filled, scratch[place])
            yield raw(scratch[: len(some)])
        yield make_seal(pack.head)

    def _scratch(self, num_blocks: int) -> Tensor:
        return torch.empty((min(num_blocks, self._num_scratch), *self._fmt.block_shape), dtype=self._fmt.dtype)

    def _read_head(self, pack: str, fd: int) -> _Head:
        def read(offset: int, length: int) -> memoryview:
            data = memoryview(bytearray(length))
            if not self._files.read_exactly(fd, data, offset):
                raise ImageRefused(Refusal.TRUNCATED, f"pack {pack} ends too early")
            return data

        head = read_head(_KIND, VERSION, self._files.stat(fd).st_size, read)
        about = parsed(_ABOUT, head.about)
        if about.kv_format != self._kv_format:
            raise ImageRefused(Refusal.FOREIGN, f"pack {pack} holds KV of {about.kv_format}, ours is {self._kv_format}")
        if about.pack != pack or head.parts != (self._part(len(about.blocks)),):
            raise ImageRefused(Refusal.CORRUPT, f"pack {pack} is another one, or not laid out as one")
        return _Head(tuple(_name_of(text) for text in about.blocks), head.starts[0])

    def _read(
        self, pack: str, fd: int, wanted: Sequence[tuple[int, int]], namer: BlockNamer, keys: Tensor, values: Tensor
    ) -> None:
        head = self._read_head(pack, fd)
        scratch = self._scratch(len(head.blocks))
        for run in _runs(wanted, self._num_scratch):
            first, last = run[0][0], run[-1][0]
            if not 0 <= first <= last < len(head.blocks):
                raise ImageRefused(Refusal.CORRUPT, f"pack {pack} has no block {last}")
            got = scratch[: last - first + 1]
            if not self._files.read_exactly(fd, raw(got), head.first_byte + first * self._fmt.block_bytes):
                raise ImageRefused(Refusal.TRUNCATED, f"pack {pack} ends too early")
            for index, target in run:
                block = got[index - first]
                if namer.name(block) != head.blocks[index]:
                    raise ImageRefused(Refusal.CORRUPT, f"a checksum does not fit block {index} of pack {pack}")
                keys[:, target].copy_(block[0])
                values[:, target].copy_(block[1])


def salt_key(salt: str) -> str:
    """What stands for a salt in names, 32 hexadecimal digits."""
    return digest(escaped(salt).encode("ascii")).hex()


def _name_of(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise ImageRefused(Refusal.CORRUPT, "a block's name is malformed") from None


def _runs(wanted: Sequence[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """Ascending indices cut where one is left out, or a run would be longer than `most`."""
    run: list[tuple[int, int]] = []
    for item in wanted:
        if run and (item[0] > run[-1][0] + 1 or item[0] - run[0][0] >= most):
            yield run
            run = []
        run.append(item)
    if run:
        yield run
