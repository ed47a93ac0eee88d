"""Time to first token of a session that comes back, by the length of its history and by where its KV lies.

    on the device       nothing is brought
    in host memory      its blocks are moved to the device before the prompt's new rows are computed
    on disk             another engine saved it and has stopped; the system was asked to drop the files from its page cache
    computed again      nobody has it: the whole prompt is computed

Each place is an engine of its own that has been in use: its pool was written to before. A history is computed once a length and
imported under a name and a cache salt of its own for every sample, so that none finds another's blocks; new tokens differ from sample
to sample. A time runs from the submission to the first token, as the engine tells it, over threads and all. Places take turns. The
crossover is the length from which on bringing KV is sooner than computing it, there and at every longer history measured.

    python -m benchmarks.memory.warm_return
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path

import torch

from benchmarks.machine import describe_machine, require_quiet, usable_cores
from benchmarks.memory.copies import computed_once, text_ids
from benchmarks.report import RESULTS, Table, settings_of, write_result
from loopserve.config import BLOCK_TOKENS, DiskSettings, EngineConfig
from loopserve.dialogue import Mode, QualityContract, SamplingParams, SessionId, TurnEnded, TurnEvent, TurnRequest
from loopserve.engine import Engine
from loopserve.handoff import kv_format
from loopserve.kv.image import SessionImage, encode
from loopserve.loading import LoadedModel, load_model
from loopserve.stats import StepStats, TurnStats

_PATIENCE_S = 1e6  # nothing is moved, saved or given up behind a sample's back
_ANSWER_S_MAX = 600.0
_ANSWER_TOKENS = 2
_SPARE_BLOCKS = 4


class Place(StrEnum):
    """Where the KV of the session that comes back lies."""

    DEVICE = "on the device"
    HOST = "in host memory"
    DISK = "on disk"
    NOWHERE = "computed again"


@dataclass(frozen=True, slots=True)
class Sample:
    """One return."""

    first_token_s: float
    cached_tokens: int  # of the history: what did not have to be computed


@dataclass(frozen=True, slots=True)
class Row:
    """One place at one length."""

    history_tokens: int
    place: Place
    first_token_ms: float  # median
    least_ms: float
    most_ms: float
    samples: int
    cached_tokens: int  # the least of them


@dataclass(frozen=True, slots=True)
class Crossover:
    """From which length on a place is sooner than computing again. `tokens` None: at the longest it is not."""

    place: Place
    tokens: float | None
    is_everywhere: bool  # it was sooner at the shortest length, too

    def sentence(self) -> str:
        """The same for a reader."""
        if self.tokens is None:
            return f"{self.place.capitalize()}: not sooner than computing again at the longest history measured."
        if self.is_everywhere:
            return f"{self.place.capitalize()}: sooner than computing again at every length measured, from {self.tokens:.0f} tokens on."
        return (
            f"{self.place.capitalize()}: sooner than computing again from about {self.tokens:.0f} tokens of history on."
        )


class Site:
    """One place: an engine that runs on its own thread, and sessions that come back to it. Not thread-safe."""

    def __init__(
        self, place: Place, loaded: LoadedModel, *, longest_tokens: int, directory: Path, settings: EngineConfig
    ) -> None:
        """`longest_tokens`: of any conversation. `directory` is that of the disk's place."""
        num_blocks = -(-longest_tokens // BLOCK_TOKENS) + _SPARE_BLOCKS
        has_host = place in (Place.HOST, Place.DISK)
        disk = DiskSettings(
            directory=str(directory), shared=True, save_after_s=_PATIENCE_S, wait_s=_ANSWER_S_MAX, flush_s=_ANSWER_S_MAX
        )
        self.place = place
        self._loaded = loaded
        self._config = replace(
            settings,
            kv_blocks=num_blocks,
            host_blocks=num_blocks if has_host else 0,
            offload_after_s=_PATIENCE_S,
            disk=disk if place is Place.DISK else DiskSettings(),
        )
        self._turns: list[TurnStats] = []
        self._engine = Engine(self._config, loaded=loaded, stats=self)
        self._engine.start()

    def on_step(self, stats: StepStats) -> None:
        """Steps are not looked at."""

    def on_turn(self, stats: TurnStats) -> None:
        """Keep it."""
        self._turns.append(stats)

    def sample(self, history: SessionImage, new_ids: Sequence[int], *, name: str, mode: Mode) -> Sample:
        """Put the history where this place has it, and let it come back with new tokens. Raises RuntimeError where the turn fails."""
        session_id = SessionId(name)
        own = replace(history, session_id=session_id, salt=name)
        if self.place is Place.DISK:
            self._save_elsewhere(own)
        elif self.place is not Place.NOWHERE:
            self._engine.import_session(encode(own, kv_format(self._loaded)))
        request = TurnRequest(
            session_id,
            (*history.branches[0].token_ids, *new_ids),
            SamplingParams(max_tokens=_ANSWER_TOKENS, temperature=0.0, ignore_eos=True),
            QualityContract(mode=mode),
            cache_salt=name,
        )
        listener = _Listener()
        self._engine.submit(request, listener)
        if not listener.is_over.wait(_ANSWER_S_MAX):
            raise RuntimeError(f"a turn that comes back {self.place} was not answered within {_ANSWER_S_MAX:.0f} s")
        if listener.error is not None:
            raise RuntimeError(f"a turn that comes back {self.place} failed: {listener.error}")
        self._engine.release(session_id)  # between steps: the turn's stats are here, and no block of it is left
        (stats,), self._turns = self._turns, []
        assert stats.first_token_s is not None, "an answered turn has a first token"
        return Sample(stats.first_token_s, stats.usage.cached_tokens)

    def close(self) -> None:
        """Stop the engine."""
        self._engine.stop()

    def _save_elsewhere(self, image: SessionImage) -> None:
        """By an engine that ends with it, so that its lease is free; then the files leave the page cache."""
        directory = self._config.disk.directory
        other = Engine(replace(self._config, host_blocks=0), loaded=self._loaded)
        other.import_session(encode(image, kv_format(self._loaded)))
        other.stop()
        disk = other.memory().disk
        if disk is None or disk.saved_sessions != 1:
            raise RuntimeError(f"the session was not saved: {disk}")
        forget_cached(Path(directory))


class _Listener:
    """Waits for a turn's end."""

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.error: str | None = None

    def __call__(self, events: Sequence[TurnEvent]) -> None:
        for event in events:
            if isinstance(event, TurnEnded):
                self.error = event.error
                self.is_over.set()


def forget_cached(directory: Path) -> None:
    """Ask the system to drop a directory's files from its page cache, once they are on the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in (path for path in directory.rglob("*") if path.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measure(loaded: LoadedModel, args: argparse.Namespace, settings: EngineConfig) -> list[Row]:
    """All places at all lengths, the shortest first."""
    longest = max(args.histories) + args.new_tokens + _ANSWER_TOKENS
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=args.disk_directory) as folder:
        sites = [
            Site(place, loaded, longest_tokens=longest, directory=Path(folder), settings=settings) for place in Place
        ]
        try:
            for length in sorted(args.histories):
                found = _at_length(loaded, sites, length, args, is_first=not rows)
                rows += [row_of(length, place, samples) for place, samples in found.items()]
                print(f"{length} tokens of history: measured", flush=True)
        finally:
            for site in sites:
                site.close()
    return rows


def _at_length(
    loaded: LoadedModel, sites: Sequence[Site], length: int, args: argparse.Namespace, *, is_first: bool
) -> Mapping[Place, list[Sample]]:
    history = computed_once(loaded, text_ids(loaded, length, seed=args.seed, is_random=args.random_text))
    found: dict[Place, list[Sample]] = {site.place: [] for site in sites}
    for turn in range(args.repeats + 1):  # the first does not count: its length is new to every pool
        for site in (*sites[turn % len(sites) :], *sites[: turn % len(sites)]):
            if turn == 0 and site.place is Place.NOWHERE and not is_first:
                continue  # computing again is long, and gains little from having been done before
            name = f"{site.place} {length} {turn}"
            new_ids = text_ids(loaded, args.new_tokens, seed=args.seed + turn + 1, is_random=args.random_text)
            sample = site.sample(history, new_ids, name=name, mode=Mode(args.mode))
            if turn:
                found[site.place].append(sample)
    return found


def row_of(length: int, place: Place, samples: Sequence[Sample]) -> Row:
    """What samples of one place and length come to."""
    times = [1e3 * sample.first_token_s for sample in samples]
    cached = min(sample.cached_tokens for sample in samples)
    return Row(length, place, statistics.median(times), min(times), max(times), len(times), cached)


def crossovers(rows: Sequence[Row]) -> list[Crossover]:
    """One for each place but computing again; between two lengths, where straight lines through them meet."""
    by_place = {
        place: {row.history_tokens: row.first_token_ms for row in rows if row.place is place} for place in Place
    }
    again = by_place.pop(Place.NOWHERE)
    return [_crossover(place, times, again) for place, times in by_place.items() if times]


def _crossover(place: Place, times: Mapping[int, float], again: Mapping[int, float]) -> Crossover:
    lengths = sorted(times.keys() & again.keys())
    gains = [again[length] - times[length] for length in lengths]
    losing = [index for index, gain in enumerate(gains) if gain <= 0]
    if not losing:
        return Crossover(place, lengths[0], is_everywhere=True)
    last = losing[-1]
    if last == len(lengths) - 1:
        return Crossover(place, None, is_everywhere=False)
    share = -gains[last] / (gains[last + 1] - gains[last])
    return Crossover(place, lengths[last] + share * (lengths[last + 1] - lengths[last]), is_everywhere=False)


def run_benchmark(args: argparse.Namespace, command: Sequence[str] = (), *, loaded: LoadedModel | None = None) -> str:
    """All of it; writes the result and gives its Markdown. `loaded` stands for the model where it is in memory already."""
    load = require_quiet(forced=args.force)
    torch.set_num_threads(args.threads)
    settings = EngineConfig(model=args.model, device="cpu", dtype="float32")
    loaded = load_model(settings) if loaded is None else loaded
    longest = max(args.histories) + args.new_tokens + _ANSWER_TOKENS
    if longest > loaded.max_positions:
        raise SystemExit(
            f"The model takes {loaded.max_positions} positions, {longest} are needed: shorten --histories."
        )
    rows = measure(loaded, args, settings)
    found = crossovers(rows)
    said = shlex.join(["python", "-m", "benchmarks.memory.warm_return", *command])
    return write_result(
        args.results,
        args.name,
        title="Time to first token of a session that comes back",
        machine=describe_machine(load_before=load),
        numbers={
            "forced": args.force,
            "settings": settings_of(args),
            "command": said,
            "rows": [asdict(row) for row in rows],
            "crossovers": [asdict(each) for each in found],
        },
        tables=[table(rows)],
        notes=[*notes(args, loaded, rows), *(each.sentence() for each in found), f"`{said}`"],
    )


def table(rows: Sequence[Row]) -> Table:
    """A line a length."""
    by_length: dict[int, dict[Place, Row]] = {}
    for row in rows:
        by_length.setdefault(row.history_tokens, {})[row.place] = row
    return Table(
        "Milliseconds to the first token: median (least to most), and how many times sooner than computing again",
        ("history", *(str(place) for place in Place)),
        tuple(
            (str(length), *(_cell(found.get(place), found[Place.NOWHERE]) for place in Place))
            for length, found in by_length.items()
        ),
    )


def _cell(row: Row | None, again: Row) -> str:
    if row is None:
        return "-"
    times = f"{row.first_token_ms:.1f} ({row.least_ms:.1f} to {row.most_ms:.1f})"
    if row.place is Place.NOWHERE:
        return times
    if not row.cached_tokens:  # the engine thought it not worth bringing, or had lost it
        return f"{times}, computed all the same"
    return f"{times}, {again.first_token_ms / row.first_token_ms:.1f} x"


def notes(args: argparse.Namespace, loaded: LoadedModel, rows: Sequence[Row]) -> list[str]:
    """What a reader must know beside the table."""
    counts = {row.samples for row in rows}
    return [
        f"Model: {loaded.name}, {loaded.num_layers} layers, {loaded.num_heads} query heads over {loaded.num_kv_heads} KV heads of "
        f"{loaded.head_dim}, {loaded.dtype}; {'random tokens' if args.random_text else 'made dialogues'}.",
        f"{args.new_tokens} new tokens, mode {args.mode}, {', '.join(map(str, sorted(counts)))} samples a place and length, places "
        "in turns, after one that does not count. Engines run on threads of their own, as in a service.",
        "On a CPU the device and host memory are the same memory: what lies in host memory is copied within it. What came from disk "
        "lies in host memory before it moves to the device. Before each load the system was asked to write its files and to drop them "
        "from the page cache.",
        *(["FORCED on a machine that was not quiet: not to be published."] if args.force else []),
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lengths = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_256]
    parser.add_argument("--histories", type=int, nargs="+", default=lengths, help="tokens of the history")
    parser.add_argument("--new-tokens", type=int, default=64, help="of the turn that comes back")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mode", choices=[mode.value for mode in Mode], default=Mode.AUTO.value)
    parser.add_argument("--model", default="", help="hub id or directory; the shipped model if not given")
    parser.add_argument(
        "--random-text", action="store_true", help="histories of random tokens, for models of any vocabulary"
    )
    parser.add_argument(
        "--disk-directory", type=Path, default=None, help="where the disk's files are; the system's temporary"
    )
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="run on a busy machine; the result says so")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="memory_warm_return")
    args = parser.parse_args(arguments)
    if args.repeats < 1:
        parser.error("--repeats must be positive")
    return args


if __name__ == "__main__":
    print(run_benchmark(parse_arguments(), sys.argv[1:]))
