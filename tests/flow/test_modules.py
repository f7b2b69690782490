"""Where the source of a module lies, without running it."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from pipeline.flow.errors import UserError
from pipeline.flow.modules import digests, source_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "sourced"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('must not run')\n")
    (folder / "rewards.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_nothing_is_imported_not_even_the_package_above(package: Path):
    assert source_file("sourced.rewards") == package / "rewards.py"
    assert source_file("sourced") == package / "__init__.py"
    assert not [name for name in sys.modules if name.startswith("sourced")]
    assert source_file("pipeline.flow.modules") == ROOT / "pipeline/flow/modules.py"


@pytest.mark.parametrize("name", ["sourced.nothing", "sourced.rewards.deeper", "no_such_module", "math", "sys", "a..b"])
def test_what_has_no_source_has_none(package: Path, name: str):
    assert source_file(name) is None


def test_digests_are_those_of_the_files(package: Path):
    expected = hashlib.sha256(b"x = 1\n").hexdigest()
    assert digests(("sourced.rewards",)) == {"module sourced.rewards": expected}
    assert digests(()) == {}
    with pytest.raises(UserError, match="no module 'sourced.gone' with Python source can be imported"):
        digests(("sourced.gone",))
