"""Sealing, damage, locks and garbage collection, with rows made by hand."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.flow.artifacts import (
    Artifact,
    Comparisons,
    Documents,
    Policy,
    artifact_digest,
    canonical,
    describe,
    sha256_bytes,
)
from pipeline.flow.errors import Damaged, Locked, UserError
from pipeline.flow.stage import Request
from pipeline.flow.store import Store, run_lock


def _seal(
    store: Store,
    fp: str,
    row: str,
    *,
    slot: str = "documents",
    kind: str = "documents",
    files: Any = None,
    inputs: Any = None,
    places: Any = None,
) -> dict[str, Any]:
    out = store.partial_dir(fp) / "out" / slot
    out.mkdir(parents=True)
    for name, text in (files or {"data.jsonl": f"{row}\n"}).items():
        (out / name).write_text(text)
    (store.partial_dir(fp) / "metrics.jsonl").write_text('{"step": 1}\n')
    manifest = {
        "schema": 1,
        "row": row,
        "stage": row.partition("@")[0],
        "fingerprint": fp,
        "inputs": inputs or {},
        "places": places or {},
        "roots": [fp],
        "outputs": {slot: describe(out, kind)},
        "metrics": {"loss": 0.1},
        "finished": time.time(),
    }
    store.seal(fp, manifest)
    return manifest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_a_sealed_row_opens_again(store: Store) -> None:
    manifest = _seal(store, "aa", "first")
    assert store.is_sealed("aa") and not store.partial_dir("aa").exists()
    again = Store(store.root)
    assert {**again.manifest("aa"), "seal": None} == {**manifest, "seal": None}
    artifact = again.open_output("aa", "documents")
    assert isinstance(artifact, Documents)
    assert artifact.data_files[0].read_text() == "first\n"
    assert artifact.meta["row"] == "first" and artifact.meta["fingerprint"] == "aa"
    assert (store.row_dir("aa") / "metrics.jsonl").is_file()
    assert artifact.data_files[0].stat().st_mode & 0o222 == 0
    assert again.find_output(artifact.digest) == ("aa", "documents")
    with pytest.raises(UserError, match="made no 'policy' this time; it made documents"):
        again.open_output("aa", "policy")


def test_what_an_interrupted_try_left_is_told(store: Store) -> None:
    assert store.left("aa") is None
    checkpoints = store.partial_dir("aa") / "checkpoints"
    (checkpoints / ".tmp-step-000007").mkdir(parents=True)
    assert store.left("aa") is None, "not whole: it begins anew"
    (checkpoints / "drawn").mkdir()
    (checkpoints / "drawn" / "rejection.000000.of1.0ab1.jsonl").touch()
    assert "goes on with those that it has" in str(store.left("aa"))
    for step in (90, 100):
        (checkpoints / f"step-{step:06d}").mkdir()
    assert "stopped after step 100, its last checkpoint" in str(store.left("aa"))
    with store.lock("aa"):
        assert store.left("aa") == "another process works on it"


def test_a_row_is_sealed_once(store: Store) -> None:
    manifest = _seal(store, "aa", "first")
    (store.partial_dir("aa") / "out").mkdir(parents=True)
    with pytest.raises(UserError, match="sealed already"):
        store.seal("aa", manifest)


def test_an_output_that_changed_after_its_manifest_is_not_sealed(store: Store) -> None:
    out = store.partial_dir("aa") / "out/documents"
    out.mkdir(parents=True)
    (out / "data.jsonl").write_text("x")
    manifest = {"outputs": {"documents": describe(out, "documents")}}
    (out / "data.jsonl").write_text("longer")
    with pytest.raises(Damaged, match="6 bytes"):
        store.seal("aa", manifest)
    assert not store.is_sealed("aa")


def _flip(path: Path) -> None:
    path.chmod(0o644)
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_flipped_byte_is_refused_naming_the_file_and_both_digests(store: Store) -> None:
    manifest = _seal(store, "aa", "first")
    path = store.row_dir("aa") / "documents/data.jsonl"
    old = manifest["outputs"]["documents"]["files"]["data.jsonl"]["sha256"]
    _flip(path)
    for look in (store.check, store.verify, lambda fp: Store(store.root).open_output(fp, "documents")):
        with pytest.raises(Damaged) as error:
            look("aa")
        assert str(path) in str(error.value) and old in str(error.value)
        assert error.value.exit_code == 3
        assert len(set(re.findall(r"\b[0-9a-f]{64}\b", str(error.value)))) == 2


def test_hashes_are_remembered_and_a_later_flip_is_still_found(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.flow.store.SETTLED", -1.0)
    _seal(store, "aa", "first")
    store.check("aa")
    store.remember()
    counted: list[Path] = []
    monkeypatch.setattr("pipeline.flow.store.sha256_file", lambda path: counted.append(path) or "0")
    Store(store.root).check("aa")
    assert counted == []
    with pytest.raises(Damaged):  # verify ignores what is remembered: it hashes (here to "0")
        Store(store.root).verify("aa")
    monkeypatch.undo()
    _flip(store.row_dir("aa") / "documents/data.jsonl")  # the time of change of content is put back
    with pytest.raises(Damaged):
        Store(store.root).check("aa")


def test_a_missing_an_extra_and_a_truncated_file_are_damage(store: Store) -> None:
    _seal(store, "aa", "first")
    folder = store.row_dir("aa") / "documents"
    (folder / "extra.json").write_text("{}")
    with pytest.raises(Damaged, match=r"extra\.json: is not in the manifest"):
        store.check("aa")
    (folder / "extra.json").unlink()
    (folder / "data.jsonl").chmod(0o644)
    (folder / "data.jsonl").write_text("")
    with pytest.raises(Damaged, match="0 bytes"):
        store.check("aa")
    (folder / "data.jsonl").unlink()
    with pytest.raises(Damaged, match="missing"):
        store.check("aa")


def test_a_changed_manifest_is_refused(store: Store) -> None:
    _seal(store, "aa", "first")
    path = store.row_dir("aa") / "manifest.json"
    path.chmod(0o644)
    path.write_text(path.read_text().replace('"loss": 0.1', '"loss": 0.2'))
    with pytest.raises(Damaged, match="was changed"):
        Store(store.root).manifest("aa")
    path.write_text("{")
    with pytest.raises(Damaged, match="cannot be read as a manifest"):
        Store(store.root).manifest("aa")
    assert Store(store.root).manifests() == {}
    with pytest.raises(UserError, match="no such row"):
        store.manifest("bb")


def test_a_manifest_cannot_point_outside_its_row(store: Store) -> None:
    (store.root / "rows").mkdir(parents=True)
    (store.root / "rows/secret").write_text("x")
    with pytest.raises((UserError, Damaged)):
        files = {"../../secret": {"bytes": 1, "sha256": "0"}}
        store._compare(store.row_dir("aa"), {"d": {"kind": "documents", "digest": "0", "files": files}})


def forge(store: Store, fp: str, change: Any) -> None:
    """A manifest that somebody changed and sealed again."""
    path = store.row_dir(fp) / "manifest.json"
    manifest = {key: value for key, value in json.loads(path.read_text()).items() if key != "seal"}
    change(manifest)
    path.chmod(0o644)
    path.write_text(json.dumps({**manifest, "seal": sha256_bytes(canonical(manifest))}, indent=1) + "\n")


def _set(*keys: str, value: Any) -> Any:
    def change(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


FORGED = {
    "no outputs": _set("outputs", value=[]),
    "a slot that leaves": lambda m: m.update(outputs={"../../..": m["outputs"]["documents"]}),
    "a slot with a NUL": lambda m: m.update(outputs={"a\0": m["outputs"]["documents"]}),
    "an unknown kind": _set("outputs", "documents", "kind", value=["documents"]),
    "facts of a file": _set("outputs", "documents", "files", "data.jsonl", value=5),
    "a base": _set("outputs", "documents", "lineage", "base", value=["x"]),
    "no digest": _set("outputs", "documents", "digest", value=None),
    "inputs": _set("inputs", value={"documents": {"a": 1}}),
    "places": _set("places", value={"ab": "/etc"}),
    "finished": _set("finished", value="yesterday"),
    "row": _set("row", value=None),
    "schema": _set("schema", value="1"),
    "deep": _set("metrics", value=json.loads('{"a":' * 70 + "1" + "}" * 70)),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_manifest_that_was_forged_and_sealed_again_is_refused(store: Store, name: str) -> None:
    _seal(store, "aa", "first")
    forge(store, "aa", FORGED[name])
    fresh = Store(store.root)
    with pytest.raises(Damaged, match=r"aa/manifest.json: .*; rm -rf .*/store/rows/aa and run the same command again"):
        fresh.open_output("aa", "documents")
    assert fresh.manifests() == {}


def test_a_manifest_with_other_line_ends_is_not_what_was_sealed(store: Store) -> None:
    _seal(store, "aa", "first")
    path = store.row_dir("aa") / "manifest.json"
    path.chmod(0o644)
    for end in (b"\r", b"\r\n"):
        path.write_bytes(path.read_bytes().replace(b"\r", b"").replace(b"\n", end, 1))
        with pytest.raises(Damaged, match="it is not written as it was sealed"):
            Store(store.root).open_output("aa", "documents")


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/passwd", "a\0b", "a\\b", ""])
def test_forged_names_of_files_do_not_leave_their_slot(tmp_path: Path, store: Store, name: str) -> None:
    manifest = _seal(store, "aa", "first")
    facts = next(iter(manifest["outputs"]["documents"]["files"].values()))
    digest = artifact_digest("documents", {name: facts["sha256"]})
    forge(store, "aa", lambda m: m["outputs"]["documents"].update(files={name: facts}, digest=digest))
    with pytest.raises(UserError, match="leaves its directory"):
        Store(store.root).verify()


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "device"])
def test_what_is_no_file_of_the_row_is_refused(tmp_path: Path, store: Store, kind: str) -> None:
    """A link to the very same bytes outside, a slot that is such a link, a pipe, a device."""
    _seal(store, "aa", "first")
    slot = store.row_dir("aa") / "documents"
    file = slot / "data.jsonl"
    shutil.copytree(slot, tmp_path / "outside")
    if kind == "folder":
        shutil.rmtree(slot)
        slot.symlink_to(tmp_path / "outside")
    else:
        file.unlink()
        make = {"link": lambda: file.symlink_to(tmp_path / "outside/data.jsonl"), "pipe": lambda: os.mkfifo(file)}
        make.get(kind, lambda: file.symlink_to("/dev/zero"))()
    with pytest.raises(UserError, match=r"leaves its directory|missing"):
        Store(store.root).open_output("aa", "documents")


@pytest.mark.parametrize("name", ["rows/aa/manifest.json", "runs/x.json", "partial/bb/request.json", "locks/aa.lock"])
def test_pipes_in_a_store_are_not_waited_for(tmp_path: Path, store: Store, name: str) -> None:
    _seal(store, "aa", "first")
    store.record_run(tmp_path / "runs/one", {"first": "aa", "pair": "bb"})
    path = store.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    fresh = Store(store.root)
    if name.startswith("locks"):
        with pytest.raises(UserError, match="not a regular file"), fresh.lock("aa"):
            pass
    elif name.startswith("partial"):
        assert fresh.gc() == []  # no request can be read of it, and a run names it
    else:
        with pytest.raises(Damaged, match="not a regular file"):
            fresh.gc()


@pytest.mark.parametrize("text", ['{"path": 5}', "{}", '{"path": "a\\u0000b"}', '{"path": "/dev/zero"}'])
def test_a_run_that_cannot_be_is_none(store: Store, text: str) -> None:
    (store.root / "runs").mkdir(parents=True)
    (store.root / "runs/x.json").write_text(text)
    assert store.runs() == []


@pytest.mark.parametrize("request_text", ["{}", '{"inputs": []}', '{"inputs": {"a": 5}}', '{"inputs": {"a": {}}}'])
def test_gc_names_a_request_that_is_none(tmp_path: Path, store: Store, request_text: str) -> None:
    store.record_run(tmp_path / "runs/one", {"first": "aa"})
    store.partial_dir("aa").mkdir(parents=True)
    (store.partial_dir("aa") / "request.json").write_text(request_text)
    with pytest.raises(Damaged, match=r"partial/aa/request.json: is no request of a row"):
        store.gc()


def test_gc_removes_links_and_not_what_they_lead_to(tmp_path: Path, store: Store) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/data.txt").write_text("x" * 1000)
    (store.root / "rows").mkdir(parents=True)
    (store.root / "rows/aa").symlink_to(tmp_path / "mine")
    (store.root / "rows/file").write_text("12345")
    assert sum(item.bytes for item in store.gc()) < 1000
    assert list((store.root / "rows").iterdir()) == [] and (tmp_path / "mine/data.txt").exists()


def test_a_model_that_is_its_own_base_is_refused(store: Store) -> None:
    manifest = _seal(store, "aa", "sft", slot="policy", kind="policy", files={"model.safetensors": "w"})
    forge(store, "aa", _set("outputs", "policy", "lineage", "base", value=manifest["outputs"]["policy"]["digest"]))
    with pytest.raises(Damaged, match="is its own base"):
        Store(store.root).open_output("aa", "policy")


# ------------------------------------------------------------------------------------------ files of a user


def test_sources_are_hashed_where_they_lie(tmp_path: Path, store: Store) -> None:
    (tmp_path / "a.jsonl").write_text("a\n")
    (tmp_path / "b.jsonl").write_text("b\n")
    one = store.open_source(Comparisons, [tmp_path / "a.jsonl"], format="hh", label="sources.pairs")
    assert (one.path, one.files, one.format) == (tmp_path, ("a.jsonl",), "hh")
    both = store.open_source(Comparisons, [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], listed=True)
    turned = store.open_source(Comparisons, [tmp_path / "b.jsonl", tmp_path / "a.jsonl"], listed=True)
    assert [p.name for p in both.data_files] == ["a.jsonl", "b.jsonl"]
    assert len({one.digest, both.digest, turned.digest}) == 3
    (tmp_path / "a.jsonl").write_text("c\n")  # same size, at once
    assert store.open_source(Comparisons, [tmp_path / "a.jsonl"]).digest != one.digest


def _asked(store: Store, *sources: Artifact) -> Request:
    entries = [source.entry() for source in sources]
    return Request("sft", "sft", "", "aa", {}, {"documents": entries, "start": None}, {}, 0, str(store.root))


def test_sources_are_compared_by_every_byte_after_a_row(tmp_path: Path, store: Store) -> None:
    one, folder = tmp_path / "a.jsonl", tmp_path / "data"
    folder.mkdir()
    one.write_text("a\n")
    (folder / "b.jsonl").write_text("b\n")
    asked = _asked(
        store,
        store.open_source(Comparisons, [one, one], listed=True),
        store.open_source(Documents, [folder], label="sources.data"),
    )
    store.check_sources(asked)
    (folder / "notes.bin").write_text("no record is in here")
    store.check_sources(asked)
    for path, text in ((one, "c\n"), (folder / "b.jsonl", "B\n"), (folder / "new.jsonl", "c\n")):
        before = path.read_text() if path.exists() else None
        path.write_text(text)
        with pytest.raises(UserError) as error:
            store.check_sources(asked)
        assert str(error.value) == f"row sft: {path} changed while the row ran; run the same command again"
        assert error.value.exit_code == 2
        path.unlink() if before is None else path.write_text(before)
    store.check_sources(asked)
    one.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl changed"):
        store.check_sources(asked)


def test_a_remembered_hash_does_not_vouch_for_a_source(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.flow.store.SETTLED", -1.0)
    path = tmp_path / "a.jsonl"
    path.write_text("a\n")
    asked = _asked(store, store.open_source(Comparisons, [path]))
    path.write_text("b\n")
    known = store._hashes.known
    assert known is not None
    state = path.stat()
    known[str(path)][:4] = [state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
    with pytest.raises(UserError, match=r"a\.jsonl changed"):
        store.check_sources(asked)


def test_the_base_of_an_adapter_is_compared_after_a_row_too(tmp_path: Path, store: Store) -> None:
    for name in ("base/model.safetensors", "lora/adapter_config.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    base = store.open_source(Policy, [tmp_path / "base"])
    asked = _asked(store, store.open_source(Policy, [tmp_path / "lora"], base=base))
    store.check_sources(asked)
    (tmp_path / "base/model.safetensors").write_text("[]")
    with pytest.raises(UserError, match=f"row sft: {tmp_path / 'base'} changed"):
        store.check_sources(asked)


@pytest.mark.parametrize("text", ["{", "null", "[1]", '{"PATH": 5}', '{"PATH": [1, 2]}', "\udcff"])
def test_a_damaged_memory_of_hashes_is_written_anew(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("pipeline.flow.store.SETTLED", -1.0)
    path = tmp_path / "a.jsonl"
    path.write_text("a\n")
    store.root.mkdir()
    hashes = store.root / "hashes.json"
    hashes.write_text(text.replace("PATH", str(path)), errors="surrogateescape")
    store.open_source(Comparisons, [path])
    store.remember()
    assert json.loads(hashes.read_text())[str(path)][4] == hashlib.sha256(b"a\n").hexdigest()


def test_a_directory_of_data_leaves_out_what_is_no_data(tmp_path: Path, store: Store) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(UserError, match="holds no file to read"):
        store.open_source(Comparisons, [folder])
    for name in ("b.jsonl", "a.parquet", "SOURCE.txt", ".hidden.jsonl"):
        (folder / name).write_text("x")
    artifact = store.open_source(Comparisons, [folder])
    assert artifact.files == ("a.parquet", "b.jsonl") and artifact.path == folder
    with pytest.raises(UserError, match="a list holds files only"):
        store.open_source(Comparisons, [folder], listed=True)
    with pytest.raises(UserError, match=r"sources\.x: there is no file"):
        store.open_source(Comparisons, [tmp_path / "none"], label="sources.x")


def test_an_adapter_of_the_user_needs_its_base(tmp_path: Path, store: Store) -> None:
    for name, files in (("base", ["model.safetensors"]), ("lora", ["adapter_config.json"])):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}")
    base = store.open_source(Policy, [tmp_path / "base"])
    assert base.lineage["form"] == "full"
    with pytest.raises(UserError, match="`base:`"):
        store.open_source(Policy, [tmp_path / "lora"], label="sources.lora")
    lora = store.open_source(Policy, [tmp_path / "lora"], base=base)
    assert lora.lineage["base"] == base.digest and lora.bases == {base.digest: tmp_path / "base"}


def test_the_base_of_a_sealed_adapter_is_found_in_rows_or_where_the_user_has_it(tmp_path: Path, store: Store) -> None:
    sealed = _seal(store, "aa", "sft", slot="policy", kind="policy", files={"model.safetensors": "w"})
    base = sealed["outputs"]["policy"]["digest"]
    adapter = {"adapter_config.json": json.dumps({"base_model_name_or_path": base})}
    _seal(store, "bb", "dpo", slot="policy", kind="policy", files=adapter)
    assert store.open_output("bb", "policy").bases == {base: store.row_dir("aa") / "policy"}

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "model.safetensors").write_text("v")
    own = store.open_source(Policy, [mine])
    adapter = {"adapter_config.json": json.dumps({"base_model_name_or_path": own.digest})}
    _seal(store, "cc", "dpo", slot="policy", kind="policy", files=adapter, places={own.digest: [str(mine)]})
    assert store.open_output("cc", "policy").bases == {own.digest: mine}
    (mine / "model.safetensors").write_text("changed")
    with pytest.raises(Damaged, match="base model of an adapter changed"):
        store.open_output("cc", "policy")


# ---------------------------------------------------------------------------------------------------- locks


def test_a_lock_is_let_go_in_good_order_after_an_error(store: Store) -> None:
    with pytest.raises(ValueError, match="x"), store.lock("aa"):
        raise ValueError("x")
    with store.lock("aa") as lock:
        assert lock.recovered is None
        with pytest.raises(Locked, match="the row aa is in use"), store.lock("aa"):
            pass


# ------------------------------------------------------------------------------------------------------- gc


def test_gc_removes_what_no_run_and_no_lock_reaches(tmp_path: Path, store: Store) -> None:
    base = _seal(store, "aa", "sft", slot="policy", kind="policy", files={"model.safetensors": "w"})
    digest = base["outputs"]["policy"]["digest"]
    adapter = {"adapter_config.json": json.dumps({"base_model_name_or_path": digest})}
    _seal(store, "bb", "dpo", slot="policy", kind="policy", files=adapter)
    source = _seal(store, "cc", "world")
    _seal(store, "dd", "old")
    entry = {"digest": source["outputs"]["documents"]["digest"], "bases": {}}
    for fp in ("ee", "ff"):
        request = Request("sft", "sft", "", fp, {}, {"documents": entry}, {}, 0, str(store.partial_dir(fp)))
        store.prepare(request)
    store.record_run(tmp_path / "runs/one", {"dpo": "bb"})
    with store.lock("ee"):
        would = store.gc(dry_run=True)
        assert [(item.path.name, item.what) for item in would] == [
            ("dd", "sealed row old"),
            ("ff", "row in progress sft"),
        ]
        assert would[0].bytes == sum(p.stat().st_size for p in store.row_dir("dd").rglob("*") if p.is_file())
        assert store.is_sealed("dd")
        assert store.gc() == would
    assert {path.name for path in (store.root / "rows").iterdir()} == {"aa", "bb", "cc"}
    assert {path.name for path in (store.root / "partial").iterdir()} == {"ee"}


def test_gc_keep_narrows_the_runs_but_not_one_that_is_going_on(tmp_path: Path, store: Store) -> None:
    for fp in ("aa", "bb", "cc"):
        _seal(store, fp, "first")
        store.record_run(tmp_path / "runs" / fp, {"first": fp})
    with run_lock(tmp_path / "runs/bb"):
        gone = store.gc(keep=[tmp_path / "runs/aa"])
    assert [item.path.name for item in gone] == ["cc"]
    assert [path.name for path in store.runs()] and store.is_sealed("aa") and store.is_sealed("bb")


def test_prepare_clears_what_an_earlier_try_left(store: Store) -> None:
    request = Request("sft", "sft", "", "aa", {}, {}, {}, 0, str(store.partial_dir("aa")))
    partial = store.prepare(request)
    for name in ("metrics.jsonl", "result.json", "out/half"):
        (partial / name).write_text("x")
    store.prepare(request)
    assert sorted(path.name for path in partial.rglob("*")) == ["out", "request.json"]


@pytest.mark.parametrize("text", ["", "null", "[1]", '{"rows": 5}', "[" * 100_000])
def test_gc_refuses_a_run_whose_rows_cannot_be_read_and_removes_nothing(
    tmp_path: Path, store: Store, text: str
) -> None:
    _seal(store, "aa", "first")
    store.record_run(tmp_path / "runs/one", {"first": "aa"})
    rows = tmp_path / "runs/one/rows.json"
    rows.write_text(text)
    with pytest.raises(Damaged, match="remove it and run the plan again") as error:
        store.gc()
    assert str(error.value).startswith(f"{rows}: ") and store.is_sealed("aa")


def test_prepare_leaves_checkpoints_and_the_log_that_belongs_to_them(store: Store) -> None:
    request = Request("ppo", "ppo", "", "aa", {}, {}, {}, 0, str(store.partial_dir("aa")))
    partial = store.prepare(request)
    (partial / "checkpoints" / "step-000001").mkdir(parents=True)
    for name in ("metrics.jsonl", "result.json", "out/half"):
        (partial / name).write_text("x")
    store.prepare(request)
    assert sorted(p.name for p in partial.iterdir()) == ["checkpoints", "metrics.jsonl", "out", "request.json"]
    assert (partial / "checkpoints" / "step-000001").is_dir() and not list((partial / "out").iterdir())
