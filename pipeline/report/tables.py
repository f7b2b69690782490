"""A table that can be shown in a terminal, in a README and nowhere else: text cells, nothing computed."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

NONE = "–"


@dataclass(frozen=True)
class Grid:
    """`rows` hold as many cells as `head`. The first column is left-aligned, the others are numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    left: frozenset[int] = frozenset({0})

    def render_markdown(self) -> str:
        """A titled table in GitHub's Markdown, ending in a newline."""
        rule = ["---" if i in self.left else "---:" for i in range(len(self.head))]
        lines = [f"**{_cell(self.title)}**", ""] if self.title else []
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in ([*self.head], rule, *self.rows)]
        lines += ["", self.note] if self.note else []
        return "\n".join(lines) + "\n"

    def render_html(self) -> str:
        """A table for a page; the title is there for screen readers, markup in cells stays text."""
        side = ["" if i not in self.left or i == 0 else ' style="text-align: left"' for i in range(len(self.head))]
        cells = lambda tag, row: "".join(f"<{tag}{s}>{html.escape(c)}</{tag}>" for s, c in zip(side, row, strict=True))
        head, rows = cells("th", self.head), "".join(f"<tr>{cells('td', row)}</tr>" for row in self.rows)
        caption = f"<caption hidden>{html.escape(self.title)}</caption>"
        return f"<figure><table>{caption}<tr>{head}</tr>{rows}</table></figure>"

    def render_rich(self) -> Table:
        table = Table(
            title=Text(self.title) if self.title else None,
            caption=Text(self.note) if self.note else None,
            title_justify="left",
            caption_justify="left",
        )
        for i, name in enumerate(self.head):
            table.add_column(Text(name), justify="left" if i in self.left else "right")
        for row in self.rows:
            table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
        return table


def markdown(grids: Iterable[Grid]) -> str:
    return "\n".join(grid.render_markdown() for grid in grids)


def number(value: Any, digits: int = 3) -> str:
    """A number, the mean of an interval, or a dash."""
    value = value_of(value)
    return NONE if value is None else f"{value:.{digits}f}"


def interval(value: Mapping[str, Any] | None, digits: int = 3) -> str:
    """`0.612 [0.580, 0.644]`, or a dash."""
    if value is None or value.get("mean") is None:
        return NONE
    mean, low, high = value["mean"], value.get("low"), value.get("high")
    if low is None or high is None:
        return number(mean, digits)
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def value_of(value: Any) -> float | None:
    """The number in a bare number or in {"mean": ...}; None stays None."""
    if isinstance(value, Mapping):
        value = value.get("mean")
    return None if value is None else float(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _style(cell: str) -> str:
    return "bold red" if cell.endswith("missed") else "green" if cell.endswith(" met") else ""
