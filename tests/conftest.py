"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and worked numbers kept beside the checkout; without them the tests that need them skip."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("no ../shared beside the checkout: real data and worked numbers are not at hand")
    return path


@pytest.fixture(scope="session")
def shared_data(shared: Path) -> Path:
    return shared / "data"
