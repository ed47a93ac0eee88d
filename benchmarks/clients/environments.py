"""The environments of the clients: one each, out of the repository's sight in `.clients/`, with every version pinned by a file in `pins/`.

A client never shares an environment with LoopServe or with another client, so none of them runs against anything but its own dependencies.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".clients"
PINS = Path(__file__).resolve().parent / "pins"
INSTALL_S_MAX = 1800.0


class EnvironmentFailed(Exception):
    """A client could not be installed; holds what pip said last."""


def python_of(client: str) -> Path:
    """The interpreter of a client's environment, which is made where it is missing or its pins have changed. Raises EnvironmentFailed."""
    pins, home = PINS / f"{client}.txt", HOME / client
    stamp, wanted = home / "pins.sha256", hashlib.sha256(pins.read_bytes()).hexdigest()
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        _run([sys.executable, "-m", "venv", "--clear", str(home)], client)
        _run([str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--requirement", str(pins)], client)
        stamp.write_text(wanted, encoding="utf-8")
    return home / "bin" / "python"


def version_of(python: Path, package: str) -> str:
    """The version of a package in an environment; `-` where it is not there."""
    if python == Path(sys.executable):
        return metadata.version(package)
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=60)
    return done.stdout.strip() or "-"


def _run(command: list[str], client: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S_MAX)
    if done.returncode:
        raise EnvironmentFailed(f"{client} cannot be installed: {done.stderr.strip()[-2000:]}")
