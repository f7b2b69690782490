"""Options and output that several commands share, and the shapes that `--json` prints.

One document on standard output; progress and messages on standard error. Golden files hold the shapes
(tests/cli/golden). FP is a row's fingerprint, DIGEST an artifact's, both sha256 in hex.

run, stage      {"run", "rows": [{"row", "stage", "status": "executed"|"reused"|"failed"|"interrupted", "seconds",
                 "artifacts": {SLOT: {"path", "digest"}}, "metrics": {...}}]}
stage --force   {"row", "stage", "fingerprint", "seconds", "same", "scratch": PATH|null,
                 "slots": {SLOT: {"sealed": DIGEST, "again": DIGEST, "same", "differs": [FILE, ...]}}}
plan            {"plan", "rows": [{"row", "stage", "status": "fresh"|"stale"|"pending",
                 "fingerprint": FP|null, "why", "waits_for",
                 "inputs": {SLOT: {"type", "from": REF|[REF, ...]}}, "outputs": {SLOT: TYPE}}]}
estimate        {"plan", "device", "utilisation", "rows": [...]}, as in pipeline/cli/estimate.py
show RUN        {"run", "rows": [a row of `run` + {"fingerprint", "tokens", "headline": [METRIC, ...]}],
                 "started", "finished": TIME|null, "exit_code": CODE|null, "error"}   null: it has not ended
show RUN ROW    {"run", "row", "fingerprint", "stage", "version", "settings", "metrics", "environment",
                 "seed", "inputs": {SLOT: DIGEST|[DIGEST, ...]|null}, "started", "finished", "log",
                 "outputs": {SLOT: {"kind", "path", "digest", "bytes", "lineage"}}}
lineage         {"run", "row", "fingerprint", "rows": {FP: {"row", "stage", "inputs": {SLOT: [ORIGIN, ...]}}}}
                ORIGIN is {"digest", "fingerprint", "slot"} of a row, or {"digest", "files"} of raw data
gc              {"dry_run", "bytes", "removed": [{"what", "path", "bytes"}]}
verify          {"rows": [{"fingerprint", "intact", "problem": TEXT|null}], "damaged": COUNT}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="plan file (YAML)", show_default=False)]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="change a setting of the plan, e.g. stages.dpo.beta=0.2"),
]
StoreDir = Annotated[Path, typer.Option("--store", envvar="RLHF_STORE", help="where sealed rows are kept")]
RunsDir = Annotated[Path, typer.Option("--runs", envvar="RLHF_RUNS", help="where run directories are kept")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on standard output")]
STORE = Path("store")
RUNS = Path("runs")


def stage_table() -> dict[str, str]:
    """Stage names and where their classes are: the only place where the command line meets `stages`."""
    from stages import STAGES

    return STAGES


def print_json(document: Any) -> None:
    json.dump(document, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """A plain table on standard output; columns in `right` are aligned to the right."""
    widths = [max(len(line[column]) for line in [head, *rows]) for column in range(len(head))]
    for line in [head, ["-" * width for width in widths], *rows]:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
