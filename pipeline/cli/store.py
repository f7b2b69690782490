"""`rlhf gc` and `rlhf verify`: throw away what nothing reaches, and read back everything that is sealed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.common import RUNS, STORE, Json, RunsDir, StoreDir, print_json, print_table

if TYPE_CHECKING:
    from pipeline.flow.store import Garbage, Store


def gc(
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="RUN", help="keep what these runs reach, and no other run's rows"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, remove nothing")] = False,
    store: StoreDir = STORE,
    runs: RunsDir = RUNS,
    json: Json = False,
) -> None:
    """Remove sealed rows and unfinished work that no run and no live lock reaches."""
    from pipeline.cli.show import run_directory
    from pipeline.flow.store import Store

    kept = None if not keep else [run_directory(Path(name), runs) for name in keep]
    garbage = Store(store).gc(keep=kept, dry_run=dry_run)
    if json:
        print_json(gc_document(garbage, dry_run))
        return
    if garbage:
        lines = [[item.what, megabytes(item.bytes), str(item.path)] for item in garbage]
        print_table(("what", "MB", "where"), lines, right=(1,))
    total = megabytes(sum(item.bytes for item in garbage))
    print(f"{'would free' if dry_run else 'freed'} {total} MB in {len(garbage)} places")


def gc_document(garbage: list[Garbage], dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "bytes": sum(item.bytes for item in garbage),
        "removed": [{"what": item.what, "path": str(item.path), "bytes": item.bytes} for item in garbage],
    }


def megabytes(count: int) -> str:
    """
    >>> megabytes(1_234_567)
    '1.2'
    """
    return f"{count / 1e6:,.1f}"


def verify(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="only what this run is made of, its own files included")
    ] = None,
    store: StoreDir = STORE,
    runs: RunsDir = RUNS,
    json: Json = False,
) -> None:
    """Hash every file again, trusting nothing remembered: of all sealed rows, or of a run down to its raw data."""
    from pipeline.flow.errors import Damaged, UserError
    from pipeline.flow.store import Store

    opened = Store(store)
    if not opened.root.is_dir():
        raise UserError(f"{store}: there is no store here; --store names another place")
    checked = _verify_run(opened, run, runs) if run else _verify_all(opened)
    bad = [found["problem"] for found in checked if found["problem"]]
    if json:
        print_json({"artifacts" if run else "rows": checked, "damaged": len(bad)})
    elif run:
        print_table(("", "artifact", "digest", "MB", "files"), [_line(found) for found in checked], right=(3, 4))
        print(f"{len(checked) - len(bad)} of {len(checked)} artifacts of {run} are intact")
    else:
        print(f"{len(checked) - len(bad)} of {len(checked)} sealed rows are intact")
    if bad:
        raise Damaged("\n      ".join(dict.fromkeys(bad)))


def _verify_all(store: Store) -> list[dict[str, Any]]:
    """{"fingerprint", "intact", "problem"} of every sealed row."""
    found = []
    for path in sorted((store.root / "rows").glob("*")):
        if not path.name.startswith("."):
            problem = _problem(lambda fp=path.name: store.verify(fp))  # type: ignore[misc]
            found.append({"fingerprint": path.name, "intact": problem is None, "problem": problem})
    return found


def _verify_run(store: Store, run: str, runs: Path) -> list[dict[str, Any]]:
    """Every artifact of a run, the last row first, then the user's files that they descend from.

    {"artifact": "sft.policy" or a file, "kind", "digest", "bytes", "files", "intact", "problem"}
    """
    from pipeline.cli.show import run_directory
    from pipeline.flow.errors import UserError
    from pipeline.flow.store import read_rows

    found: list[dict[str, Any]] = []
    places: dict[str, list[str]] = {}
    for row, fingerprint in reversed(read_rows(run_directory(Path(run), runs)).items()):
        try:
            manifest = store.manifest(fingerprint)
        except UserError as error:
            facts = {"kind": "row", "digest": fingerprint, "files": 0, "bytes": 0}
            found.append({"artifact": row, **facts, "intact": False, "problem": str(error)})
            continue
        places = {**manifest.get("places", {}), **places}
        for slot, output in manifest["outputs"].items():
            files = output["files"].values()
            facts = {"kind": output["kind"], "digest": output["digest"], "files": len(files)}
            problem = _problem(lambda fp=fingerprint, slot=slot: store.verify_output(fp, slot))  # type: ignore[misc]
            size = sum(f["bytes"] for f in files)
            found.append(
                {"artifact": f"{row}.{slot}", **facts, "bytes": size, "intact": not problem, "problem": problem}
            )
    for digest, names in places.items():
        paths = [Path(name) for name in names]
        problem = _problem(lambda d=digest, p=paths: store.verify_source(d, p))  # type: ignore[misc]
        size = sum(p.stat().st_size for p in paths if p.is_file())
        facts = {"kind": "raw data", "digest": digest, "files": len(paths), "bytes": size}
        found.append({"artifact": ", ".join(names), **facts, "intact": not problem, "problem": problem})
    return found


def _problem(act: Callable[[], Any]) -> str | None:
    from pipeline.flow.errors import UserError

    try:
        act()
    except UserError as error:
        return str(error)
    return None


def _line(found: Mapping[str, Any]) -> list[str]:
    state = "intact" if found["intact"] else "DAMAGED"
    return [state, found["artifact"], found["digest"][:12], megabytes(found["bytes"]), str(found["files"])]
