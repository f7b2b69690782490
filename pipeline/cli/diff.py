"""`rlhf diff`: what differs between two runs, and where the difference starts.

With --json: {"a", "b": {"run", "exit_code": CODE|null, "error"}, "identical", "starts", "rows"} where all but a and b
is what the top of `pipeline.report.differences` describes.
"""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.common import RUNS, STORE, Json, RunsDir, StoreDir, print_json, print_table

if TYPE_CHECKING:
    from pipeline.report.differences import Change, Differences, Figure, RowDifference, Side

SHOWN = 3  # figures of a row that names no headline, before "more"
WIDEST = 44  # letters of a value in a table
BESIDE = ("seed", "code")  # what differs in many rows alike and is told once
NONE = "–"
MANY = 10.0  # times the first value: a larger ratio says only that the first was almost 0


def diff(
    run_a: Annotated[str, typer.Argument(metavar="RUN", help="name of a run, or its directory", show_default=False)],
    run_b: Annotated[str, typer.Argument(metavar="RUN", help="the run to compare it with", show_default=False)],
    row: Annotated[
        str | None, typer.Option("--row", metavar="ROW", help="this row alone, with all its figures")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="also what is equal, and times")] = False,
    store: StoreDir = STORE,
    runs: RunsDir = RUNS,
    json: Json = False,
) -> None:
    """Show what differs between two runs: settings, inputs, figures. The exit code is 0 with differences, too."""
    from pipeline.cli.show import recorded, run_directory
    from pipeline.report.differences import compare

    directories = [run_directory(Path(name), runs) for name in (run_a, run_b)]
    summaries = [recorded(directory) for directory in directories]
    sides = [_side(directory, store) for directory in directories]
    if row is not None:
        _require_row(row, directories, sides)
    found = compare(sides[0], sides[1], everything)
    found = found if row is None else found.only(row)
    if json:
        told = [{"run": s["run"], "exit_code": s["exit_code"], "error": s["error"]} for s in summaries]
        print_json({**found.document(), "a": told[0], "b": told[1]})
        return
    headlines = {r["row"]: r["headline"] for summary in reversed(summaries) for r in summary["rows"]}
    _print(found, headlines, row is not None, everything)
    for summary in summaries:
        if summary["exit_code"] is None:
            print(f"\n{summary['run']}: still running, or ended by force: the rows above are sealed")
        if summary["error"]:
            print(f"\n{summary['run']} ended with exit code {summary['exit_code']}: {summary['error']}")


def _side(directory: Path, store: Path) -> Side:
    """A run's rows and every manifest of the store; Damaged where one of its own rows was changed."""
    from pipeline.flow.store import Store, read_rows
    from pipeline.report.differences import Side

    opened, rows = Store(store), read_rows(directory)
    own = {fp: opened.manifest(fp) for fp in rows.values() if opened.is_sealed(fp)}
    return Side(directory.name, rows, {**opened.manifests(), **own})


def _require_row(row: str, directories: list[Path], sides: list[Side]) -> None:
    """UserError where neither run has the row, or one that has it did not seal it."""
    from pipeline.cli.show import not_sealed
    from pipeline.flow.errors import UserError

    names = list(dict.fromkeys([*sides[0].rows, *sides[1].rows]))
    if row not in names:
        raise UserError(f"{sides[0].run}, {sides[1].run}: no row is called {row}; they have {', '.join(names)}")
    for directory, side in zip(directories, sides, strict=True):
        fingerprint = side.rows.get(row)
        if fingerprint is not None and fingerprint not in side.manifests:
            raise not_sealed(directory, row, fingerprint)


# -------------------------------------------------------------------------------------------------- for people


def _print(found: Differences, headlines: Mapping[str, list[str]], alone: bool, everything: bool) -> None:
    if found.identical and not everything:
        named = found.rows[0].row if len(found.rows) == 1 else f"the same {len(found.rows)} rows"
        print(f"{found.a} and {found.b} are identical: {named}")
        return
    a, b = (found.a, found.b) if found.a != found.b else (f"{found.a} (a)", f"{found.b} (b)")
    print_table(("row", "what differs", a, b), _causes(found))
    shared = _shared(found.rows)
    if shared:
        print()
        print_table(("beside", a, b, "in"), shared)
    _print_figures(found, headlines, alone or everything, (a, b))
    _print_policies(found)


def _causes(found: Differences) -> list[list[str]]:
    """Why each row is another one: its own settings and inputs, then the rows above in which a difference began.

    Seed and code stand in a table of their own; a row that differs in nothing else is no beginning worth naming.
    """
    quiet = {row.row for row in found.rows if row.own and all(change.what in BESIDE for change in row.own)}
    lines = []
    for row in found.rows:
        told = _own_causes(row) if row.status in ("differs", "inputs") or row.own else [_without_causes(row)]
        by_start: dict[str, list[str]] = {}
        for handed in row.inputs:
            since = ", ".join(start for start in handed.starts if start not in quiet) or "its seed or code"
            slots = by_start.setdefault(since, [])
            slots += [slot for slot in [handed.slot.partition("[")[0]] if slot not in slots]
        told += [[f"input {', '.join(slots)}: since {since}", "", ""] for since, slots in by_start.items()]
        elsewhere = [what for what in BESIDE if any(change.what == what for change in row.own)]
        told = told or [[f"{' and '.join(elsewhere)}, see below", "", ""]]
        lines += [[row.row if i == 0 else "", *line] for i, line in enumerate(told)]
    return lines


def _without_causes(row: RowDifference) -> list[str]:
    fa, fb = ((fingerprint or NONE)[:12] for fingerprint in row.fingerprints)
    if row.status == "identical":
        return [f"identical  {fa}", "", ""]
    return ["not sealed in both" if row.status == "unsealed" else "in one run alone", fa, fb]


def _own_causes(row: RowDifference) -> list[list[str]]:
    return [[_title(change), *_values(change)] for change in row.own if change.what not in BESIDE]


def _title(change: Change) -> str:
    named = {"setting": f"settings.{change.name}", "spelling": f"{change.name}, in writing"}
    same = " (same)" if change.same else ""
    plain = change.name if change.name == change.what else f"{change.what} {change.name}"
    return named.get(change.what, plain) + same


def _shared(rows: list[RowDifference]) -> list[list[str]]:
    """Seeds, code and environment once for all rows in which they differ in the same way."""
    compared = [row.row for row in rows if row.status in ("differs", "inputs")]
    places: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for change in row.own:
            if change.what == "seed":
                places.setdefault(("seed", *_values(change)), []).append(row.row)
        for line in _code([change for change in row.own if change.what == "code"]):
            places.setdefault(line, []).append(row.row)
        for change in row.environment:
            places.setdefault((_title(change), *_values(change)), []).append(row.row)
    every = f"all {len(compared)} rows that differ"
    return [
        [*key, every if names == compared and len(names) > 1 else ", ".join(names)] for key, names in places.items()
    ]


def _code(changes: list[Change]) -> list[tuple[str, str, str]]:
    """A line for each package whose source differs: the files that both have, and those of one alone."""
    from pipeline.report.differences import UNSET, sources_of

    lines = []
    for package, files in sources_of(change.name for change in changes).items():
        sides = {change.name: (change.a is not UNSET, change.b is not UNSET) for change in changes}
        for has, words in (
            ((True, True), ("differs", "")),
            ((True, False), ("there", NONE)),
            ((False, True), (NONE, "there")),
        ):
            named = [name for name in files if sides[f"{package}/{name}".lstrip("/")] == has]
            if named:
                lines.append((f"code {package}: {', '.join(named)}", *words))
    return lines


def _values(change: Change) -> tuple[str, str]:
    return _value(change.a), _value(change.b)


def _value(value: Any) -> str:
    """
    >>> _value(0.001), _value([0.9, 0.95]), _value(None), _value("linear")
    ('0.001', '[0.9, 0.95]', 'null', 'linear')
    """
    if repr(value) == "unset":
        return "unset"
    text = value if isinstance(value, str) else jsonlib.dumps(value, ensure_ascii=False)
    return text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."


def _print_figures(found: Differences, headlines: Mapping[str, list[str]], whole: bool, names: tuple[str, str]) -> None:
    """Figures that differ: those that a row's stage names, or all of them."""
    lines, more = [], []
    for row in found.rows:
        chosen = row.figures if whole else _headline(row, headlines.get(row.row, []))
        chosen = [*chosen, *row.times]
        lines += [[row.row if i == 0 else "", *_figure(figure)] for i, figure in enumerate(chosen)]
        left = len(row.figures) + len(row.times) - len(chosen)
        more += [f"{row.row} {left}"] if left else []
    if lines:
        print()
        print_table(("row", "figure", *names, "difference", "relative", ""), lines, right=(2, 3, 4, 5))
    if more:
        print(f"\nfurther figures that differ: {', '.join(more)}; --row ROW shows those of a row")


def _headline(row: RowDifference, headline: list[str]) -> list[Figure]:
    if any(figure.name.startswith("policies.") for figure in row.figures):
        return []  # a table of their own
    named = [figure for figure in row.figures if figure.name in headline]
    return named or row.figures[:SHOWN]


def _figure(figure: Figure) -> list[str]:
    difference = NONE if figure.difference is None else signed(figure.difference)
    few = figure.relative is not None and abs(figure.relative) < MANY
    relative = f"{100 * (figure.relative or 0.0):+.1f} %" if few else ""
    overlap = {None: "", True: "intervals overlap", False: "intervals apart"}[figure.overlap]
    note = "same" if figure.same else overlap
    return [figure.name, *_amounts(figure), difference, relative, note]


def _amounts(figure: Figure) -> tuple[str, str]:
    """Both values, with as many digits as it takes to tell them apart."""
    for digits in (4, 6, 9, 17):
        told = amount(figure.a, digits), amount(figure.b, digits)
        if told[0] != told[1] or figure.same:
            break
    return told


def amount(value: Any, digits: int = 4) -> str:
    """
    >>> amount(12345), amount(0.123456), amount({"mean": 0.6, "low": 0.5, "high": 0.7}), amount(None), amount("ppo")
    ('12,345', '0.1235', '0.6 [0.5, 0.7]', 'null', 'ppo')
    """
    from pipeline.report.differences import is_interval

    if is_interval(value):
        mean, low, high = (amount(value[key], digits) for key in ("mean", "low", "high"))
        return f"{mean} [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _value(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if digits < 6 and abs(value) >= 1000 else f"{value:.{digits}g}"


def signed(value: float) -> str:
    """
    >>> signed(0.25), signed(-1500.0), signed(0.0)
    ('+0.25', '-1,500', '0')
    """
    return ("+" if value > 0 else "") + (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}")


def _print_policies(found: Differences) -> None:
    from rich.console import Console

    from pipeline.report.differences import policies_grid

    for row in found.rows:
        grid = policies_grid(row)
        if grid is not None:
            print()
            Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(grid.render_rich())
