"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
LONG = ("train/test_strategy.py", "stages", "train", "flow", "cli")  # the longest first, so that no worker ends alone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes go first: two workers then end within seconds of each other."""
    at = lambda item: item.path.relative_to(ROOT / "tests").as_posix()
    items.sort(key=lambda item: next((i for i, begin in enumerate(LONG) if at(item).startswith(begin)), len(LONG)))


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


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library for LD_PRELOAD that lets the n-th change of a file go wrong: tests/faults/faults.c."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and Linux: faults are injected between Python and the C library")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(ROOT / "tests/faults/faults.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library
