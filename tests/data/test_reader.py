"""A stage's reader: refused or set aside, counted either way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.data.reader import Reader
from pipeline.flow.errors import UserError
from tests.small import Listener


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    good = {"id": "a", "messages": [{"role": "user", "content": "Hi"}]}
    path.write_text(json.dumps(good) + '\n{"id": "b", "messages": []}\n')
    return path


def test_a_bad_row_is_refused_by_line(rows: Path):
    reader = Reader(Listener())
    with pytest.raises(UserError, match=r"rows\.jsonl:2: "):
        reader.read("prompts", rows, "prompts")
    assert reader.counts == {}


def test_skipped_rows_are_counted_said_and_kept_aside(rows: Path, tmp_path: Path):
    listener = Listener(skip_bad=True, directory=tmp_path / "quarantine")
    reader = Reader(listener)
    assert [p.id for p in reader.read("prompts", rows, "prompts")] == ["a"]
    counts = reader.counts["prompts"]
    assert (counts["records"], counts["bad"], counts["rows"]) == (1, 1, 2)
    assert sum(counts["reasons"].values()) == 1 and counts["format"] == "prompts"
    (line,) = (tmp_path / "quarantine" / "prompts.jsonl").read_text().splitlines()
    assert json.loads(line)["line"] == 2
    assert listener.said == [f"prompts: 1 of 2 rows skipped: {counts['reasons']}"]


def test_nothing_is_said_of_clean_files(rows: Path, tmp_path: Path):
    rows.write_text(rows.read_text().splitlines()[0] + "\n")
    listener = Listener(skip_bad=True, directory=tmp_path / "quarantine")
    reader = Reader(listener)
    reader.read("dev", rows, "prompts")
    assert listener.said == [] and "reasons" not in reader.counts["dev"]
    assert not (tmp_path / "quarantine" / "dev.jsonl").exists()
