"""The command line `rlhf`: one module per command group, everything heavy imported inside the commands.

A problem that a person can mend is one message on standard error and the exit code of `pipeline.flow.errors`.
"""

from __future__ import annotations

import importlib
import signal
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from pipeline.cli import plan, report, run, show, store
from pipeline.flow.errors import UserError

LAZY = {
    "data": ("pipeline.cli.data", "Look at data: its records, its training masks, its problems."),
    "import": ("pipeline.cli.imports", "Turn models of other projects into directories that a plan can start from."),
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
app.command("stage")(run.stage)
app.command("show")(show.show)
app.command("lineage")(show.lineage)
app.command("report")(report.report)
app.command("gc")(store.gc)
app.command("verify")(store.verify)


def main(args: list[str] | None = None) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app(args, prog_name="rlhf")
    except UserError as error:
        print(f"rlhf: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OSError as error:  # a full disk, a folder without permission: the message names the file
        print(f"rlhf: {error}", file=sys.stderr)
        raise SystemExit(UserError.exit_code) from None


def _stop(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)
