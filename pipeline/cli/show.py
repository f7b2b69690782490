"""`rlhf show` and `rlhf lineage`: what a run did, and what one of its rows descends from."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.common import RUNS, STORE, Json, RunsDir, StoreDir, print_json, print_table

if TYPE_CHECKING:
    from pipeline.flow.errors import UserError
    from pipeline.flow.store import Store

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="name of a run, or its directory", show_default=False)]


def show(
    run: RunArgument,
    row: Annotated[str | None, typer.Argument(metavar="[ROW]", help="one row of it")] = None,
    store: StoreDir = STORE,
    runs: RunsDir = RUNS,
    json: Json = False,
) -> None:
    """Show a run: its rows, figures and places; or everything that is recorded about one row."""
    from pipeline.flow.store import Store

    run_dir, opened = run_directory(Path(run), runs), Store(store)
    if row is None:
        _show_run(run_dir, opened, json)
        return
    fingerprint = fingerprint_of(run_dir, row)
    document = row_document(opened, run_dir, row, fingerprint)
    if json:
        print_json(document)
        return
    from pipeline.report.summary import row_grids

    grids = row_grids(document["metrics"], row)
    shown = {k: v for k, v in document["metrics"].items() if k != "best_of_n" or not grids}
    times = {k: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(document[k])) for k in ("started", "finished")}
    for key, value in {**document, "metrics": shown, **times}.items():
        _print_item(key, value)
    if grids:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
        for grid in grids:
            console.print()
            console.print(grid.render_rich())


def _print_item(key: str, value: Any, indent: int = 0) -> None:
    """One line a value, nested mappings indented: settings and metrics read like the plan they came from."""
    space = "  " * indent
    if isinstance(value, Mapping) and value:
        print(f"{space}{key}:")
        for name, item in value.items():
            _print_item(str(name), item, indent + 1)
    else:
        text = value if isinstance(value, str) else jsonlib.dumps(value, ensure_ascii=False)
        print(f"{space}{key}: {text}")


def recorded(run_dir: Path) -> dict[str, Any]:
    """summary.json of a run; UserError before its first row is done, Damaged where it cannot be read."""
    from pipeline.flow.runner import read_summary

    summary = read_summary(run_dir)
    if not summary:
        from pipeline.flow.errors import UserError

        raise UserError(f"{run_dir.name}: nothing is recorded yet, the first row of its first run is not done")
    return summary


def _show_run(run_dir: Path, store: Store, json: bool) -> None:
    summary = recorded(run_dir)
    if json:
        print_json(summary)
        return
    from pipeline.cli.progress import figure
    from pipeline.cli.run import look_up
    from pipeline.flow.store import read_rows

    lines = [
        [row["row"], row["status"], f"{row['seconds']:,.1f}", row["fingerprint"][:12],
         "  ".join(f"{name} {figure(look_up(row['metrics'], name))}" for name in row["headline"])
         if row["status"] != "interrupted" else store.left(row["fingerprint"]) or ""]
        for row in summary["rows"]
    ]  # fmt: skip
    told = {row["row"] for row in summary["rows"]}
    for row, fingerprint in read_rows(run_dir).items():
        if row not in told and (left := store.left(fingerprint)):  # at work, or ended by force
            lines.append([row, "", "", fingerprint[:12], left])
    if lines:
        print_table(("row", "", "seconds", "fingerprint", "figures"), lines, right=(2,))
    if summary["exit_code"] is None:
        print("\nstill running, or ended by force; the same command goes on")
    if summary["error"]:
        print(f"\nended with exit code {summary['exit_code']}: {summary['error']}")


def _require_sealed(store: Store, run_dir: Path, row: str, fingerprint: str) -> None:
    if not store.is_sealed(fingerprint):
        where = f"it is not in {store.root}; --store names another place"
        raise not_sealed(run_dir, row, fingerprint, store.left(fingerprint) or where)


def not_sealed(run_dir: Path, row: str, fingerprint: str, left: str | None = None) -> UserError:
    """What to say of a row that a run names and the store does not hold. `left`: `Store.left`."""
    from pipeline.flow.errors import UserError

    log, words = run_dir / "logs" / f"{row}.log", f": {left}" if left else ""
    return UserError(f"row {row} of {run_dir.name} is not sealed ({fingerprint[:12]}){words}; log: {log}")


def row_document(store: Store, run_dir: Path, row: str, fingerprint: str) -> dict[str, Any]:
    """One row of a run as `rlhf show RUN ROW --json` prints it."""
    _require_sealed(store, run_dir, row, fingerprint)
    manifest = store.manifest(fingerprint)
    outputs = {
        slot: {
            "kind": output["kind"],
            "path": str(store.row_dir(fingerprint) / slot),
            "digest": output["digest"],
            "bytes": sum(file["bytes"] for file in output["files"].values()),
            "lineage": output["lineage"],
        }
        for slot, output in manifest["outputs"].items()
    }
    kept = ("stage", "version", "settings", "inputs", "metrics", "environment", "seed", "started", "finished")
    return {
        "run": run_dir.name,
        "row": row,
        "fingerprint": fingerprint,
        **{key: manifest[key] for key in kept},
        "outputs": outputs,
        "log": str(run_dir / "logs" / f"{row}.log"),
    }


# -------------------------------------------------------------------------------- lineage


def lineage(
    run: RunArgument,
    row: Annotated[str, typer.Argument(metavar="ROW", help="row of the run", show_default=False)],
    store: StoreDir = STORE,
    runs: RunsDir = RUNS,
    json: Json = False,
) -> None:
    """Show what a row descends from, down to the raw data."""
    from pipeline.flow.store import Store

    run_dir = run_directory(Path(run), runs)
    fingerprint = fingerprint_of(run_dir, row)
    _require_sealed(Store(store), run_dir, row, fingerprint)
    document = lineage_document(Store(store), run_dir.name, fingerprint)
    if json:
        print_json(document)
        return
    for line in tree_lines(document["rows"], document["fingerprint"]):
        print(line)


def lineage_document(store: Store, run: str, fingerprint: str) -> dict[str, Any]:
    """Every row that the given one descends from, as a graph by fingerprint.

    {"run", "row", "fingerprint", "rows": {fingerprint: {"row", "stage", "inputs": {slot: [origin, ...]}}}}
    where an origin is {"digest", "fingerprint", "slot"} of a sealed row or {"digest", "files"} of raw data.
    """
    made = {
        output["digest"]: (fp, slot)
        for fp, manifest in store.manifests().items()
        for slot, output in manifest["outputs"].items()
    }
    rows: dict[str, Any] = {}
    todo = [fingerprint]
    while todo:
        fp = todo.pop()
        manifest = store.manifest(fp)
        places = manifest.get("places", {})
        inputs: dict[str, list[dict[str, Any]]] = {}
        for slot, digests in manifest["inputs"].items():
            several = digests if isinstance(digests, list) else [digests] if digests else []
            inputs[slot] = [_origin(digest, places, made) for digest in several]
            todo += [o["fingerprint"] for o in inputs[slot] if o.get("fingerprint") not in (None, *rows)]
        rows[fp] = {"row": manifest["row"], "stage": manifest["stage"], "inputs": inputs}
    return {"run": run, "row": rows[fingerprint]["row"], "fingerprint": fingerprint, "rows": rows}


def _origin(digest: str, places: Mapping[str, list[str]], made: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    if digest in places or digest not in made:
        return {"digest": digest, "files": list(places.get(digest, []))}
    fingerprint, slot = made[digest]
    return {"digest": digest, "fingerprint": fingerprint, "slot": slot}


def tree_lines(
    rows: Mapping[str, Any], fingerprint: str, label: str = "", depth: int = 0, seen: set[str] | None = None
) -> Iterator[str]:
    """The graph as an indented tree; a row that was shown already is named, not shown again."""
    seen = set() if seen is None else seen
    space, row = "  " * depth, rows[fingerprint]
    above = fingerprint in seen
    yield f"{space}{label}{row['row']}  {fingerprint[:12]}" + ("  (shown above)" if above and row["inputs"] else "")
    if above:
        return
    seen.add(fingerprint)
    for name, origins in row["inputs"].items():
        for origin in origins:
            if "fingerprint" in origin:
                taken = f"{name} = {origin['slot']} of "
                yield from tree_lines(rows, origin["fingerprint"], taken, depth + 1, seen)
            else:
                where = ", ".join(origin["files"]) or "a file that is not in this store"
                yield f"{space}  {name} = {where}  {origin['digest'][:12]}"


# -------------------------------------------------------------------------------- runs


def run_directory(run: Path, runs: Path) -> Path:
    """The directory of a run given by name or by path; UserError names those that exist."""
    from pipeline.flow.errors import UserError

    for candidate in (runs / run, run):
        if (candidate / "rows.json").is_file():
            return candidate
    known = ", ".join(sorted(path.parent.name for path in runs.glob("*/rows.json"))) or "none"
    raise UserError(f"{run}: there is no such run below {runs} (there are: {known}); --runs names another place")


def fingerprint_of(run_dir: Path, row: str) -> str:
    from pipeline.flow.errors import UserError
    from pipeline.flow.store import read_rows

    rows = read_rows(run_dir)
    if row not in rows:
        raise UserError(f"{run_dir.name}: no row is called {row}; it has {', '.join(rows)}")
    return rows[row]
