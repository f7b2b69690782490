"""Digests and the files behind them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from pipeline.flow.artifacts import (
    KINDS,
    Comparisons,
    Documents,
    artifact_digest,
    describe,
    from_entry,
    members,
    read_object,
    safe_member,
    tokenizer_facts,
)
from pipeline.flow.errors import Damaged, UserError


def test_digest_is_the_specified_sha256() -> None:
    inner = hashlib.sha256(b"x\n").hexdigest()
    text = f'{{"files":{{"data.jsonl":"{inner}"}},"kind":"prompts","schema":1}}'
    assert artifact_digest("prompts", {"data.jsonl": inner}) == hashlib.sha256(text.encode()).hexdigest()


def test_digest_depends_on_content_name_and_kind_alone(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "data.jsonl").write_text("x\n")
    os.utime(two / "data.jsonl", (1, 1))
    first = describe(one, "prompts", {"note": 1})
    assert first["digest"] == describe(two, "prompts")["digest"]
    assert first["files"]["data.jsonl"]["bytes"] == 2
    assert first["lineage"] == {"note": 1}
    assert first["digest"] != describe(one, "documents")["digest"]
    (two / "data.jsonl").write_text("y\n")
    assert first["digest"] != describe(two, "prompts")["digest"]


def test_an_empty_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wrote no file"):
        describe(tmp_path, "prompts")


def test_names_that_leave_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out.txt").write_text("secret")
    (tmp_path / "in/link").symlink_to(tmp_path / "out.txt")
    for name in ("../out.txt", "/etc/passwd", "", "a\0b", "a\\b", "link"):
        with pytest.raises(UserError, match="leaves its directory"):
            safe_member(tmp_path / "in", name)
    with pytest.raises(UserError, match="leaves its directory"):
        list(members(tmp_path / "in"))


def test_pipes_and_linked_folders_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        list(members(tmp_path))
    (tmp_path / "pipe").unlink()
    (tmp_path / "real").mkdir()
    (tmp_path / "again").symlink_to(tmp_path / "real")
    with pytest.raises(UserError, match="not a regular file"):
        list(members(tmp_path))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"[" * 100_000, "is not JSON"),
        (b'{"a":' * 66 + b"1" + b"}" * 66, "nested too deeply, more than 64 levels"),
        (b'{"a":' * 65 + b"[1]" + b"}" * 65, "nested too deeply"),
        (b"1" * 5000, "is not JSON"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b" " * 101, "has 101 bytes, at most 100 are read"),
        (None, "is not a regular file"),
    ],
)
def test_json_of_strangers_is_bounded(tmp_path: Path, text: bytes | None, told: str) -> None:
    path = tmp_path / "config.json"
    os.mkfifo(path) if text is None else path.write_bytes(text)
    with pytest.raises(UserError, match="config.json: ") as error:
        read_object(path, most=100 if text and text[:1] == b" " else 10**6)
    assert told in str(error.value)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(Damaged, match="is not a regular file"):
        read_object(path, Damaged)
    path.unlink()
    path.write_bytes(b'{"a":' * 64 + b"1" + b"}" * 64)
    assert read_object(path)


def test_data_files_by_kind(tmp_path: Path) -> None:
    names = ("data.jsonl", "notes.txt", "model.safetensors")
    for name in names:
        (tmp_path / name).write_text("x")
    assert [p.name for p in Comparisons(tmp_path, names, "0").data_files] == ["data.jsonl"]
    assert [p.name for p in Documents(tmp_path, names, "0").data_files] == ["data.jsonl", "notes.txt"]
    odd = Comparisons(tmp_path, ("odd.raw",), "0", locations=(tmp_path / "odd.raw",))
    assert odd.data_files == [tmp_path / "odd.raw"]


def test_tokenizer_digest_ignores_layout_and_use(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    (one / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "padding": None}))
    (two / "tokenizer.json").write_text(json.dumps({"padding": 3, "model": {"vocab": {"a": 0}}}, indent=3))
    (one / "chat_template.jinja").write_text("{{ x }}")
    (two / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}"}))
    assert tokenizer_facts(one) == tokenizer_facts(two)
    (two / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"b": 0}}}))
    assert tokenizer_facts(one)["tokenizer"] != tokenizer_facts(two)["tokenizer"]
    assert tokenizer_facts(one)["template"] == tokenizer_facts(two)["template"]


def test_a_model_says_whether_it_is_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert describe(tmp_path, "policy")["lineage"] == {"form": "full"}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "abc"}))
    assert describe(tmp_path, "policy")["lineage"] == {"form": "adapter", "base": "abc"}
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        describe(tmp_path, "policy")


def test_an_entry_comes_back_as_it_was_and_sizes_are_checked(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("x\n")
    slot = describe(tmp_path, "comparisons", {"a": 1})
    artifact = Comparisons(tmp_path, ("data.jsonl",), slot["digest"], {"a": 1}, slot, "hh", {"d": tmp_path / "base"})
    again = from_entry(json.loads(json.dumps(artifact.entry())))
    assert again == artifact
    (tmp_path / "data.jsonl").write_text("longer\n")
    with pytest.raises(Damaged, match=r"data\.jsonl: has 7 bytes, its manifest says 2") as error:
        from_entry(artifact.entry())
    assert error.value.exit_code == 3
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(Damaged, match="missing"):
        from_entry(artifact.entry())


def test_a_file_of_the_user_that_changed_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("x\n")
    slot = {**describe(tmp_path, "comparisons"), "source": "sources.pairs"}
    entry = Comparisons(tmp_path, ("data.jsonl",), slot["digest"], meta=slot).entry()
    from_entry(entry)
    for act in (lambda: path.write_text("longer\n"), path.unlink):
        act()
        with pytest.raises(UserError) as error:
            from_entry(entry)
        assert str(error.value) == f"{path} changed while the row ran; run the same command again"
        assert error.value.exit_code == 2


def test_kinds() -> None:
    names = "Tokenizer Documents Conversations Comparisons Rated Prompts Samples Policy RewardModel Judge "
    assert [kind.__name__ for kind in KINDS.values()] == [*names.split(), "Evaluation"]
