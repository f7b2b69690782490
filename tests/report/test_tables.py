from __future__ import annotations

from rich.console import Console

from pipeline.report.tables import Grid, interval, number


def test_markdown_keeps_its_columns():
    grid = Grid("wins | ties", ["policy", "gold"], [["a|b", "0.5"], ["two\nlines", "–"]], note="By prompt.")
    assert grid.render_markdown() == (
        "**wins \\| ties**\n\n| policy | gold |\n| --- | ---: |\n| a\\|b | 0.5 |\n| two lines | – |\n\nBy prompt.\n"
    )


def test_terminal_shows_markup_as_text():
    console = Console(width=60, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(Grid("[bold]t[/bold]", ["policy"], [["[red]x[/red]"]]).render_rich())
    shown = console.export_text()
    assert "[bold]t[/bold]" in shown and "[red]x[/red]" in shown


def test_numbers():
    assert number(0.12345) == "0.123" and number(None) == "–" and number({"mean": 2.0}, 1) == "2.0"
    assert interval({"mean": 0.6, "low": 0.5, "high": 0.7}, 2) == "0.60 [0.50, 0.70]"
    assert interval({"mean": 0.6}, 2) == "0.60" and interval(None) == "–"


def test_a_page_shows_markup_as_text_and_words_on_the_left():
    grid = Grid("<t>", ["row", "step", "what"], [["<b>x</b>", "1", "kept"]], left=frozenset({0, 2}))
    left = ' style="text-align: left"'
    assert grid.render_html() == (
        "<figure><table><caption hidden>&lt;t&gt;</caption>"
        f"<tr><th>row</th><th>step</th><th{left}>what</th></tr>"
        f"<tr><td>&lt;b&gt;x&lt;/b&gt;</td><td>1</td><td{left}>kept</td></tr></table></figure>"
    )
