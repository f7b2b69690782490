"""The command line `rlhf`: one module per command group, everything heavy imported inside the commands.

A problem that a person can mend is one message on standard error and the exit code of `pipeline.flow.errors`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from pipeline.cli import diff, estimate, plan, report, run, show, store
from pipeline.flow.errors import RowFailed, UserError, no_room
from pipeline.flow.secrets import redact

LAZY = {
    "data": ("pipeline.cli.data", "Look at data: its records, its training masks, its problems."),
    "import": ("pipeline.cli.imports", "Turn models of other projects into directories that a plan can start from."),
    "export": ("pipeline.cli.exports", "Write policies in the layout of other projects."),
}


class LazyGroup(TyperGroup):
    """Command groups that are imported when they are called, known by name and one line until then."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *LAZY]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in LAZY:
            return TyperCommand(name=cmd_name, help=LAZY[cmd_name][1])
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in LAZY:
            module = importlib.import_module(LAZY[args[0]][0])
            return args[0], typer.main.get_command(module.app), args[1:]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=LazyGroup,
    help="Text and human preferences in, an aligned LLaMA out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run.run)
app.command("plan")(plan.plan)
app.command("estimate")(estimate.estimate)
app.command("stage")(run.stage)
app.command("show")(show.show)
app.command("lineage")(show.lineage)
app.command("diff")(diff.diff)
app.command("report")(report.report)
app.command("gc")(store.gc)
app.command("verify")(store.verify)


def main(args: list[str] | None = None) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    _usable_streams()
    try:
        app(args, prog_name="rlhf")
    except UserError as error:
        _end(str(error), error.exit_code)
    except OSError as error:  # a full disk, a folder without permission: the message names the file
        full = no_room(error, Path.cwd())
        _end(full or str(error), RowFailed.exit_code if full else UserError.exit_code)


def _usable_streams() -> None:
    """A stream that was closed before the start leads nowhere; what an encoding cannot show becomes "?"."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open to the end)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _end(message: str, code: int) -> NoReturn:
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(f"rlhf: {redact(message)}", file=sys.stderr)
    raise SystemExit(code) from None


def _stop(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)
