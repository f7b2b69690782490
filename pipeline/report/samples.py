"""Answers of several policies to the same prompts, side by side, for a person to read.

    exhibit = Exhibit("p17", prompt.messages, [Answer("sft", "Mira lives in Dovan.", scores={"gold": 1.0})])
    write_samples(directory, [exhibit], title="evaluate", facts={"temperature": "1.0"})

`samples.md` reads in a terminal and on a forge, `samples.html` is one page that needs neither network nor
scripts. What a model wrote is shown as text: markup in it stays text, control characters become visible.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.records import Message
from pipeline.report.tables import Grid, number

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5b6475; --line: #d9dee8; --page: #f5f6f9;
  --card: #ffffff; --user: #e9eef8; --good: #17703a; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #a2abbb; --line: #363d4a;
  --page: #14171d; --card: #1d222b; --user: #262e3d; --good: #6fcf97; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 96rem; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1rem; margin: 0 0 .5rem; color: var(--soft); font-weight: 600; }
h3 { font-size: .95rem; margin: 0; }
.facts { color: var(--soft); margin: 0 0 1rem; }
figure { margin: 0; overflow-x: auto; }
table { border-collapse: collapse; margin: 0 0 1.5rem; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
td { font-variant-numeric: tabular-nums; }
section { margin: 0 0 2rem; padding-top: 1rem; border-top: 1px solid var(--line); }
.turn { background: var(--user); border-radius: .5rem; padding: .4rem .75rem; margin: 0 0 .5rem;
  max-width: 60rem; }
.turn b { color: var(--soft); font-weight: 600; font-size: .8rem; display: block; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .75rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem;
  display: flex; flex-direction: column; gap: .5rem; }
article.best { border-color: var(--good); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; flex: 1; }
.empty, .score { color: var(--soft); }
.score { font-variant-numeric: tabular-nums; font-size: .85rem; }
ul { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem .75rem; margin: 0; padding: 0;
  font-size: .8rem; }
.yes { color: var(--good); } .no, .cut { color: var(--bad); } .cut { font-size: .8rem; margin: 0; }
"""


POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Answer:
    """What one policy answered.

    scores   by scorer: "gold", "proxy", "heldout" ...
    parts    of the judge, each in [0, 1]
    stopped  ended by itself rather than at the token limit
    """

    policy: str
    text: str
    stopped: bool = True
    tokens: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Exhibit:
    """A prompt and the answers to it, in the order of the policies."""

    id: str
    messages: Sequence[Message]
    answers: Sequence[Answer]


def write_samples(
    directory: Path, exhibits: Sequence[Exhibit], *, title: str, facts: Mapping[str, str] | None = None
) -> tuple[Path, Path]:
    """Write samples.md and samples.html into `directory` (which exists) and return their paths."""
    pages = (samples_markdown(exhibits, title, facts or {}), samples_html(exhibits, title, facts or {}))
    paths = directory / "samples.md", directory / "samples.html"
    for path, page in zip(paths, pages, strict=True):
        path.write_text(page, encoding="utf-8")
    return paths


def samples_markdown(exhibits: Sequence[Exhibit], title: str, facts: Mapping[str, str]) -> str:
    lines = [
        f"# {visible(title)}",
        "",
        _facts(facts, len(exhibits)),
        "",
        overview(exhibits).render_markdown(),
    ]
    for exhibit in exhibits:
        lines += [f"## {visible(exhibit.id)}", ""]
        for message in exhibit.messages:
            lines += [f"**{message.role}**", "", *_fenced(_content(message)), ""]
        for answer in exhibit.answers:
            figures = [
                *_scores(answer),
                *(f"{visible(part)} {number(v, 2)}" for part, v in answer.parts.items()),
            ]
            if not answer.stopped:
                figures.append("did not stop by itself")
            lines += [f"### {visible(answer.policy)}", "", *_fenced(answer.text), "", " · ".join(figures), ""]
    return "\n".join(lines).rstrip() + "\n"


def samples_html(exhibits: Sequence[Exhibit], title: str, facts: Mapping[str, str]) -> str:
    name = html.escape(visible(title))
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # Answers are shown, never run: not even an escaping mistake could load or execute anything.
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>{name}</title><style>{STYLE}</style></head><body>",
            f'<h1>{name}</h1><p class="facts">{html.escape(_facts(facts, len(exhibits)))}</p>',
            overview(exhibits).render_html(),
            *(_section(exhibit) for exhibit in exhibits),
            "</body></html>\n",
        ]
    )


def overview(exhibits: Sequence[Exhibit]) -> Grid:
    """Means of the answers shown: by policy, every score, parts of the judge, how many stopped."""
    by_policy: dict[str, list[Answer]] = {}
    for answer in (a for e in exhibits for a in e.answers):
        by_policy.setdefault(answer.policy, []).append(answer)
    every = [a for answers in by_policy.values() for a in answers]
    scores = list(dict.fromkeys(k for a in every for k in a.scores))
    parts = list(dict.fromkeys(k for a in every for k in a.parts))
    rows = []
    for policy, answers in by_policy.items():
        cells = [_mean([a.scores[k] for a in answers if k in a.scores]) for k in scores]
        cells += [_mean([a.parts[k] for a in answers if k in a.parts]) for k in parts]
        rows.append([visible(policy), *cells, _mean([float(a.stopped) for a in answers])])
    return Grid("means of the answers shown", [visible(c) for c in ("policy", *scores, *parts, "stopped")], rows)


def visible(text: str) -> str:
    """Text whose control and direction-changing characters are spelled out; line breaks and tabs stay."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _UNSEEN else _spell(c) for c in text)


_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn"}
_JOINER = "\u200d"  # holds emoji together


def _spell(c: str) -> str:
    return c if c == _JOINER else f"<U+{ord(c):04X}>"


def _facts(facts: Mapping[str, str], prompts: int) -> str:
    count = f"{prompts} prompt{'' if prompts == 1 else 's'} and means over them"
    return visible(" · ".join([count, *(f"{k} {v}" for k, v in facts.items())]))


def _content(message: Message) -> str:
    if message.content is None:
        return ", ".join(f"calls {(c.get('function') or c).get('name', '?')}" for c in message.tool_calls)
    if isinstance(message.content, str):
        return message.content
    return "\n".join(str(part.get("text", part)) for part in message.content)


def _scores(answer: Answer) -> list[str]:
    shown = [f"{visible(name)} {number(value, 2)}" for name, value in answer.scores.items()]
    return shown if answer.tokens is None else [*shown, f"{answer.tokens} tokens"]


def _fenced(text: str) -> list[str]:
    fence = "```"
    while fence in text:  # an answer may hold fences of its own
        fence += "`"
    return [f"{fence}text", visible(text), fence]


def _section(exhibit: Exhibit) -> str:
    golds = {a.scores["gold"] for a in exhibit.answers if "gold" in a.scores}
    best = max(golds) if len(golds) > 1 else None
    turns = [
        f'<div class="turn"><b>{html.escape(m.role)}</b><div class="text">{_text(_content(m))}</div></div>'
        for m in exhibit.messages
    ]
    articles = [_article(a, best is not None and best == a.scores.get("gold")) for a in exhibit.answers]
    name = html.escape(visible(exhibit.id))
    return f'<section><h2>{name}</h2>{"".join(turns)}<div class="answers">{"".join(articles)}</div></section>'


def _article(answer: Answer, best: bool) -> str:
    text = _text(answer.text) if answer.text.strip() else '<span class="empty">(empty)</span>'
    mark = '<span class="yes"> best</span>' if best else ""
    stopped = "" if answer.stopped else '<p class="cut">did not stop by itself</p>'
    parts = "".join(map(_part, answer.parts.items()))
    name = _text(answer.policy) + mark
    return (
        f"<article{' class=best' if best else ''}><header><h3>{name}</h3>"
        f'<span class="score">{html.escape(" · ".join(_scores(answer)))}</span></header>'
        f'<p class="text">{text}</p>{stopped}{f"<ul>{parts}</ul>" if parts else ""}</article>'
    )


def _part(part: tuple[str, float]) -> str:
    name, value = part
    style, mark = ("yes", "✓") if value >= 0.995 else ("no", "✗") if value < 0.005 else ("", number(value, 2))
    return f'<li class="{style}">{mark} {_text(name)}</li>'


def _text(text: str) -> str:
    return html.escape(visible(text))


def _mean(values: Sequence[float]) -> str:
    return number(sum(values) / len(values) if values else None, 2)
