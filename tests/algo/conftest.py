from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def oracles(shared: Path) -> dict[str, Any]:
    """Worked numbers computed from the published formulas without this project."""
    return json.loads((shared / "oracles.json").read_text())
