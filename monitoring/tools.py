"""Where the programs of Prometheus are on this machine. Knows nothing of what they are used for."""

import os
import shutil
from pathlib import Path

_UNPACKED = Path(__file__).resolve().parent.parent / ".tools" / "usr" / "bin"


def find_tool(name: str) -> Path | None:
    """`prometheus` or `promtool`: named by $PROMETHEUS or $PROMTOOL, else fetched by `make tools`, else on the PATH; else None."""
    named = os.environ.get(name.upper(), "")
    for candidate in (named, str(_UNPACKED / name), shutil.which(name) or ""):
        if candidate and Path(candidate).is_file():
            return Path(candidate)
    return None
