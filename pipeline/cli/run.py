"""`rlhf run` and `rlhf stage`: bring a plan's rows up to date, or one of them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.common import (
    RUNS,
    STORE,
    Json,
    PlanFile,
    RunsDir,
    Sets,
    StoreDir,
    print_json,
    print_table,
    stage_table,
)
from pipeline.flow.errors import UserError

if TYPE_CHECKING:
    from pipeline.flow.launch import LaunchSettings
    from pipeline.flow.runner import Again, RowResult, Runner, RunResult

DONE = ("executed", "reused")  # statuses of rows that are sealed
Name = Annotated[str | None, typer.Option("--name", help="name of the run directory; default: the plan file's name")]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="count malformed records and set them aside instead of stopping")
]
AcceptCode = Annotated[
    bool, typer.Option("--accept-code", help="reuse rows that differ from this plan in nothing but code")
]


def run(
    plan: PlanFile,
    sets: Sets = None,
    from_row: Annotated[str | None, typer.Option("--from", metavar="ROW", help="first row to bring up to date")] = None,
    until_row: Annotated[
        str | None, typer.Option("--until", metavar="ROW", help="last row to bring up to date")
    ] = None,
    name: Name = None,
    skip_bad: SkipBad = False,
    accept_code: AcceptCode = False,
    store: StoreDir = STORE,
    runs: RunsDir = RUNS,
    json: Json = False,
) -> None:
    """Run a plan: compute its stale rows, reuse the others. The same command continues an interrupted run."""
    command = _Command(plan, sets, name, skip_bad, runs)
    if command.follows():
        return
    runner = command.runner(store, accept_code)
    try:
        with command.leading(runner):
            runner.run(from_row, until_row)
    finally:
        runner.listener.close()
        if runner.started:
            print_json(runner.result.document()) if json else print_result(runner.result)


def stage(
    plan: PlanFile,
    row: Annotated[str, typer.Argument(metavar="ROW", help="row of the plan", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="compute a sealed row again and compare digests")] = False,
    sets: Sets = None,
    name: Name = None,
    skip_bad: SkipBad = False,
    accept_code: AcceptCode = False,
    store: StoreDir = STORE,
    runs: RunsDir = RUNS,
    json: Json = False,
) -> None:
    """Bring one row up to date; with --force compute it again beside the sealed one and compare digests."""
    if not force:
        run(plan, sets, row, row, name, skip_bad, accept_code, store, runs, json)
        return
    command = _Command(plan, sets, name, skip_bad, runs)
    if command.follows():
        return
    runner = command.runner(store, accept_code)
    try:
        with command.leading(runner):
            again = runner.again(row)
    finally:
        runner.listener.close()
    print_json(again_document(again)) if json else _print_again(again)
    if not again.same:
        raise typer.Exit(1)


class _Command:
    """What `run` and `stage` were asked for; the plan file is read once."""

    def __init__(self, plan: Path, sets: list[str] | None, name: str | None, skip_bad: bool, runs: Path) -> None:
        from pipeline.flow.config import load_document, with_sets
        from pipeline.flow.launch import launch_settings

        self.document, self.sets = load_document(plan), plan_sets(sets, skip_bad)
        given = self.document.values.get("name") if name is None else name
        self.run_dir = runs / run_name(plan.stem if given is None else given)
        changed = with_sets(self.document, self.sets)
        launch = changed.values.get("launch")
        self.launch: LaunchSettings | None = None  # of several nodes
        if isinstance(launch, dict) and launch.get("nodes", 1) != 1:
            self.launch = launch_settings(launch, changed.places)

    def load(self) -> Any:
        from pipeline.flow.plan import load_plan

        return load_plan(self.document, self.sets, stage_table())

    def follows(self) -> bool:
        """On another node than the first of several: do what node 0 says until it ends. False where this node leads."""
        if self.launch is None:
            return False
        from pipeline.flow.nodes import node_of
        from pipeline.flow.runner import follow

        if node_of(self.launch) == 0:
            return False
        follow(self.load(), self.run_dir, _say)
        return True

    @contextlib.contextmanager
    def leading(self, runner: Runner) -> Iterator[None]:
        """Where the run ends before the other nodes were gathered, they hear of it."""
        try:
            yield
        except UserError as error:
            if self.launch is not None and not runner.gathered:
                from pipeline.flow.nodes import dismiss

                dismiss(self.launch, _say, error.exit_code)
            raise

    def runner(self, store: Path, accept_code: bool) -> Runner:
        from pipeline.cli.progress import listener
        from pipeline.flow.runner import Runner
        from pipeline.flow.store import Store

        return Runner(self.load, Store(store), self.run_dir, listener(), accept_code=accept_code, check_data=check_data)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def check_data(artifact: Any, skip_bad: bool) -> None:
    """Read a source of records as its row will; UserError where it cannot be. A hub's is not fetched for this."""
    from pipeline.data.sources import KINDS, read

    if artifact.kind in KINDS and all(isinstance(file, Path) for file in artifact.data_files):
        read(artifact, artifact.kind, skip_bad=skip_bad)


def plan_sets(sets: list[str] | None, skip_bad: bool) -> list[str]:
    return [*(sets or []), *(["skip_bad=true"] if skip_bad else [])]


def run_name(name: Any) -> str:
    """A run's name is one folder below the runs directory."""
    plain = isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name
    if not plain or any("\ud800" <= letter <= "\udfff" for letter in name):  # bytes that are no UTF-8
        raise typer.BadParameter(f"{name!r} is not a plain name; give one such as mine-2", param_hint="--name")
    return str(name)


# ---------------------------------------------------------------------------------------------------- what
# is shown


def again_document(again: Again) -> dict[str, Any]:
    return {
        "row": again.row,
        "stage": again.stage,
        "fingerprint": again.fingerprint,
        "seconds": round(again.seconds, 3),
        "same": again.same,
        "slots": again.slots,
        "scratch": str(again.scratch) if again.scratch else None,
    }


def _print_again(again: Again) -> None:
    lines = [
        [slot, str(facts["sealed"])[:16], str(facts["again"])[:16], "same" if facts["same"] else "DIFFERS",
         " ".join(facts["differs"])]
        for slot, facts in again.slots.items()
    ]  # fmt: skip
    print_table(("slot", "sealed", "again", "", "files that differ"), lines)
    if again.scratch:
        print(f"the second result is kept in {again.scratch}")


def print_result(result: RunResult) -> None:
    """The table at the end of a run, and where things are."""
    from pipeline.cli.progress import clock, figure

    lines = [
        [row.row, row.status, f"{row.seconds:,.1f}" if row.status != "reused" else "",
         figure(row.tokens) if row.tokens is not None else "", headline(row)]
        for row in result.rows
    ]  # fmt: skip
    if lines:
        print_table(("row", "", "seconds", "tokens", "figures"), lines, right=(2, 3))
        print()
    evaluations = [row for row in result.rows if "policies" in row.metrics and row.status in DONE]
    for row in evaluations:
        _print_evaluation(row)
    print(f"run           {result.run_dir}  ({clock(result.seconds)})")
    for row in evaluations:
        print(f"side by side  {row.artifacts['evaluation']['path']}/samples.html  ({row.row})")
    policy = result.final_policy()
    if policy is not None and all(row.status in DONE for row in result.rows):
        print(f"final policy  {policy}")


def _print_evaluation(row: RowResult) -> None:
    from rich.console import Console

    from pipeline.report.summary import policies_grid

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(policies_grid(row.metrics, row.row).render_rich())
    print()


def headline(row: RowResult) -> str:
    """The two to four figures that matter for a row: those its stage names, else its first numbers.

    A name may be a path into nested metrics: "heldout.accuracy".
    """
    from pipeline.cli.progress import figure

    names = (
        row.headline
        or [
            name
            for name, value in row.metrics.items()
            if isinstance(value, int | float) and not name.startswith("time/") and name != "tokens"
        ][:3]
    )
    values = [(name, look_up(row.metrics, name)) for name in names]
    return "  ".join(f"{name} {figure(value)}" for name, value in values if value is not None)


def look_up(metrics: Any, name: str) -> Any:
    """
    >>> look_up({"heldout": {"accuracy": 0.7}}, "heldout.accuracy")
    0.7
    """
    if isinstance(metrics, dict) and name in metrics:
        return metrics[name]
    head, _, rest = name.partition(".")
    return look_up(metrics[head], rest) if rest and isinstance(metrics, dict) and head in metrics else None
