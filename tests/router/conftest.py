"""The router is tried with objects that its benchmark uses, too: found from the root of the checkout, however pytest was started."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
