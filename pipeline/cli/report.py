"""`rlhf report`: the promised figures of one or several runs, gate by gate; or their scores against KL (--curve).

With --json: {"figures": [{"run", "seed", "temperature": T|null, "gate", "value": NUMBER|null, "low": NUMBER|null,
"high": NUMBER|null, "target", "status": "met"|"missed"|"not measured", "note"}], "missed": COUNT}
With --curve --json: what the top of `pipeline.report.overoptimisation` describes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.common import RUNS, Json, RunsDir, print_json

if TYPE_CHECKING:
    from pipeline.report.overoptimisation import Curve


def report(
    run_names: Annotated[list[str], typer.Argument(metavar="RUN...", help="names of runs, or their directories")],
    markdown: Annotated[bool, typer.Option("--markdown", help="as a Markdown table")] = False,
    brief: Annotated[bool, typer.Option("--brief", help="gates only, without the tables behind them")] = False,
    curve: Annotated[
        bool, typer.Option("--curve", help="instead: proxy, held-out and gold scores of each policy row against its KL")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="with --curve: write the picture there, an HTML page")
    ] = None,
    root: Annotated[bool, typer.Option("--sqrt-kl", help="with --curve: KL on a square-root scale")] = False,
    runs: RunsDir = RUNS,
    json: Json = False,
) -> None:
    """Show which promised figures were met, missed or not measured in the evaluations of runs (one a seed)."""
    if curve:
        _report_curves(run_names, runs, out, root, json=json, markdown=markdown)
        return
    from rich.console import Console

    from pipeline.cli.show import run_directory
    from pipeline.flow.errors import UserError
    from pipeline.flow.runner import read_summary
    from pipeline.flow.store import read_record
    from pipeline.report.figures import figures

    if out is not None or root:
        raise UserError("--out and --sqrt-kl are about the picture of --curve; add --curve")
    documents = []
    for name in run_names:
        directory = run_directory(Path(name), runs)
        plan = read_record(directory / "plan.json")
        summary = read_summary(directory)
        if not summary:
            raise UserError(f"{directory}: this run has not ended yet, so there is nothing to report")
        documents.append({**summary, "seed": plan.get("seed", 0)})
    found = figures(documents, details=not brief)
    if json:
        print(found.render_json())
    elif markdown:
        print(found.render_markdown())
    else:
        Console().print(found.render_rich())


def _report_curves(
    run_names: list[str], runs: Path, out: Path | None, root: bool, *, json: bool, markdown: bool
) -> None:
    """Also of runs that go on: whatever is measured so far."""
    from pipeline.cli.show import run_directory
    from pipeline.flow.errors import UserError
    from pipeline.report.overoptimisation import curves_grid, page, said

    directories = [run_directory(Path(name), runs) for name in run_names]
    curves = [curve for directory in directories for curve in _curves(directory, several=len(directories) > 1)]
    if not any(curves):
        lacks = "; ".join(f"{c.label}: {', '.join(c.missing)}" for c in curves) or "there is no ppo, rejection or dpo"
        raise UserError(f"{', '.join(run_names)}: no row recorded a score with a KL beside it ({lacks})")
    title = f"{', '.join(directory.name for directory in directories)}: score against KL"
    if out is not None:
        out.write_text(page(curves, title, root), encoding="utf-8")
    if json:
        print_json({"curves": [curve.document() for curve in curves]})
    elif markdown:
        print("\n".join([curves_grid(curves, title).render_markdown(), *(f"- {words}" for words in said(curves))]))
    else:
        from rich.console import Console

        Console(highlight=False).print(curves_grid(curves, title).render_rich())
        print("\n".join(said(curves)))
    if out is not None:
        print(f"picture  {out}", file=sys.stderr if json else sys.stdout)


def _curves(directory: Path, several: bool) -> list[Curve]:
    """Curves of a run's policy rows, in the plan's order."""
    from pipeline.flow.runner import read_summary
    from pipeline.flow.store import read_rows
    from pipeline.report.overoptimisation import curve_of, read_lines, wanted

    done = {(row["row"], row["fingerprint"]): row["metrics"] for row in read_summary(directory).get("rows", [])}
    found = []
    for row, fingerprint in read_rows(directory).items():
        lines = read_lines(directory / "metrics" / f"{row}.jsonl")
        if wanted(row, lines):
            found.append(curve_of(row, lines, done.get((row, fingerprint), {}), directory.name if several else ""))
    return found
