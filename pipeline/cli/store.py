"""`rlhf gc` and `rlhf verify`: throw away what nothing reaches, and read back everything that is sealed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.common import RUNS, STORE, Json, RunsDir, StoreDir, print_json, print_table

if TYPE_CHECKING:
    from pipeline.flow.store import Garbage


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


def verify(store: StoreDir = STORE, json: Json = False) -> None:
    """Hash every file of every sealed row again, trusting nothing that is remembered."""
    from pipeline.flow.errors import Damaged, UserError
    from pipeline.flow.store import Store

    opened = Store(store)
    if not opened.root.is_dir():
        raise UserError(f"{store}: there is no store here; --store names another place")
    problems: dict[str, str | None] = {}
    for path in sorted((opened.root / "rows").glob("*")):
        if path.name.startswith("."):
            continue
        try:
            opened.verify(path.name)
            problems[path.name] = None
        except Damaged as error:
            problems[path.name] = str(error)
    bad = [problem for problem in problems.values() if problem]
    if json:
        rows = [{"fingerprint": fp, "intact": not problem, "problem": problem} for fp, problem in problems.items()]
        print_json({"rows": rows, "damaged": len(bad)})
    else:
        print(f"{len(problems) - len(bad)} of {len(problems)} sealed rows are intact")
    if bad:
        raise Damaged("\n      ".join(bad))
