"""Every kind of artifact, damaged in every way: refused with exit code 3, naming file and digests."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.lines import Problem, read_rows
from pipeline.data.sources import KINDS as RECORDS
from pipeline.data.sources import read
from pipeline.flow.artifacts import KINDS, describe
from pipeline.flow.config import read_yaml
from pipeline.flow.errors import Damaged, UserError
from pipeline.flow.store import Store
from pipeline.train.settings import TrainSettings

FILES = {"config.json": b'{"a": 1}', "data.jsonl": b'{"text": "one"}\n', "model.safetensors": bytes(range(256)) * 3}
FINGERPRINT = "ab" * 32


def sealed(root: Path, kind: str) -> Store:
    store = Store(root / "store")
    out = store.partial_dir(FINGERPRINT) / "out" / "slot"
    out.mkdir(parents=True)
    for name, data in FILES.items():
        (out / name).write_bytes(data)
    manifest = {
        "schema": 1, "row": "row", "stage": "row", "fingerprint": FINGERPRINT, "inputs": {}, "places": {},
        "roots": [FINGERPRINT], "outputs": {"slot": describe(out, kind)}, "metrics": {}, "finished": 0.0,
    }  # fmt: skip
    store.seal(FINGERPRINT, manifest)
    for path in store.row_dir(FINGERPRINT).rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return store


def refused(root: Path) -> str:
    """What a run that never saw this store says when it opens the row."""
    with pytest.raises(Damaged) as error:
        Store(root / "store").open_output(FINGERPRINT, "slot")
    assert error.value.exit_code == 3
    return str(error.value)


@pytest.mark.parametrize("flips", [15, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_any_flipped_byte_is_refused(tmp_path: Path, kind: str, flips: int) -> None:
    store = sealed(tmp_path, kind)
    draw = random.Random(kind)
    files = [*(store.row_dir(FINGERPRINT) / "slot").iterdir(), store.row_dir(FINGERPRINT) / "manifest.json"]
    for _ in range(flips):
        path = draw.choice(files)
        before = path.read_bytes()
        data = bytearray(before)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(data))
        told = refused(tmp_path)
        assert path.name in told or str(path.parent) in told, told
        assert f"; rm -rf {store.row_dir(FINGERPRINT)} and run the same command again" in told
        if path.name != "manifest.json":
            assert "its sha256 is" in told and "its manifest says" in told
        path.write_bytes(before)
    Store(tmp_path / "store").open_output(FINGERPRINT, "slot")


@pytest.mark.parametrize("kind", list(KINDS))
def test_cut_missing_extra_and_swapped_files_are_refused(tmp_path: Path, kind: str) -> None:
    store = sealed(tmp_path, kind)
    slot = store.row_dir(FINGERPRINT) / "slot"
    weights, config = slot / "model.safetensors", slot / "config.json"
    for size in (0, 1, 700):
        weights.write_bytes(FILES["model.safetensors"][:size])
        assert f"model.safetensors: damaged: it has {size} bytes" in refused(tmp_path)
    weights.unlink()
    assert "model.safetensors: missing" in refused(tmp_path)
    weights.write_bytes(FILES["model.safetensors"])
    (slot / "more.json").write_text("{}")
    assert "more.json: is not in the manifest" in refused(tmp_path)
    (slot / "more.json").unlink()
    weights.write_bytes(FILES["config.json"])
    config.write_bytes(FILES["model.safetensors"])
    assert "damaged" in refused(tmp_path)
    shutil.rmtree(slot)
    assert "missing" in refused(tmp_path)


def fuzz(strategy: Any, examples: int, check: Any) -> None:
    """`check` on so many drawn values; one that takes more than a second fails."""
    quiet = settings(max_examples=examples, deadline=1000, suppress_health_check=list(HealthCheck), database=None)
    quiet(given(strategy)(check))()


MANY = pytest.mark.parametrize("examples", [200, pytest.param(100_000, marks=pytest.mark.slow)])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@MANY
def test_any_manifest_is_read_or_refused(tmp_path: Path, examples: int) -> None:
    store = sealed(tmp_path, "documents")
    path = store.row_dir(FINGERPRINT) / "manifest.json"
    good = path.read_bytes()

    def check(change: tuple[int, bytes]) -> None:
        path.write_bytes(good[: change[0]] + change[1] + good[change[0] + len(change[1]) :])
        if path.read_bytes() != good:
            with pytest.raises(Damaged):
                Store(tmp_path / "store").open_output(FINGERPRINT, "slot")

    fuzz(st.tuples(st.integers(0, len(good)), st.binary(max_size=6)), examples, check)


@MANY
def test_any_plan_text_is_read_or_refused(examples: int) -> None:
    def check(text: str) -> None:
        try:
            read_yaml(text, "plan.yaml")
        except UserError as error:
            assert str(error).startswith("plan.yaml")

    fuzz(st.text(max_size=60) | st.text("ab:-[]{}&*!'\"#|>%@`\n ,0", max_size=60), examples, check)


@MANY
def test_any_settings_are_taken_or_refused(examples: int) -> None:
    from pipeline.flow.config import parse_settings

    keys = st.sampled_from(list(TrainSettings.model_fields)) | st.text(max_size=6)

    def check(values: dict[str, Any]) -> None:
        try:
            parse_settings(TrainSettings, values, "sft.train")
        except UserError as error:
            assert "sft.train" in str(error)

    fuzz(st.dictionaries(keys, JSON, max_size=4), examples, check)


@MANY
def test_any_file_of_records_is_read_or_told_by_line(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "data.jsonl"
    good = (
        b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n'
        b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n{"text": "z"}\n'
    )

    def check(drawn: tuple[int, bytes, str]) -> None:
        at, put, kind = drawn
        path.write_bytes(good[:at] + put + good[at + len(put) // 2 :])
        for row in read_rows(path):
            assert row.line >= 1 and (not isinstance(row, Problem) or row.reason)
        try:
            read(path, kind)
        except UserError as error:
            assert "data.jsonl" in str(error)

    fuzz(st.tuples(st.integers(0, len(good)), st.binary(max_size=8), st.sampled_from(RECORDS)), examples, check)
