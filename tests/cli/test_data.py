"""`rlhf data`: records, masks, problems; shapes of --json; exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli.data import app
from pipeline.flow.errors import UserError
from pipeline.llama.tokenizer import train_tokenizer

SAMPLES = Path(__file__).resolve().parents[2] / "data" / "samples"
TALK = {"messages": [{"role": "user", "content": "Hi 🙂"}, {"role": "assistant", "content": "Hello."}]}


def call(*args: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture
def bad_file(tmp_path: Path) -> Path:
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps(TALK) + '\n{"messages": []}\n{"messages": [\n' + json.dumps(TALK) + "\n")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Hello there. Hi."] * 10, 300).save_pretrained(directory)
    return directory


def test_check_lists_every_problem_and_fails(bad_file: Path, tmp_path: Path) -> None:
    result = call("check", bad_file)
    assert result.exit_code == 2
    assert f"{bad_file}:2: messages is empty" in result.stdout
    assert f"{bad_file}:3: truncated JSON" in result.stdout
    quarantine = tmp_path / "q.jsonl"
    assert call("check", bad_file, "--skip-bad", "--quarantine", quarantine).exit_code == 0
    assert [json.loads(line)["line"] for line in quarantine.read_text().splitlines()] == [2, 3]


def test_check_as_json(bad_file: Path, tokenizer: Path) -> None:
    result = call("check", bad_file, "--tokenizer", tokenizer, "--max-tokens", 5, "--json")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    tokens = found.pop("tokens")
    assert found == {
        "file": str(bad_file),
        "format": "messages",
        "counts": {"records": 2, "bad": 2, "rows": 4, "trailing user turns": 0, "duplicates": 1},
        "reasons": {"messages is empty": 1, "truncated JSON": 1},
        "problems": [
            {"file": str(bad_file), "line": 2, "reason": "messages is empty", "message": "messages is empty"},
            {
                "file": str(bad_file),
                "line": 3,
                "reason": "truncated JSON",
                "message": "truncated JSON: the line ends inside a value, column 15",
            },
        ],
    }
    assert tokens["shortest"] == tokens["median"] == tokens["longest"] == tokens["total"] / 2
    assert tokens["records"] == tokens["too_long"] == 2
    assert 0 < tokens["trained"] < tokens["total"]


def test_check_finds_conversations_without_anything_to_train(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "talk.jsonl"
    unmarked = {"messages": [TALK["messages"][0], {**TALK["messages"][1], "weight": 0}]}
    path.write_text(json.dumps(TALK) + "\n" + json.dumps(unmarked) + "\n")
    assert call("check", path, "--tokenizer", tokenizer).exit_code == 0
    result = call("check", path, "--tokenizer", tokenizer, "--train-on", "marked")
    assert result.exit_code == 2
    assert "talk.jsonl:2: no token would be trained under train_on: marked" in result.stdout


def test_show(bad_file: Path) -> None:
    result = call("show", bad_file)
    assert result.exit_code == 0
    assert "user: Hi 🙂" in result.stdout and "assistant: Hello." in result.stdout
    assert "2 bad rows are left out" in result.stderr
    found = json.loads(call("show", bad_file, "--json", "--skip", 1).stdout)
    assert found["format"] == "messages"
    assert found["records"] == [{**TALK, "source": "talk.jsonl:4"}]
    assert set(found) == {"file", "format", "counts", "records"}


def test_mask_as_json(bad_file: Path, tokenizer: Path) -> None:
    found = json.loads(call("mask", bad_file, "--tokenizer", tokenizer, "-n", 1, "--json").stdout)
    (record,) = found["records"]
    assert (record["source"], found["train_on"]) == ("talk.jsonl:1", "all_rounds")
    assert set(found) == {"file", "format", "train_on", "records"} and set(record) == {"source", "tokens"}
    trained = [t for t in record["tokens"] if t["trained"]]
    assert "".join(t["text"] for t in trained) == "Hello.<|end|>"
    assert record["tokens"][0] == {"id": 1, "text": "<|bos|>", "trained": False, "round": -1}
    assert trained[-1] == {"id": 7, "text": "<|end|>", "trained": True, "round": 0}


def test_mask_for_people(bad_file: Path) -> None:
    result = call("mask", bad_file)
    assert result.exit_code == 0
    assert "[round 0] <|user|>Hi 🙂<|end|><|assistant|>Hello.<|end|>" in result.stdout
    assert "one of 2,048 tokens is trained on this file" in result.stderr


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.jsonl")), ids=lambda p: p.stem)
def test_every_sample_shows_masks_and_checks(path: Path, tokenizer: Path) -> None:
    for command in ("show", "mask", "check"):
        options = ["--tokenizer", tokenizer] if command != "show" else []
        kind = ["--kind", path.stem]
        result = call(command, path, *options, *kind)
        assert result.exit_code == 0, result.output
        assert path.name in result.stdout
    assert json.loads(call("check", path, "--kind", path.stem, "--json").stdout)["problems"] == []


def test_a_missing_file_is_a_user_error(tmp_path: Path) -> None:
    assert isinstance(call("check", tmp_path / "none.jsonl").exception, UserError)
    assert isinstance(call("mask", SAMPLES / "prompts.jsonl", "--tokenizer", tmp_path / "x").exception, UserError)


def test_a_directory_without_a_tokenizer_is_a_user_error(tmp_path: Path) -> None:
    problem = call("mask", SAMPLES / "prompts.jsonl", "--tokenizer", tmp_path).exception
    assert isinstance(problem, UserError)
    assert str(problem).startswith(f"{tmp_path}: holds no tokenizer that can be opened: ValueError: ")
    assert "\n" not in str(problem)


@pytest.mark.parametrize(("name", "text"), [("e.jsonl", ""), ("e.json", "[]"), ("e.txt", "\n\n")])
def test_check_says_of_an_empty_file_that_it_is_empty(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    result = call("check", path)
    assert result.exit_code == 2
    assert result.stdout.splitlines()[1:] == [f"{path}: empty: it holds no row"]
    found = json.loads(call("check", path, "--json").stdout)
    assert (found["reasons"], found["problems"][0]["line"]) == ({"no record": 1}, None)


def test_check_tells_a_wrong_file_once_and_quarantines_every_row(tmp_path: Path) -> None:
    path, quarantine = tmp_path / "wrong.jsonl", tmp_path / "q.jsonl"
    path.write_text('{"b": 1, "a": 2}\n' * 1000)
    result = call("check", path, "--skip-bad", "--quarantine", quarantine)
    assert result.exit_code == 2
    assert result.stdout.splitlines()[1:] == [
        f"{path}:1: unknown format: no known format has the keys a, b (rows below alike: 999)",
        "bad rows: 1000 unknown format",
    ]
    assert [json.loads(line)["line"] for line in quarantine.read_text().splitlines()] == list(range(1, 1001))
    assert len(json.loads(call("check", path, "--json").stdout)["problems"]) == 1000
