"""Overoptimisation, seen: proxy, held-out and gold scores against the distance that a policy has gone (KL).

A policy optimised against a reward model first improves by every measure; past some distance the score that it is
trained on rises on while the true one falls (Gao et al. 2023, "Scaling laws for reward model overoptimization").

    curve = curve_of("ppo", read_lines(run_dir / "metrics" / "ppo.jsonl"), metrics_of_the_row)
    curves_grid([curve]).render_rich();   page([curve], "quickstart")     a page without scripts or network

What is read, all of it optional, of each line of a row's metrics and of the row's final metrics:

    dev/kl  dev/proxy  dev/heldout  dev/gold    at the steps where dev prompts were answered; nats an answer
    kl  score                                   PPO's own samples of the iteration: training prompts, before the update
    dev/kept_step (or kept_step)                final: the step whose weights the row gave out
    dev/kl_budget (or kl_budget)                final: the KL within which that step was chosen

The document of `rlhf report RUN... --curve --json` (null where it was not measured; missing: what the picture lacks):

    {"curves": [{"run", "row", "kept": STEP|null, "budget": NATS|null, "missing": [TEXT, ...],
                 "points": [{"step", "kl", "proxy", "heldout", "gold"}], "sampled": [{"step", "kl", "proxy"}],
                 "best": {"proxy"|"heldout"|"gold": STEP},
                 "parted": [{"score": "heldout"|"gold", "step", "kl", "until", "proxy": CHANGE, "change": CHANGE}]}]}
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.flow.errors import Damaged
from pipeline.report.samples import POLICY, STYLE, visible
from pipeline.report.tables import Grid, number, value_of

SCORES = {"proxy": "proxy reward", "heldout": "held-out reward", "gold": "gold score"}
STAGES = ("ppo", "rejection", "dpo")  # rows of these are policies moved by a reward: what they lack is said
KEPT = ("dev/kept_step", "kept_step")
BUDGET = ("dev/kl_budget", "kl_budget")


@dataclass(frozen=True)
class Point:
    """A policy on its way: `kl` in nats an answer from where the row started, scores by name, those measured."""

    step: int
    kl: float
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Parting:
    """From `step` on, where `score` was best, proxy rose and `score` fell: by how much until the last point."""

    score: str
    step: int
    kl: float
    until: int
    proxy: float
    change: float

    def __str__(self) -> str:
        return (
            f"proxy and {NAMES[self.score]} part after step {self.step} (KL {self.kl:.2f}): "
            f"until step {self.until} proxy {self.proxy:+.3f}, {NAMES[self.score]} {self.change:+.3f}"
        )


NAMES = {"proxy": "proxy", "heldout": "held-out", "gold": "gold"}


@dataclass(frozen=True)
class Curve:
    """One row. `points` are on dev prompts, `sampled` on the prompts it trained on; both in the order of steps."""

    row: str
    points: list[Point]
    sampled: list[Point]
    kept: int | None = None
    budget: float | None = None
    missing: list[str] = field(default_factory=list)
    run: str = ""

    def __bool__(self) -> bool:
        return bool(self.points or self.sampled)

    @property
    def label(self) -> str:
        return f"{self.run}: {self.row}" if self.run else self.row

    def best(self, score: str) -> Point | None:
        """The first of the highest."""
        having = [point for point in self.points if score in point.scores]
        return max(having, key=lambda point: point.scores[score], default=None)

    def parted(self) -> list[Parting]:
        """Where proxy went on rising past the best held-out or gold score, which fell. Means without intervals."""
        found = []
        for score in ("heldout", "gold"):
            having = [p for p in self.points if score in p.scores and "proxy" in p.scores]
            if not having:
                continue
            top, last = max(having, key=lambda point: point.scores[score]), having[-1]
            proxy, change = (last.scores[name] - top.scores[name] for name in ("proxy", score))
            if proxy > 0 > change:
                found.append(Parting(score, top.step, top.kl, last.step, proxy, change))
        return found

    def document(self) -> dict[str, Any]:
        tops = {score: self.best(score) for score in SCORES}
        return {
            "run": self.run,
            "row": self.row,
            "kept": self.kept,
            "budget": self.budget,
            "missing": self.missing,
            "points": [{"step": p.step, "kl": p.kl, **{s: p.scores.get(s) for s in SCORES}} for p in self.points],
            "sampled": [{"step": p.step, "kl": p.kl, "proxy": p.scores["proxy"]} for p in self.sampled],
            "best": {score: top.step for score, top in tops.items() if top is not None},
            "parted": [vars(parting) for parting in self.parted()],
        }


# ------------------------------------------------------------------------------------------------------ reading


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a row's metrics; empty where there are none. Of a row that runs, the last may be half written.

    Raises Damaged for a line that is no JSON object.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = []
    for at, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            lines.append(found)
        elif line.endswith("\n"):
            raise Damaged(f"{path}:{at}: is no JSON object; remove the file and run the plan again")
    return lines


def curve_of(row: str, lines: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], run: str = "") -> Curve:
    """One row's curve from its lines and its final metrics. A step that was done again counts as it was last."""
    points: dict[int, Point] = {}
    sampled: dict[int, Point] = {}
    unplaced = 0
    for line in lines:
        step = _number(line.get("step"))
        if step is None:
            continue
        scores = {name: value for name in SCORES if (value := _number(line.get(f"dev/{name}"))) is not None}
        kl = _number(line.get("dev/kl"))
        if scores and kl is not None:
            points[int(step)] = Point(int(step), kl, scores)
        unplaced += bool(scores) and kl is None
        score, moved = _number(line.get("score")), _number(line.get("kl"))
        if score is not None and moved is not None:
            sampled[int(step)] = Point(int(step), moved, {"proxy": score})
    kept = next((value for key in KEPT if (value := _number(metrics.get(key))) is not None), None)
    curve = Curve(
        row,
        [points[step] for step in sorted(points)],
        [sampled[step] for step in sorted(sampled)],
        None if kept is None else int(kept),
        next((value for key in BUDGET if (value := _number(metrics.get(key))) is not None), None),
        run=run,
    )
    curve.missing.extend(_missing(curve, unplaced))
    return curve


def wanted(row: str, lines: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a row belongs into the picture: a policy moved by a reward, or any row with dev scores."""
    return row.partition("@")[0] in STAGES or any(f"dev/{name}" in line for line in lines for name in SCORES)


def _missing(curve: Curve, unplaced: int) -> list[str]:
    words = []
    if unplaced:
        words.append(f"{unplaced} steps have dev scores but no dev/kl to place them by")
    if not curve.points and not unplaced:
        words.append("no dev scores (dev/proxy, dev/heldout, dev/gold with dev/kl)")
    if curve.points:
        having = {name for point in curve.points for name in point.scores}
        words += [f"no dev/{name}" for name in SCORES if name not in having]
    if curve.kept is not None and curve.points and all(p.step != curve.kept for p in curve.points):
        words.append(f"step {curve.kept}, which was kept, has no dev scores")
    return words


def _number(value: Any) -> float | None:
    """A finite number, or the mean of an interval; None for everything else."""
    if isinstance(value, Mapping):
        value = value.get("mean")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    found = value_of(value)
    return found if found is not None and math.isfinite(found) else None


# ------------------------------------------------------------------------------------------------------ a table


def curves_grid(curves: Sequence[Curve], title: str = "score against KL") -> Grid:
    """A line for every point on dev prompts; of rows without any, those of their own samples."""
    scores = [s for s in SCORES if any(s in p.scores for c in curves for p in c.points or c.sampled)]
    rows = []
    for curve in curves:
        for point in curve.points or curve.sampled:
            cells = [number(point.scores.get(score)) for score in scores]
            rows.append([curve.label, str(point.step), f"{point.kl:.3f}", *cells, ", ".join(_marks(curve, point))])
    head = ["row", "step", "KL, nats", *(SCORES[score] for score in scores), ""]
    return Grid(title, head, rows, left=frozenset({0, len(head) - 1}))


def _marks(curve: Curve, point: Point) -> list[str]:
    if not curve.points:
        return ["own samples"]
    marks = ["kept"] if point.step == curve.kept else []
    marks += [f"best {NAMES[score]}" for score in SCORES if curve.best(score) is point]
    over = curve.budget is not None and point.kl > curve.budget
    return marks + (["over the KL budget"] if over else [])


def said(curves: Sequence[Curve]) -> list[str]:
    """What a reader should know beside the figures: partings, and what is missing."""
    words = [f"{curve.label}: {parting}." for curve in curves for parting in curve.parted()]
    lacking: dict[str, list[str]] = {}
    for curve in curves:
        if curve.missing:
            lacking.setdefault("; ".join(curve.missing), []).append(curve.label)
    return words + [f"{', '.join(labels)}: {what}." for what, labels in lacking.items()]


# ------------------------------------------------------------------------------------------------------- a page

WIDTH, HEIGHT = 960.0, 340.0  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 64.0, 24.0, 44.0, 46.0
LINES = {"proxy": "", "heldout": "7 5", "gold": ""}  # dashes
COLOURS = 6

CURVES = """
:root { --c0: #0b62b0; --c1: #c2410c; --c2: #157a3d; --c3: #7e22ce; --c4: #0e7490; --c5: #be185d; }
@media (prefers-color-scheme: dark) { :root { --c0: #6cb2ff; --c1: #ff9e64; --c2: #6fcf97; --c3: #c79bff;
  --c4: #5fd0e0; --c5: #ff8ab8; } }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 13px system-ui, sans-serif; }
svg .title { fill: var(--ink); font-weight: 600; font-size: 15px; }
.grid { stroke: var(--line); } .budget { stroke: var(--bad); stroke-dasharray: 2 4; } svg .over { fill: var(--bad); }
.line { fill: none; stroke-width: 2; } .own { opacity: .45; } .ring { fill: none; stroke: var(--ink); stroke-width: 2; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; margin: 0 0 .75rem;
  font-size: .9rem; }
.legend li { display: flex; align-items: center; gap: .4rem; } .legend svg { width: 34px; height: 14px; }
.panel { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .5rem;
  margin: 0 0 1rem; }
.said { margin: 0 0 1rem; padding-left: 1.25rem; display: block; font-size: .95rem; list-style: disc; }
"""


def page(curves: Sequence[Curve], title: str, root: bool = False) -> str:
    """One HTML page with the picture and the table; neither network nor scripts. `root`: KL on a square-root scale."""
    name = html.escape(visible(title))
    x, budgets = _across(curves, root)
    panels = [
        _panel(curves, "reward models", ("proxy", "heldout"), x, budgets),
        _panel(curves, "gold score, the judge of a world whose truth is known", ("gold",), x, budgets),
    ]
    beyond = [f"{c.label}: the KL budget of {c.budget:g} nats is beyond the picture." for c in curves if c
              and c.budget is not None and c.budget not in budgets]  # fmt: skip
    told = "".join(f"<li>{html.escape(visible(words))}</li>" for words in [*said(curves), *beyond])
    empty = '<p class="cut">There is nothing to draw: no row recorded a score with a KL beside it.</p>'
    grid = curves_grid(curves, "points")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>{name}</title><style>{STYLE}{CURVES}</style></head><body>",
            f'<h1>{name}</h1><p class="facts">Scores against the KL, in nats an answer, of a row\'s policy from where '
            "the row started; steps are joined in the order in which they were made.</p>",
            _legend(curves),
            "".join(panels) or empty,
            f'<ul class="said">{told}</ul>' if told else "",
            replace(grid, rows=[[visible(cell) for cell in row] for row in grid.rows]).render_html()
            if grid.rows
            else "",
            "</body></html>\n",
        ]
    )


@dataclass(frozen=True)
class _Scale:
    """Values onto pixels: `warp` of them from `low` to `high` becomes `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    warp: Callable[[float], float] = float

    def __call__(self, value: float) -> float:
        return self.start + (self.warp(value) - self.low) / (self.high - self.low) * (self.end - self.start)


def _panel(curves: Sequence[Curve], title: str, scores: Sequence[str], x: _Scale, budgets: Sequence[float]) -> str:
    """One picture of these scores; empty where none was measured. `sampled` points count as proxy."""
    drawn = [p.scores[s] for c in curves for p in [*c.points, *c.sampled] for s in scores if s in p.scores]
    if not drawn:
        return ""
    y = _Scale(*spread(drawn, 0.08), HEIGHT - BOTTOM, TOP)
    whose = {b: ", ".join(c.label for c in curves if c.budget == b) if len(budgets) > 1 else "" for b in budgets}
    body = [
        f'<text class="title" x="{LEFT:g}" y="16">{html.escape(title)}</text>',
        *_axes(x, y),
        *(_budget_line(budget, label, x) for budget, label in whose.items()),
        *(_drawn(curve, i, scores, x, y) for i, curve in enumerate(curves)),
        *(_ring(curve, scores, x, y) for curve in curves),
    ]
    described = html.escape(f"{title}: {', '.join(SCORES[s] for s in scores)} against KL")
    return (
        f'<div class="panel"><svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{described}">'
        f"{''.join(body)}</svg></div>"
    )


def _across(curves: Sequence[Curve], root: bool) -> tuple[_Scale, list[float]]:
    """The scale of the KL, one for all panels, and the budgets that lie within it (or within twice what was gone)."""
    gone = [p.kl for c in curves for p in [*c.points, *c.sampled]]
    far = max([0.0, *gone]) or 1.0
    budgets = [b for b in dict.fromkeys(c.budget for c in curves) if b is not None and b <= 2 * far]
    warp = _signed_root if root else float
    ends = [warp(end) for end in [0.0, far, *gone, *budgets]]
    return _Scale(*spread(ends, 0.02), LEFT, WIDTH - RIGHT, warp), budgets


def _signed_root(value: float) -> float:
    """Estimates of a KL may fall below 0, by a little."""
    return math.copysign(math.sqrt(abs(value)), value)


def spread(values: Sequence[float], pad: float) -> tuple[float, float]:
    """From the least to the largest value and a share of that more on both sides; one value gets room around it.

    >>> spread([1.0, 3.0], 0.5), spread([2.0], 0.1), spread([0.0, 0.0], 0.1)
    ((0.0, 4.0), (1.0, 3.0), (-0.5, 0.5))
    """
    low, high = min(values), max(values)
    more = pad * (high - low) if high > low else abs(high) / 2 or 0.5
    return low - more, high + more


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], about that many.

    >>> ticks(0.0, 1.7), ticks(-0.3, 0.9, 4), ticks(0.0, 5400.0, 3)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6], [-0.2, 0.0, 0.2, 0.4, 0.6, 0.8], [0.0, 2000.0, 4000.0])
    """
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    steps = [factor * power for factor in (1.0, 2.0, 5.0, 10.0)]
    step = min(steps, key=lambda s: abs(math.log((high - low) / s / about)))
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _axes(x: _Scale, y: _Scale) -> list[str]:
    lines = []
    for value in ticks(y.low, y.high, 5):
        at = f"{y(value):.1f}"
        lines.append(f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{at}" y2="{at}"/>')
        lines.append(f'<text x="{LEFT - 8:g}" y="{at}" text-anchor="end" dominant-baseline="middle">{value:g}</text>')
    for place in ticks(x.low, x.high, 8):
        value = place if x.warp is float else place * abs(place)
        at, foot = f"{x(value):.1f}", HEIGHT - BOTTOM
        lines.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP:g}" y2="{foot:g}"/>')
        lines.append(f'<text x="{at}" y="{foot + 18:g}" text-anchor="middle">{value:g}</text>')
    label = "KL, nats an answer" + ("" if x.warp is float else " (square-root scale)")
    return [*lines, f'<text x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{HEIGHT - 8:g}" text-anchor="middle">{label}</text>']


def _budget_line(budget: float, label: str, x: _Scale) -> str:
    at, words = f"{x(budget):.1f}", html.escape(visible(f"KL budget {budget:g}" + (f" ({label})" if label else "")))
    return (
        f'<line class="budget" x1="{at}" x2="{at}" y1="{TOP:g}" y2="{HEIGHT - BOTTOM:g}"/>'
        f'<text class="over" x="{at}" y="{TOP - 6:g}" text-anchor="middle">{words}</text>'
    )


def _drawn(curve: Curve, index: int, scores: Sequence[str], x: _Scale, y: _Scale) -> str:
    """The row's lines and markers; every marker says its figures when it is pointed at."""
    colour = f"var(--c{index % COLOURS})"
    parts = []
    if "proxy" in scores and curve.sampled:
        alone = not curve.points  # nothing better to join by a line
        own = [_marker(index, x(p.kl), y(p.scores["proxy"]), 3.0, colour, True, _told(curve, p)) for p in curve.sampled]
        path = _path(curve.sampled, "proxy", x, y)
        line = f'<polyline class="line" points="{path}" stroke="{colour}"/>' if alone else ""
        parts.append(f'<g class="own">{line}{"".join(own)}</g>')
    for score in scores:
        having = [p for p in curve.points if score in p.scores]
        path = _path(having, score, x, y)
        if len(having) > 1:
            dashes = f' stroke-dasharray="{LINES[score]}"' if LINES[score] else ""
            parts.append(f'<polyline class="line" points="{path}" stroke="{colour}"{dashes}/>')
        parts += [
            _marker(index, x(p.kl), y(p.scores[score]), 4.5, colour, score != "heldout", _told(curve, p))
            for p in having
        ]
    return "".join(parts)


def _path(points: Sequence[Point], score: str, x: _Scale, y: _Scale) -> str:
    return " ".join(f"{x(p.kl):.1f},{y(p.scores[score]):.1f}" for p in points)


def _told(curve: Curve, point: Point) -> str:
    figures = [f"{NAMES[score]} {value:.3f}" for score, value in point.scores.items()]
    where = "" if point in curve.points else " (its own samples)"
    return f"{curve.label}, step {point.step}{where}: KL {point.kl:.3f}, {', '.join(figures)}"


def _marker(index: int, x: float, y: float, r: float, colour: str, filled: bool, told: str = "") -> str:
    """A circle, square, triangle or diamond: rows can be told apart without colour."""
    fill = colour if filled else "var(--card)"
    paint = f'fill="{fill}" stroke="{colour}" stroke-width="1.5"'
    note = f"<title>{html.escape(visible(told))}</title>" if told else ""
    outlines = {
        1: [(-r, -r), (r, -r), (r, r), (-r, r)],
        2: [(0.0, -1.25 * r), (1.15 * r, 0.85 * r), (-1.15 * r, 0.85 * r)],
        3: [(0.0, -1.35 * r), (1.35 * r, 0.0), (0.0, 1.35 * r), (-1.35 * r, 0.0)],
    }
    outline = outlines.get(index % 4)
    if outline is None:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}" {paint}>{note}</circle>'
    corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in outline)
    return f'<polygon points="{corners}" {paint}>{note}</polygon>'


def _ring(curve: Curve, scores: Sequence[str], x: _Scale, y: _Scale) -> str:
    """A ring around every marker of the kept step."""
    kept = next((p for p in curve.points if p.step == curve.kept), None)
    places = [] if kept is None else [(x(kept.kl), y(kept.scores[s])) for s in scores if s in kept.scores]
    return "".join(f'<circle class="ring" cx="{a:.1f}" cy="{b:.1f}" r="9"/>' for a, b in places)


def _legend(curves: Sequence[Curve]) -> str:
    """Rows by colour and marker, then what lines and markers mean."""
    items = []
    for i, curve in enumerate(curves):
        colour = f"var(--c{i % COLOURS})"
        icon = f'<path d="M0 7H34" stroke="{colour}" stroke-width="2"/>{_marker(i, 17, 7, 4.5, colour, True)}'
        if curve:
            items.append((icon, curve.label + (f" (step {curve.kept} kept)" if curve.kept is not None else "")))
    ink = "var(--soft)"
    having = {score for curve in curves for point in curve.points for score in point.scores}
    if "proxy" in having:
        items.append(
            (f'<path d="M0 7H34" stroke="{ink}" stroke-width="2"/>' + _marker(0, 17, 7, 4, ink, True), "proxy")
        )
    if "heldout" in having:
        dashed = f'<path d="M0 7H34" stroke="{ink}" stroke-width="2" stroke-dasharray="{LINES["heldout"]}"/>'
        items.append((dashed + _marker(0, 17, 7, 4, ink, False), "held-out"))
    if any(curve.sampled for curve in curves):
        items.append((f'<g class="own">{_marker(0, 17, 7, 3, ink, True)}</g>', "proxy of PPO's own samples"))
    if any(curve.kept is not None and curve.points for curve in curves):
        items.append(('<circle class="ring" cx="17" cy="7" r="6"/>', "kept checkpoint"))
    cells = [f'<li><svg viewBox="0 0 34 14" aria-hidden="true">{icon}</svg>{html.escape(visible(name))}</li>'
             for icon, name in items]  # fmt: skip
    return f'<ul class="legend">{"".join(cells)}</ul>' if cells else ""
