"""`rlhf data show|mask|check FILE`: its records, which tokens are trained, what is wrong with it.

With --json each prints one document on standard output:

    show   {"file", "format", "counts", "records": [...]}                 records as in data/README.md
    mask   {"file", "format", "train_on",
            "records": [{"source", "tokens": [{"id", "text", "trained", "round"}]}]}
    check  {"file", "format", "counts": {"records", "rows", "bad", ...}, "reasons": {reason: rows},
            "problems": [{"file", "line", "reason", "message"}],
            "tokens": null | {"records", "total", "trained", "shortest", "median", "longest", "too_long"}}
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.common import Json, print_json

if TYPE_CHECKING:
    from pipeline.data.chat import ChatFormat, Rendered
    from pipeline.data.sources import Read

app = typer.Typer(
    help="Look at data: its records, its training masks, its problems.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

File = Annotated[Path, typer.Argument(help="JSON lines, a JSON array, Parquet or plain text; .gz as well")]
Format = Annotated[str | None, typer.Option("--format", help="the format, where it is not to be recognised")]
Kind = Annotated[
    str | None,
    typer.Option(help="documents, conversations, comparisons, rated, prompts or samples; default: what it holds"),
]
TokenizerDir = Annotated[
    Path | None,
    typer.Option("--tokenizer", help="directory of a tokenizer; default: one trained on the file"),
]
Template = Annotated[
    str | None, typer.Option(help="chat format by name: own, chatml, llama-2, llama-3, llama-3.1, chatglm or alpaca")
]
TrainOn = Annotated[str, typer.Option(help="all_rounds, last_round or marked")]
Number = Annotated[int, typer.Option("-n", "--number", help="how many records")]
Skip = Annotated[int, typer.Option(help="how many records to pass over first")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="leave bad rows out and count them")]


@app.command()
def show(
    file: File,
    format: Format = None,
    kind: Kind = None,
    number: Number = 5,
    skip: Skip = 0,
    json: Json = False,
) -> None:
    """Show the records of a file as this project reads them. Bad rows are passed over and counted."""
    from pipeline.data.sources import to_json

    result = _read(file, format, kind)
    records = result[skip : skip + number]
    if json:
        print_json(
            {
                "file": str(file),
                "format": result.format,
                "counts": result.counts,
                "records": [to_json(r) for r in records],
            }
        )
        return
    print(_headline(file, result))
    for record in records:
        print()
        print("\n".join(_readable(to_json(record))))


def _read(file: Path, format: str | None, kind: str | None) -> Read[Any]:
    from pipeline.data.sources import read

    result = read(file, kind, format=format, skip_bad=True)
    if result.bad:
        print(f"{len(result.bad)} bad rows are left out: rlhf data check {file} lists them", file=sys.stderr)
    return result


def _headline(file: Path, result: Read[Any]) -> str:
    counts = ", ".join(f"{n} {name}" for name, n in result.counts.items() if n or name in ("records", "bad"))
    return f"{file}: {result.format} ({counts})"


def _readable(record: dict[str, Any]) -> list[str]:
    lines = [f"-- {record['source']}"] if "source" in record else ["--"]
    for key, value in record.items():
        if key == "source":
            continue
        if key in ("messages", "prompt") and isinstance(value, list):
            lines += [f"{m['role']:>10}: {_said(m)}" for m in value]
        elif key == "completions":
            marks = [f"score {c['score']:g}" if "score" in c else f"rank {c.get('rank')}" for c in value]
            lines += [f"{mark:>10}: {c['text']}" for mark, c in zip(marks, value, strict=True)]
        else:
            lines.append(f"{key:>10}: {value}")
    return lines


def _said(message: dict[str, Any]) -> str:
    parts = [str(message["content"])] if "content" in message else []
    return " ".join([*parts, *(str(c.get("function", c)) for c in message.get("tool_calls", ()))])


@app.command()
def mask(
    file: File,
    tokenizer: TokenizerDir = None,
    template: Template = None,
    train_on: TrainOn = "all_rounds",
    format: Format = None,
    kind: Kind = None,
    number: Number = 3,
    skip: Skip = 0,
    json: Json = False,
) -> None:
    """Show the tokens of records: trained ones green, the others dim, with the round each belongs to."""
    result = _read(file, format, kind)
    chat = _chat(tokenizer, result, template)
    rendered = [(r, _render(chat, r, train_on)) for r in result[skip : skip + number]]
    if json:
        records = [{"source": getattr(r, "source", None), "tokens": _tokens(chat, pieces)} for r, pieces in rendered]
        print_json({"file": str(file), "format": result.format, "train_on": train_on, "records": records})
        return
    print(_headline(file, result))
    for record, pieces in rendered:
        _print_mask(chat, getattr(record, "source", None) or "", pieces)


def _chat(directory: Path | None, result: Read[Any], template: str | None = None) -> ChatFormat:
    from pipeline.data.chat import ChatFormat
    from pipeline.data.templates import template_named
    from pipeline.flow.errors import UserError
    from pipeline.llama.tokenizer import add_chat_tokens, train_tokenizer

    name = template_named(template or "own").name
    if directory is None:
        print("no --tokenizer: one of 2,048 tokens is trained on this file for the occasion", file=sys.stderr)
        return ChatFormat(train_tokenizer((t for r in result for t in _texts(r)), 2048, template=name))
    if not directory.is_dir():
        raise UserError(f"--tokenizer {directory}: no such directory")
    from pipeline.llama.open import open_tokenizer

    opened = open_tokenizer(directory)
    if template:
        add_chat_tokens(opened, name, replace=True)
    return ChatFormat(opened)


def _texts(record: Any) -> list[str]:
    """Every text of a record, for training a tokenizer."""
    from pipeline.data.template import message_text

    turns = [
        *getattr(record, "messages", ()),
        *(p if isinstance(p := getattr(record, "prompt", ()), tuple) else ()),
    ]
    texts = [message_text(m) for m in turns] + [c.text for c in getattr(record, "completions", ())]
    return [*texts, *(t for name in ("text", "completion") if (t := getattr(record, name, None)))]


def _render(chat: ChatFormat, record: Any, train_on: str) -> list[tuple[str, Rendered]]:
    """Named runs of tokens: a conversation is one run, a comparison its prompt and every completion."""
    from pipeline.data import records as kinds
    from pipeline.data.chat import Rendered

    def run(ids: list[int], trained: int) -> Rendered:
        return Rendered(ids, [trained] * len(ids), [-1] * len(ids))

    if isinstance(record, kinds.Conversation):
        return [("", chat.render(record, train_on))]
    if isinstance(record, kinds.Document):
        return [("", run(chat.document_ids(record), 1))]
    if isinstance(record, kinds.Prompt):
        return [("prompt", run(chat.prompt_ids(record.messages), 0))]
    if isinstance(record, kinds.Sample):
        prompt = run(chat.prompt_ids(record.prompt.messages), 0)
        return [("prompt", prompt), (f"sample {record.index}", run(list(record.ids), 1))]
    prompt = run(chat.prompt_ids(record.prompt), 0)
    if isinstance(record, kinds.Rated):
        name = "desirable" if record.desirable else "undesirable"
        return [("prompt", prompt), (name, run(chat.completion_ids(record.completion), 1))]
    answers = [
        (
            f"score {c.score:g}" if c.score is not None else f"rank {c.rank}",
            run(chat.completion_ids(c.text), 1),
        )
        for c in record.completions
    ]
    return [("prompt", prompt), *answers]


def _tokens(chat: ChatFormat, pieces: list[tuple[str, Rendered]]) -> list[dict[str, Any]]:
    return [
        {"id": i, "text": chat.tokenizer.decode([i]), "trained": bool(m), "round": r} | ({"part": name} if name else {})
        for name, rendered in pieces
        for i, m, r in zip(rendered.ids, rendered.mask, rendered.rounds, strict=True)
    ]


def _print_mask(chat: ChatFormat, source: str, pieces: list[tuple[str, Rendered]]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    tokens = sum(len(r) for _, r in pieces)
    console.print(f"\n-- {source}: {tokens} tokens, {sum(r.trained for _, r in pieces)} trained", markup=False)
    for name, rendered in pieces:
        text = Text(f"[{name}] " if name else "", style="bold")
        shown = None
        for token, round_number, trained in _runs(chat, rendered):
            if round_number != shown and round_number >= 0:
                text.append(f"\n[round {round_number}] ", style="bold cyan")
            shown = round_number
            text.append(token, style="green" if trained else "dim red")
        console.print(text)


def _runs(chat: ChatFormat, rendered: Rendered) -> list[tuple[str, int, int]]:
    """Neighbouring tokens of one colour and round, decoded together so that split characters show."""
    runs: list[tuple[list[int], int, int]] = []
    for i, m, r in zip(rendered.ids, rendered.mask, rendered.rounds, strict=True):
        if not runs or runs[-1][1:] != (r, m):
            runs.append(([], r, m))
        runs[-1][0].append(i)
    return [(chat.tokenizer.decode(ids, skip_special_tokens=False), r, m) for ids, r, m in runs]


@app.command()
def check(
    file: File,
    format: Format = None,
    kind: Kind = None,
    tokenizer: TokenizerDir = None,
    train_on: TrainOn = "all_rounds",
    max_tokens: Annotated[int | None, typer.Option(help="count the records that are longer")] = None,
    skip_bad: SkipBad = False,
    quarantine: Annotated[Path | None, typer.Option(help="write bad rows to this file")] = None,
    json: Json = False,
) -> None:
    """Check every row and list every problem with file and line. Exit code 2 where there is one."""
    from pipeline.data.sources import nothing, survey, tell

    result = survey(file, kind, format=format, quarantine=quarantine)
    tokens = None
    problems = [{"file": p.file, "line": p.line, "reason": p.reason, "message": p.message} for p in result.bad]
    if tokenizer is not None and result.records:
        tokens, untrained = _measure(_chat(tokenizer, result), result, train_on, max_tokens)
        problems += [{"file": str(file), "line": None, "reason": "nothing to train", "message": m} for m in untrained]
    if why := nothing(result):
        problems.append({"file": str(file), "line": None, "reason": "no record", "message": f"{file}: {why}"})
    if json:
        reasons: dict[str, int] = {}
        for p in problems:
            reasons[str(p["reason"])] = reasons.get(str(p["reason"]), 0) + 1
        document = {"file": str(file), "format": result.format, "counts": result.counts, "reasons": reasons}
        print_json({**document, "problems": problems, "tokens": tokens})
    else:
        print(_headline(file, result))
        for line in [*tell(result.bad), *(p["message"] for p in problems[len(result.bad) :])]:
            print(line)
        if result.reasons:
            print("bad rows: " + ", ".join(f"{n} {reason}" for reason, n in result.reasons.items()))
        if tokens:
            print("tokens: " + ", ".join(f"{name} {n}" for name, n in tokens.items()))
    if (problems and not skip_bad) or not result.records:
        raise typer.Exit(2)


def _measure(
    chat: ChatFormat, result: Read[Any], train_on: str, max_tokens: int | None
) -> tuple[dict[str, int], list[str]]:
    from pipeline.data.chat import NothingToTrain, require_trained
    from pipeline.data.records import Conversation

    lengths: list[int] = []
    trained = 0
    untrained: list[str] = []
    for record in result:
        pieces = [rendered for _, rendered in _render(chat, record, train_on)]
        lengths.append(sum(map(len, pieces)))
        trained += sum(p.trained for p in pieces)
        if isinstance(record, Conversation):
            try:
                require_trained(pieces[0])
            except NothingToTrain as error:
                untrained.append(str(error))
    lengths.sort()
    return {
        "records": len(lengths),
        "total": sum(lengths),
        "trained": trained,
        "shortest": lengths[0],
        "median": lengths[len(lengths) // 2],
        "longest": lengths[-1],
        "too_long": sum(n > max_tokens for n in lengths) if max_tokens else 0,
    }, untrained
