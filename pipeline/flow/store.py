"""Sealed rows by fingerprint, work in progress, locks, and what may be thrown away.

Store(root)
  .row_dir(fp) .partial_dir(fp) .is_sealed(fp)
  .prepare(request) -> Path                       partial directory with request.json and an empty out/, no more
  .seal(fp, manifest) -> Path                     partial/<fp>/out -> rows/<fp>, manifest last
  .left(fp) -> str | None                         what an interrupted try left, in words
  .manifest(fp) -> dict                           Damaged where it is not what was sealed
  .open_output(fp, slot) -> Artifact              sizes verified on every open, hashes once (remembered)
  .check(fp, full=False)                          every file of a row; full ignores what is remembered
  .verify(fp=None) -> list[str]                   in full; Damaged at the first bad file
  .find_output(digest) -> (fp, slot) | None       .bases_of(digest, extra) -> {digest: Path}
  .open_source(kind, paths, ...) -> Artifact      a user's files, hashed where they lie
  .check_sources(request)                         UserError where a user's file changed since the request
  .manifests() -> {fp: manifest}
  .lock(fp), run_lock(run_dir)                    context managers; Locked names pid, host and start
  .record_run(run_dir, rows)                      rows.json of a run: row -> fingerprint, known to gc
  .gc(keep=None, dry_run=False) -> list[Garbage(path, bytes, what)]

rows/<fp>/manifest.json, <slot>/..., metrics.jsonl, quarantine/<slot>.jsonl      sealed, read-only
partial/<fp>/request.json, out/<slot>/..., metrics.jsonl, result.json            in progress
locks/<fp>.lock    runs/<id>.json (where the runs are)    hashes.json (verified hashes by inode, size, times)
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .artifacts import (
    CHANGED,
    DATA_SUFFIXES,
    KINDS,
    SCHEMA,
    TEXT_SUFFIXES,
    Artifact,
    Policy,
    artifact_digest,
    canonical,
    members,
    model_facts,
    read_object,
    read_text,
    safe_member,
    sha256_bytes,
    sha256_file,
    sync,
    within_levels,
)
from .errors import Damaged, UserError, anew
from .locks import Lock, hold, is_held
from .locks import run_lock as run_lock
from .stage import Request

ROW_NAME = re.compile(r"[a-z][a-z0-9_-]*(@[a-z0-9-]+)?")
FINGERPRINT = re.compile(r"[0-9a-f]+")
SETTLED = 1.0  # seconds a file must have rested before its hash is remembered: clocks of file systems tick
NOTES = ("metrics.jsonl",)  # sealed beside the slots
CHECKPOINTS = "checkpoints"  # state of a row in progress, left in place for the next try


@dataclass(frozen=True)
class Garbage:
    """Something that gc removes (or would): a sealed row, a row in progress, or a leftover."""

    path: Path
    bytes: int
    what: str


class Store:
    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()
        self._manifests: dict[str, dict[str, Any]] = {}
        self._hashes = _Hashes(self.root / "hashes.json")

    # ----------------------------------------------------------------------------------------------- places

    def row_dir(self, fp: str) -> Path:
        return self.root / "rows" / fp

    def partial_dir(self, fp: str) -> Path:
        return self.root / "partial" / fp

    def is_sealed(self, fp: str) -> bool:
        return self.row_dir(fp).is_dir()

    # ------------------------------------------------------------------------------------- from work to row

    def prepare(self, request: Request) -> Path:
        """The partial directory of a row about to run: request.json written, of an earlier try only its checkpoints
        left, with the metrics that they belong to."""
        partial = Path(request.partial)
        kept = {CHECKPOINTS, "metrics.jsonl"} if (partial / CHECKPOINTS).is_dir() else set()
        for path in partial.iterdir() if partial.is_dir() else ():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (partial / "out").mkdir(parents=True)
        request.write(partial / "request.json")
        return partial

    def seal(self, fp: str, manifest: Mapping[str, Any]) -> Path:
        """Make the work of `fp` a row: files synced and made read-only, manifest last, one rename.

        Raises UserError where the row is sealed already or an output changed since the manifest was made.
        """
        partial, target = self.partial_dir(fp), self.row_dir(fp)
        out = partial / "out"
        if target.exists():
            raise UserError(f"{target}: is sealed already; a sealed row never changes")
        for name in NOTES:
            if (partial / name).exists():
                shutil.copyfile(partial / name, out / name)
        self._compare(out, manifest["outputs"], hashes=False)
        for path in sorted(out.rglob("*"), reverse=True):
            if not path.is_symlink():
                sync(path)
            if path.is_file():
                path.chmod(0o444)
        _write_json(out / "manifest.json", {**manifest, "seal": _seal_of(manifest)})
        (out / "manifest.json").chmod(0o444)
        sync(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        out.rename(target)
        sync(target.parent)
        shutil.rmtree(partial)
        return target

    def left(self, fp: str) -> str | None:
        """What a try before this one left of a row that is not sealed, in words; None where it begins anew."""
        if is_held(self.root / "locks" / f"{fp}.lock"):
            return "another process works on it"
        checkpoints = self.partial_dir(fp) / CHECKPOINTS
        steps = [
            int(name) for path in checkpoints.glob("step-*") if (name := path.name.removeprefix("step-")).isdecimal()
        ]
        if steps:
            return f"stopped after step {max(steps)}, its last checkpoint, and goes on from there"
        if any(checkpoints.glob("*/*.jsonl")):
            return "stopped while it drew answers, and goes on with those that it has"
        return None

    # ---------------------------------------------------------------------------------------------- reading

    def manifest(self, fp: str) -> dict[str, Any]:
        """The manifest of a sealed row. UserError where there is none, Damaged where it was changed."""
        if fp not in self._manifests:
            path = self.row_dir(fp) / "manifest.json"
            manifest = _read_sealed(path)
            if manifest.get("fingerprint") != fp:
                raise Damaged(f"{path}: speaks of the row {manifest.get('fingerprint')}, not of its directory's {fp}")
            self._manifests[fp] = manifest
        return self._manifests[fp]

    def manifests(self) -> dict[str, dict[str, Any]]:
        """Every sealed row's manifest by fingerprint, oldest first, without damaged ones: opening tells."""
        found = {}
        for path in (self.root / "rows").glob("*/manifest.json"):
            try:
                found[path.parent.name] = self.manifest(path.parent.name)
            except Damaged:
                continue
        return dict(sorted(found.items(), key=lambda item: item[1]["finished"]))

    def open_output(self, fp: str, slot: str) -> Artifact:
        """An output of a sealed row, its files verified. Damaged names a file that is not what was sealed."""
        manifest = self.manifest(fp)
        if slot not in manifest["outputs"]:
            made = ", ".join(manifest["outputs"])
            raise UserError(f"row {manifest['row']} made no {slot!r} this time; it made {made}")
        output = manifest["outputs"][slot]
        self._compare(self.row_dir(fp), {slot: output})
        origin = {
            "row": manifest["row"],
            "stage": manifest["stage"],
            "fingerprint": fp,
            "roots": manifest["roots"],
        }
        base = output["lineage"].get("base")
        return KINDS[output["kind"]](
            path=self.row_dir(fp) / slot,
            files=tuple(output["files"]),
            digest=output["digest"],
            lineage=output["lineage"],
            meta={**output, **origin},
            bases=self.bases_of(base, manifest.get("places", {})) if base else {},
        )

    def check(self, fp: str, full: bool = False) -> None:
        """Verify every file of a sealed row: sizes, and hashes that are not remembered (`full`: all)."""
        if full:
            self._manifests.pop(fp, None)
        self._compare(self.row_dir(fp), self.manifest(fp)["outputs"], full=full)

    def verify(self, fp: str | None = None) -> list[str]:
        """Verify one row, or all, trusting nothing that is remembered. Damaged at the first bad file."""
        sealed = sorted(path.name for path in (self.root / "rows").glob("*")) if fp is None else [fp]
        for name in sealed:
            self.check(name, full=True)
        self.remember()
        return sealed

    def _compare(self, root: Path, outputs: Mapping[str, Any], *, full: bool = False, hashes: bool = True) -> None:
        for slot, output in outputs.items():
            listed = output["files"]
            if artifact_digest(output["kind"], {n: f["sha256"] for n, f in listed.items()}) != output["digest"]:
                raise Damaged(f"{root}: the digest of {slot!r} does not follow from its list of files; {anew(root)}")
            for name, facts in listed.items():
                self._compare_file(safe_member(safe_member(root, slot), name), facts, full, hashes, anew(root))
            for name in members(root / slot):
                if name not in listed:
                    raise Damaged(f"{root / slot / name}: is not in the manifest of its row; take it out")

    def _compare_file(self, path: Path, facts: Mapping[str, Any], full: bool, hashes: bool, mend: str) -> None:
        if not path.is_file():
            raise Damaged(f"{path}: missing, though its manifest lists it; {mend}")
        if (size := path.stat().st_size) != facts["bytes"]:
            raise Damaged(f"{path}: damaged: it has {size} bytes, its manifest says {facts['bytes']}; {mend}")
        if hashes and (found := self._hashes.of(path, fresh=full)) != facts["sha256"]:
            raise Damaged(f"{path}: damaged: its sha256 is {found}, its manifest says {facts['sha256']}; {mend}")

    def remember(self) -> None:
        """Keep the hashes computed so far for the next process."""
        self._hashes.save()

    # --------------------------------------------------------------------------------------- finding things

    def find_output(self, digest: str) -> tuple[str, str] | None:
        """(fingerprint, slot) of a sealed output with this digest."""
        for fp, manifest in self.manifests().items():
            for slot, output in manifest["outputs"].items():
                if output["digest"] == digest:
                    return fp, slot
        return None

    def bases_of(
        self, digest: str, extra: Mapping[str, Sequence[str]] | None = None, above: tuple[str, ...] = ()
    ) -> dict[str, Path]:
        """{digest: directory} of a base model and those below it. `extra`: places of the user's files."""
        if digest in above:
            raise Damaged(f"{self.root}: the model {digest} is its own base; run its row again")
        found, extra = self.find_output(digest), extra or {}
        if found is None and digest not in extra:
            raise Damaged(f"the base model {digest} of an adapter is not in {self.root}; run its row again")
        if found is None:
            self._compare_source(digest, Path(extra[digest][0]))
            return {digest: Path(extra[digest][0])}
        manifest = self.manifest(found[0])
        below = manifest["outputs"][found[1]]["lineage"].get("base")
        self._compare(self.row_dir(found[0]), {found[1]: manifest["outputs"][found[1]]})
        deeper = self.bases_of(below, {**manifest.get("places", {}), **extra}, (*above, digest)) if below else {}
        return {digest: self.row_dir(found[0]) / found[1], **deeper}

    def _compare_source(self, digest: str, path: Path) -> None:
        found = self._base_digest(path)
        if found != digest:
            raise Damaged(f"{path}: the base model of an adapter changed: its digest is {found}, recorded {digest}")

    def _base_digest(self, path: Path, fresh: bool = False) -> str:
        named = _named_files(Policy, [path], False, "base model")
        return artifact_digest(Policy.kind, {name: self._hashes.of(file, fresh) for name, file in named.items()})

    # ----------------------------------------------------------------------------------- a user's own files

    def open_source(
        self, kind: type[Artifact], paths: Sequence[Path], *, listed: bool = False, format: str | None = None,
        part: tuple[float, float] | None = None, base: Artifact | None = None, label: str = "source",
    ) -> Artifact:  # fmt: skip
        """Files of a user as an artifact, hashed where they lie: one file, a list of files, or a directory.

        Raises UserError where a path is missing, empty or not a plain file.
        """
        named = _named_files(kind, paths, listed, label)
        hashes = {name: self._hashes.of(path) for name, path in named.items()}
        digest = artifact_digest(kind.kind, hashes)
        files = {n: {"bytes": path.stat().st_size, "sha256": hashes[n]} for n, path in named.items()}
        folder = paths[0] if paths[0].is_dir() else paths[0].parent
        lineage = model_facts(folder, kind.kind) if paths[0].is_dir() else {}
        bases: dict[str, Path] = {}
        if lineage.get("form") == "adapter":
            if base is None:
                raise UserError(f"{label}: {folder} is an adapter; name the source of its base model under `base:`")
            lineage["base"], bases = base.digest, {base.digest: base.path, **base.bases}
        return kind(
            path=folder,
            files=tuple(named),
            digest=digest,
            lineage=lineage,
            meta={"kind": kind.kind, "digest": digest, "files": files, "source": label},
            format=format,
            part=part,
            bases=bases,
            locations=tuple(named.values()) if not paths[0].is_dir() else (),
        )

    def verify_output(self, fp: str, slot: str) -> None:
        """Hash the files of one output again. Damaged at the first bad one."""
        self._compare(self.row_dir(fp), {slot: self.manifest(fp)["outputs"][slot]}, full=True)

    def verify_source(self, digest: str, paths: Sequence[Path]) -> None:
        """Hash a user's files again. Damaged where they are not the ones that a row was computed from, or are gone."""
        try:
            for kind in KINDS.values():  # the kind is part of the digest, and a manifest does not say it of its inputs
                for listed in (False, True):
                    if all(path.is_file() for path in paths) or not listed:
                        named = _named_files(kind, paths, listed, "source")
                        if (
                            artifact_digest(kind.kind, {n: self._hashes.of(p, fresh=True) for n, p in named.items()})
                            == digest
                        ):
                            return
        except UserError as error:
            raise Damaged(f"{error}, but rows were computed from it ({digest})") from error
        raise Damaged(
            f"{', '.join(map(str, paths))}: changed since rows were computed from it: digest {digest} recorded"
        )

    def check_sources(self, request: Request) -> None:
        """UserError where a file of the user is not what the request says of it. Every one is hashed again: a row
        must not be sealed under the digest of data that it did not read."""
        for entry in _flat(request.inputs.values()):
            changed = self._changed_file(entry) if "source" in entry["meta"] else None
            for digest, path in entry["bases"].items():
                own = not Path(path).is_relative_to(self.root)
                if own and changed is None and self._base_digest(Path(path), fresh=True) != digest:
                    changed = Path(path)
            if changed is not None:
                raise UserError(f"row {request.row}: {CHANGED.format(changed)}")

    def _changed_file(self, entry: Mapping[str, Any]) -> Path | None:
        folder, before = Path(entry["path"]), entry["meta"]["files"]
        now = dict(zip(entry["files"], map(Path, entry["locations"]), strict=False))
        now = now or _named_files(KINDS[entry["kind"]], [folder], False, entry["meta"]["source"])
        for name in {**before, **now}:
            path = now.get(name, folder / name)
            if name not in before or not path.is_file() or self._hashes.of(path, fresh=True) != before[name]["sha256"]:
                return path
        return None

    # ------------------------------------------------------------------------------------------ locks, runs

    @contextmanager
    def lock(self, fp: str) -> Iterator[Lock]:
        """The right to work on one row. Locked where another process has it."""
        with hold(self.root / "locks" / f"{fp}.lock", f"the row {fp[:12]}") as lock:
            yield lock

    def record_run(self, run_dir: Path, rows: Mapping[str, str]) -> None:
        """Write rows.json of a run (row -> fingerprint, also of rows in progress); gc then knows it."""
        run_dir = Path(run_dir).absolute()
        run_dir.mkdir(parents=True, exist_ok=True)
        _write_json(run_dir / "rows.json", dict(rows))
        known = self.root / "runs" / f"{sha256_bytes(os.fsencode(run_dir))[:16]}.json"
        known.parent.mkdir(parents=True, exist_ok=True)
        if not known.exists():
            _write_json(known, {"path": str(run_dir)})

    def runs(self) -> list[Path]:
        """Run directories that used this store and still exist."""
        found = [read_object(path, Damaged).get("path") for path in sorted((self.root / "runs").glob("*.json"))]
        return [Path(path) for path in found if isinstance(path, str) and (Path(path) / "rows.json").is_file()]

    # --------------------------------------------------------------------------------------------------- gc

    def gc(self, keep: Iterable[Path] | None = None, dry_run: bool = False) -> list[Garbage]:
        """Remove what no run and no live lock reaches; returns what was (or would be) removed, with bytes.

        `keep` narrows the runs that count to these directories; a run that is going on always counts.
        """
        kept = self.runs() if keep is None else [Path(path).absolute() for path in keep]
        kept += [path for path in self.runs() if path not in kept and is_held(path / "run.lock")]
        held = [path.stem for path in (self.root / "locks").glob("*.lock") if is_held(path)]
        reached = self._reached(kept, held)
        garbage = []
        for place, what in (("rows", "sealed row"), ("partial", "row in progress")):
            for path in sorted((self.root / place).glob("*")):
                if path.name not in reached:
                    garbage.append(Garbage(path, _size(path), f"{what}{_row_name(path)}"))
        for item in garbage if not dry_run else ():
            self._remove(item.path)
        return garbage

    def _reached(self, runs: Iterable[Path], held: Iterable[str]) -> set[str]:
        todo = [fp for run in runs for fp in read_rows(run).values()] + list(held)
        outputs = {o["digest"]: fp for fp, m in self.manifests().items() for o in m["outputs"].values()}
        reached: set[str] = set()
        while todo:
            fp = todo.pop()
            if fp in reached:
                continue
            reached.add(fp)
            todo += [outputs[digest] for digest in self._uses(fp) if digest in outputs]
        return reached

    def _uses(self, fp: str) -> list[str]:
        """Digests that a row cannot do without: its inputs, and the bases of its adapters."""
        if self.is_sealed(fp):
            manifest = self.manifest(fp)
            bases = [o["lineage"].get("base") for o in manifest["outputs"].values()]
            return [d for d in [*_flat(manifest["inputs"].values()), *bases] if d]
        path = self.partial_dir(fp) / "request.json"
        if not path.is_file():
            return []
        request = read_object(path, Damaged)
        try:
            entries = _flat(request["inputs"].values())
            return [digest for entry in entries for digest in (entry["digest"], *entry["bases"])]
        except (AttributeError, KeyError, TypeError) as error:
            raise Damaged(f"{path}: is no request of a row ({error!r}); {anew(path.parent)}") from error

    def _remove(self, path: Path) -> None:
        trash = path if path.name.startswith(".trash-") else path.with_name(f".trash-{path.name}")
        path.rename(trash)
        trash.unlink() if trash.is_symlink() or not trash.is_dir() else shutil.rmtree(trash)
        self._manifests.pop(path.name, None)


# ---------------------------------------------------------------------------------------------------- files


@dataclass
class _Hashes:
    """sha256 of files, remembered by inode, size and times of change."""

    path: Path
    known: dict[str, list[Any]] | None = None
    changed: dict[str, list[Any]] = field(default_factory=dict)

    def of(self, path: Path, fresh: bool = False) -> str:
        if self.known is None:
            self.known = self._remembered()
        state, key = path.stat(), str(path)
        mark = [state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
        if not fresh and self.known.get(key, [])[:4] == mark:
            return str(self.known[key][4])
        begun = time.time()
        found = sha256_file(path)
        if begun - max(state.st_mtime, state.st_ctime) > SETTLED:
            self.known[key] = self.changed[key] = [*mark, found]
        return found

    def save(self) -> None:
        if self.changed:
            current = {**self._remembered(), **self.changed}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _write_json(self.path, {key: mark for key, mark in current.items() if Path(key).exists()})
            self.changed = {}

    def _remembered(self) -> dict[str, list[Any]]:
        """What earlier processes left; nothing where the file is damaged, since all of it can be hashed again."""
        try:
            marks = read_object(self.path, Damaged) if self.path.is_file() else {}
        except Damaged:
            return {}
        return {key: mark for key, mark in marks.items() if isinstance(mark, list) and len(mark) == 5}


def _named_files(kind: type[Artifact], paths: Sequence[Path], listed: bool, label: str) -> dict[str, Path]:
    """{name in the digest: file}. The order of a list is part of its names."""
    for path in paths:
        if not path.exists():
            raise UserError(f"{label}: there is no file {path}")
        if not path.is_file() and not (path.is_dir() and not listed):
            more = "; a list holds files only" if path.is_dir() else ""
            raise UserError(f"{label}: {path} is not a regular file{more}")
    if listed:
        return {f"{i:03d}/{path.name}": path for i, path in enumerate(paths)}
    if paths[0].is_file():
        return {paths[0].name: paths[0]}
    suffixes = DATA_SUFFIXES + (TEXT_SUFFIXES if kind.kind == "documents" else ())
    everything = kind.is_model or kind.kind == "tokenizer"
    found = {name: paths[0] / name for name in members(paths[0]) if everything or name.endswith(suffixes)}
    if not found:
        raise UserError(f"{label}: {paths[0]} holds no file to read{'' if everything else f' ({suffixes})'}")
    return found


def _seal_of(manifest: Mapping[str, Any]) -> str:
    return sha256_bytes(canonical({key: value for key, value in manifest.items() if key != "seal"}))


def _read_sealed(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: there is no such row; it may be in another store")
    try:
        text = read_text(path, Damaged)
        manifest = json.loads(text)
        found, expected = _seal_of(manifest), manifest["seal"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, Damaged) as error:
        raise Damaged(f"{path}: cannot be read as a manifest ({error}); {anew(path.parent)}") from error
    if found != expected:
        raise Damaged(f"{path}: was changed: its seal is {found}, it says {expected}; {anew(path.parent)}")
    if not within_levels(manifest) or text != _rendered(manifest):  # also what means the same
        raise Damaged(f"{path}: was changed: it is not written as it was sealed; {anew(path.parent)}")
    if isinstance(schema := manifest.get("schema"), int) and schema > SCHEMA:
        raise UserError(f"{path}: written by a newer version (schema {schema}); update this one")
    if not isinstance(schema, int) or not _is_manifest(manifest):
        raise Damaged(f"{path}: is no manifest of a row; {anew(path.parent)}")
    return dict(manifest)


def _is_manifest(manifest: Mapping[str, Any]) -> bool:
    """Whether what is read of a manifest is there. A seal says that nothing changed, not who wrote it."""
    mappings = ("inputs", "outputs", "metrics")
    return (
        all(isinstance(manifest.get(key), str) for key in ("row", "stage", "fingerprint"))
        and all(isinstance(manifest.get(key), dict) for key in mappings)
        and isinstance(manifest.get("roots"), list)
        and isinstance(manifest.get("finished"), (int, float))
        and all(_are_texts(_flat([value])) for value in manifest["inputs"].values())
        and isinstance(places := manifest.get("places", {}), dict)
        and all(isinstance(paths, list) and paths and _are_texts(paths) for paths in places.values())
        and all(slot.isidentifier() and _is_output(output) for slot, output in manifest["outputs"].items())
    )


def _is_output(output: Any) -> bool:
    return (
        isinstance(output, dict)
        and output.get("kind") in list(KINDS)
        and isinstance(output.get("digest"), str)
        and isinstance(output.get("lineage"), dict)
        and isinstance(output["lineage"].get("base", ""), (str, type(None)))
        and isinstance(output.get("files"), dict)
        and all(map(_are_facts, output["files"].values()))
    )


def _are_facts(facts: Any) -> bool:
    return isinstance(facts, dict) and isinstance(facts.get("bytes"), int) and isinstance(facts.get("sha256"), str)


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def read_rows(run_dir: Path) -> dict[str, str]:
    """rows.json of a run directory, in the plan's order; empty before its first run."""
    path = run_dir / "rows.json"
    rows = read_record(path) if path.exists() else {}
    for name, fp in rows.items():  # both become parts of paths
        if not ROW_NAME.fullmatch(name) or not isinstance(fp, str) or not FINGERPRINT.fullmatch(fp):
            words = f"expected the fingerprint of every row, found {name!r}: {fp!r:.100}"
            raise Damaged(f"{path}: {words}; remove it and run the plan again")
    return rows


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object among the files of a run directory."""
    try:
        return read_object(path, Damaged)
    except Damaged as error:
        raise Damaged(f"{error}; remove it and run the plan again") from error


def _rendered(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all: written beside, synced, renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(_rendered(value), encoding="utf-8")
    sync(beside)
    beside.replace(path)


def _flat(values: Iterable[Any]) -> list[Any]:
    flat: list[Any] = []
    for value in values:
        flat += value if isinstance(value, list) else [value] if value is not None else []
    return flat


def _size(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(p.lstat().st_size for p in path.rglob("*") if not p.is_dir())


def _row_name(path: Path) -> str:
    """The name of the row in a directory, after a space, where its manifest or request can be read."""
    for name in ("manifest.json", "request.json"):
        if (path / name).is_file():
            try:
                return f" {read_object(path / name, Damaged)['row']}"
            except (Damaged, KeyError):
                return ""
    return ""
