"""A finished toy run for the command line, and golden files for what `--json` prints.

RLHF_UPDATE_GOLDEN=1 writes the golden files anew: look at the difference before keeping it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TOYS = str(HERE.parent / "flow")
if TOYS not in sys.path:
    sys.path.insert(0, TOYS)

PLAN = """
launch: {preload: false, threads: 1}
sources:
  text: {kind: documents, path: text.txt}
  pairs: {kind: comparisons, path: pairs.jsonl}
rows:
  - first: {documents: text}
  - pair: {documents: first.documents, comparisons: pairs}
  - last: {documents: [first.documents, pair.documents]}
"""


def write_plan(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "text.txt").write_text("text ")
    (root / "pairs.jsonl").write_text('{"prompt": "q", "chosen": "yes", "rejected": "no"}\n')
    (root / "toy.yaml").write_text(PLAN)
    return root


class Cli:
    """Runs `rlhf` in this process, in a directory of its own."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self._capsys = root, capsys

    def __call__(self, *args: str) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)"""
        from pipeline.cli import main

        self._capsys.readouterr()
        code = 0
        try:
            main(list(args))
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        streams = self._capsys.readouterr()
        return code, streams.out, streams.err

    def json(self, *args: str) -> Any:
        code, out, err = self(*args, "--json")
        assert code == 0, err
        return json.loads(out)


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    from toy_stages import TABLE

    import stages

    monkeypatch.setattr(stages, "STAGES", TABLE)
    monkeypatch.chdir(write_plan(tmp_path / "place"))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Cli(tmp_path / "place", capsys)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def golden() -> Callable[[str, Any, Path], None]:
    return check_golden


def check_golden(name: str, document: Any, root: Path) -> None:
    """The document with everything that differs between machines and runs replaced equals the golden file."""
    found = json.dumps(stable(document, root), indent=2, ensure_ascii=False) + "\n"
    path = HERE / "golden" / f"{name}.json"
    if os.environ.get("RLHF_UPDATE_GOLDEN"):
        path.write_text(found)
    assert found == path.read_text(), f"{path.name}: RLHF_UPDATE_GOLDEN=1 writes it anew"


def stable(document: Any, root: Path) -> Any:
    """Hashes become <sha256 1>, <sha256 2>, ... in order of appearance; places and times placeholders."""
    numbers: dict[str, str] = {}

    def text(value: str) -> str:
        value = value.replace(str(root), "ROOT")
        return re.sub(r"[0-9a-f]{64}", lambda m: numbers.setdefault(m[0], f"<sha256 {len(numbers) + 1}>"), value)

    def walk(value: Any, key: str = "") -> Any:
        if key in ("seconds", "started", "finished"):
            return 0
        if key == "environment":
            return sorted(value)
        if isinstance(value, dict):
            return {text(name): walk(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        return text(value) if isinstance(value, str) else value

    return walk(document)
