"""`rlhf report`: the promised figures of one or several runs, gate by gate.

With --json: {"figures": [{"run", "seed", "temperature": T|null, "gate", "value": NUMBER|null, "low": NUMBER|null,
"high": NUMBER|null, "target", "status": "met"|"missed"|"not measured", "note"}], "missed": COUNT}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import RUNS, Json, RunsDir


def report(
    run_names: Annotated[list[str], typer.Argument(metavar="RUN...", help="names of runs, or their directories")],
    markdown: Annotated[bool, typer.Option("--markdown", help="as a Markdown table")] = False,
    brief: Annotated[bool, typer.Option("--brief", help="gates only, without the tables behind them")] = False,
    runs: RunsDir = RUNS,
    json: Json = False,
) -> None:
    """Show which promised figures were met, missed or not measured in the evaluations of runs (one a seed)."""
    from rich.console import Console

    from pipeline.cli.show import run_directory
    from pipeline.flow.errors import UserError
    from pipeline.flow.runner import read_summary
    from pipeline.flow.store import read_record
    from pipeline.report.figures import figures

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
