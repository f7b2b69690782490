"""Makes `toy_stages` importable, here and in the workers (a worker gets the runner's sys.path)."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)
