"""Owns what a result looks like on disk: one JSON file with every number, one Markdown file with the tables people read.

Knows nothing about what was measured.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import Machine

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a result, cells already formatted."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.header) for row in self.rows), "every row has a cell for every column"

    def markdown(self) -> str:
        """The table under its title."""
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        return f"## {self.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in cells)


def settings_of(args: Namespace) -> dict[str, Any]:
    """A script's arguments as a result records them: all but where it is written, which is nobody else's business."""
    return {name: value for name, value in vars(args).items() if not isinstance(value, Path)}


def write_result(
    directory: Path,
    name: str,
    *,
    title: str,
    machine: Machine,
    numbers: Mapping[str, Any],
    tables: Sequence[Table],
    notes: Sequence[str],
) -> str:
    """Write `name`.json and `name`.md into the directory, and give the Markdown back."""
    directory.mkdir(parents=True, exist_ok=True)
    record = {"title": title, "machine": asdict(machine), **numbers}
    write_whole(directory / f"{name}.json", json.dumps(record, indent=1) + "\n")
    parts = [f"# {title}", machine.sentence(), *(table.markdown() for table in tables)]
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    text = "\n\n".join(parts) + "\n"
    write_whole(directory / f"{name}.md", text)
    return text


def write_whole(file: Path, text: str) -> None:
    """Write a file that may be there already: whoever reads it, or kills the writer, finds the old text or the new one, not a part."""
    unfinished = file.with_name(f"{file.name}.new")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)
