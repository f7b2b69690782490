"""Readers: files of any known format to lists of records, with every problem named in one pass.

    pairs = read_comparisons([Path("pairs.jsonl")])          # a Read: a sequence of Comparison
    pairs.format, pairs.counts                               # "hh", {"records": 1845, ...}

A source is an artifact (its `data_files` and `format`), a path, a list of paths, or a hub id
"hub:owner/name@split". A format is recognised from the keys of the first rows unless it is named. Preferences
can also be read as conversations (the best answer), prompts, or documents; conversations as documents.

Rows that cannot be used are all reported in one UserError. With `skip_bad` they are counted and written to
the quarantine file instead.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from pipeline.data.formats import FORMATS, Format, Record
from pipeline.data.lines import (
    Bad,
    Problem,
    Row,
    problem,
    read_rows,
    read_texts,
    table_row,
)
from pipeline.data.records import (
    Comparison,
    Conversation,
    Document,
    Prompt,
    Rated,
    Sample,
)
from pipeline.data.template import message_text
from pipeline.flow.artifacts import safe_member
from pipeline.flow.errors import UserError

KINDS = ("documents", "conversations", "comparisons", "rated", "prompts", "samples")
SHOWN_PROBLEMS = 50
_TEXT_ENDINGS = (".txt", ".md", ".text")
_DATA_ENDINGS = (".jsonl", ".json", ".parquet", ".txt")
_DETECT_ROWS = 100

T = TypeVar("T")


@dataclass
class Read(Sequence[T], Generic[T]):
    """What was read: a sequence of records, with what could not be used.

    counts: "records", "rows", "bad", and what else is worth knowing ("duplicates", "ties", "trailing user
    turns").
    """

    records: list[T]
    format: str
    bad: list[Problem] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows were bad for each reason, most frequent first."""
        return dict(Counter(p.reason for p in self.bad).most_common())

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[T]:
        return iter(self.records)


def read_documents(source: Any, **options: Any) -> Read[Document]:
    """Options of all readers: format=None, skip_bad=False, quarantine=None."""
    return read(source, "documents", **options)


def read_conversations(source: Any, **options: Any) -> Read[Conversation]:
    return read(source, "conversations", **options)


def read_comparisons(source: Any, **options: Any) -> Read[Comparison]:
    return read(source, "comparisons", **options)


def read_rated(source: Any, **options: Any) -> Read[Rated]:
    return read(source, "rated", **options)


def read_prompts(source: Any, **options: Any) -> Read[Prompt]:
    return read(source, "prompts", **options)


def read_samples(source: Any, **options: Any) -> Read[Sample]:
    return read(source, "samples", **options)


def read(
    source: Any,
    kind: str | None,
    *,
    format: str | None = None,
    skip_bad: bool = False,
    quarantine: Path | None = None,
) -> Read[Any]:
    """Records of `kind` (None: whatever the file holds). Raises UserError listing every row that is bad.

    Also raised: a file that is missing or not regular, an unknown format, no usable row at all.
    """
    result = survey(source, kind, format=format)
    if result.bad and not skip_bad:
        raise UserError(describe(result))
    if quarantine is not None and result.bad:
        _write_quarantine(quarantine, result.bad)
    if not result.records:
        outside = result.counts.get("outside the part", 0)
        why = f"{outside} lie outside the part {list(source.part)}" if outside else nothing(result)
        what = f"no usable {kind or 'record'}" + (f" ({why})" if why else "")
        raise UserError(f"{_label(source)}: {what}\n{describe(result, mend=not skip_bad)}".rstrip())
    return result


def nothing(result: Read[Any]) -> str:
    """Why there is no record; "" where there is one, or bad rows say it."""
    if result.records or result.bad:
        return ""
    rows = result.counts["rows"]
    return f"none of its {rows} rows gives a record" if rows else "empty: it holds no row"


def survey(source: Any, kind: str | None, *, format: str | None = None, quarantine: Path | None = None) -> Read[Any]:
    """As `read`, but bad rows are returned in `bad` and no row at all is no error."""
    if format is None and hasattr(source, "data_files"):
        format = source.format
    chosen = _named(format, kind) if format else None
    result: Read[Any] = Read([], "")
    counts: Counter[str] = Counter({"rows": 0})
    names: list[str] = []
    identities: dict[str, str] = {}
    for path in _paths(source):
        label = _read_one(path, kind, chosen, result, counts, identities)
        names += [label] if label not in names else []
    if part := getattr(source, "part", None):
        whole = len(result.records)
        result.records = [r for r in result.records if part[0] <= place(r) < part[1]]
        counts["outside the part"] = whole - len(result.records)
    result.format = "+".join(names)
    result.counts = {"records": len(result.records), "bad": len(result.bad), **counts}
    result.counts["rows"] += len(result.bad)
    if quarantine is not None and result.bad:
        _write_quarantine(quarantine, result.bad)
    return result


def place(record: Any) -> float:
    """Where a record stands in [0, 1): by a hash of its first turn (of its text), so that records of one prompt stay
    together and two parts of a file never share a prompt."""
    messages = getattr(record, "messages", None) or getattr(record, "prompt", None)
    first = next((m for m in messages if m.role == "user"), messages[0]) if messages else None
    text = message_text(first) if first else getattr(record, "text", "")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def describe(result: Read[Any], shown: int = SHOWN_PROBLEMS, mend: bool = True) -> str:
    """The problems as text: one `file:line: reason` a line, counts by reason, what mends it."""
    if not result.bad:
        return ""
    told = tell(result.bad)
    lines = told[:shown]
    if len(told) > shown:
        lines.append(f"... and {len(told) - shown} more")
    lines.append(
        f"{len(result.bad)} of {result.counts['rows']} rows cannot be used ("
        + ", ".join(f"{n} {reason}" for reason, n in result.reasons.items())
        + ")"
        + ("; mend them, or use --skip-bad to leave them out and keep them in a quarantine file" if mend else "")
    )
    return "\n".join(lines)


def tell(bad: Iterable[Problem]) -> list[str]:
    """One `file:line: reason` for every problem, but one in all for the rows of a file that are alike in format."""
    told: dict[Any, list[Problem]] = {}
    for i, p in enumerate(bad):
        told.setdefault((p.file, p.message) if p.reason in ("unknown format", "another kind") else i, []).append(p)
    below = " (rows below alike: {})"
    return [str(alike[0]) + (below.format(len(alike) - 1) if alike[1:] else "") for alike in told.values()]


# One file


def _read_one(
    path: Path | str,
    kind: str | None,
    chosen: Format | None,
    result: Read[Any],
    counts: Counter[str],
    identities: dict[str, str],
) -> str:
    """Append the records and problems of one file; returns the name of its format."""
    if isinstance(path, Path) and path.name.removesuffix(".gz").endswith(_TEXT_ENDINGS):
        if kind not in ("documents", None) or (chosen and chosen.name != "text"):
            raise UserError(f"{path}: a plain text file holds documents, but {kind} are wanted: give JSON lines")
        _read_text(path, result, counts)
        return "plain text"
    rows = _hub_rows(path) if isinstance(path, str) else read_rows(path)
    held: list[Row | Problem] = []
    for row in rows:
        held.append(row)
        if chosen is None and isinstance(row, Row):
            chosen = detect(row.value, kind)
        if chosen is not None or len(held) >= _DETECT_ROWS:
            break
    convert = _converter(chosen, kind)
    seen: set[int] = set()
    name = path.name if isinstance(path, Path) else path.removeprefix("hub:")
    for row in _chain(held, rows):
        if isinstance(row, Problem):
            result.bad.append(row)
            continue
        try:
            records = convert(row.value, f"{name}:{row.line}")
            _count(records, f"{path}:{row.line}", counts, identities)
        except Bad as bad:
            text = row.text or json.dumps(row.value, ensure_ascii=False, default=str)
            result.bad.append(problem(path, row.line, bad, text))
            continue
        result.records.extend(records)
        counts["rows"] += 1
        if row.text:
            counts["duplicates"] += hash(row.text) in seen
            seen.add(hash(row.text))
    return chosen.name if chosen else "unknown"


def _chain(held: list[Row | Problem], rows: Iterator[Row | Problem]) -> Iterator[Row | Problem]:
    yield from held
    yield from rows


def _read_text(path: Path, result: Read[Any], counts: Counter[str]) -> None:
    for piece in read_texts(path):
        if isinstance(piece, Problem):
            result.bad.append(piece)
        else:
            result.records.append(Document(piece[1], source=f"{path.name}:{piece[0]}"))
            counts["rows"] += 1


def _count(records: Iterable[Record], where: str, counts: Counter[str], identities: dict[str, str]) -> None:
    for record in records:
        if isinstance(record, Conversation):
            counts["trailing user turns"] += record.messages[-1].role != "assistant"
        elif isinstance(record, Comparison):
            counts["ties"] += record.ties()
        elif isinstance(record, Prompt):
            first = identities.setdefault(record.id, where)
            if first != where:
                raise Bad("id used twice", f"{record.id!r} is also the id of {first}")


# Formats


def detect(row: dict[str, Any], kind: str | None = None) -> Format | None:
    """The format that a row's keys speak for, among those that can give `kind`."""
    native = [f for f in FORMATS if kind is None or f.kind == kind]
    other = [f for f in FORMATS if kind is not None and (f.kind, kind) in _CONVERSIONS]
    return next((f for f in (*native, *other) if f.matches(row)), None)


def _named(name: str, kind: str | None) -> Format:
    able = [f for f in FORMATS if kind is None or f.kind == kind or (f.kind, kind) in _CONVERSIONS]
    own = {"conversations": "messages", "documents": "text"}
    aliases = {"openai": "messages", "plain text": "text", "own": own.get(kind or "", kind or "")}
    chosen = next((f for f in able if f.name == aliases.get(name, name)), None)
    if chosen is None:
        known = ", ".join(f.name for f in able)
        raise UserError(f"format {name!r} is not known for {kind or 'records'}: one of {known}")
    return chosen


def _converter(chosen: Format | None, kind: str | None) -> Callable[[dict[str, Any], str], Iterable[Record]]:
    if chosen is None:
        return _unknown(kind)
    if kind is None or chosen.kind == kind:
        return chosen.convert
    change = _CONVERSIONS[(chosen.kind, kind)]
    first = chosen.convert
    return lambda row, source: [change(record) for record in first(row, source)]


def _unknown(kind: str | None) -> Callable[[dict[str, Any], str], Iterable[Record]]:
    def refuse(row: dict[str, Any], source: str) -> Iterable[Record]:
        other = detect(row) if kind else None
        if other is not None:
            held = other.kind if other.name == other.kind else f"{other.kind} ({other.name})"
            raise Bad("another kind", f"this file holds {held}, but {kind} are wanted")
        raise Bad("unknown format", f"no known format has the keys {', '.join(sorted(row)[:12]) or '(none)'}")

    return refuse


def _best(comparison: Any) -> Conversation:
    from pipeline.data.records import Message

    worth = comparison.worth()
    text = comparison.completions[worth.index(max(worth))].text
    return Conversation((*comparison.prompt, Message("assistant", text)), source=comparison.source)


def _dialogue(record: Any) -> Document:
    return Document(messages=record.messages, source=record.source)


_CONVERSIONS: dict[tuple[str, str], Callable[[Any], Record]] = {
    ("comparisons", "conversations"): _best,
    ("comparisons", "documents"): lambda c: _dialogue(_best(c)),
    ("comparisons", "prompts"): lambda c: Prompt(c.source or "", c.prompt, c.source),
    ("rated", "prompts"): lambda r: Prompt(r.source or "", r.prompt, r.source),
    ("conversations", "documents"): _dialogue,
}


# Where rows come from


def _paths(source: Any) -> list[Path | str]:
    found = getattr(source, "data_files", None)
    items = list(found) if found is not None else list(source) if isinstance(source, (list, tuple)) else [source]
    out: list[Path | str] = []
    for item in items:
        if isinstance(item, str) and item.startswith("hub:"):
            out.append(item)
            continue
        path = Path(item)
        if path.is_dir():
            names = sorted(p.name for p in path.iterdir() if p.name.removesuffix(".gz").endswith(_DATA_ENDINGS))
            inside = [safe_member(path, name) for name in names]
            if odd := [p for p in inside if not p.is_file()]:
                raise UserError(f"{odd[0]}: not a regular file")
            out += inside
        elif path.is_file():
            out.append(path)
        else:
            raise UserError(f"{path}: " + ("not a regular file" if path.exists() else "no such file"))
    if not out:
        raise UserError(f"{_label(source)}: no data file there")
    return out


def _label(source: Any) -> str:
    files = getattr(source, "locations", None)  # of a user, who named them one by one
    return ", ".join(map(str, files)) if files else str(getattr(source, "path", source))


def _hub_rows(name: str) -> Iterator[Row | Problem]:
    """Rows of a hub data set, "hub:owner/name[:config][@split]", split train unless named."""
    import datasets

    where, _, split = name.removeprefix("hub:").partition("@")
    repository, _, config = where.partition(":")
    try:
        table = datasets.load_dataset(repository, config or None, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{name}: cannot be fetched or opened: {error}") from error
    for number, value in enumerate(table, 1):
        yield table_row(name, number, dict(value))


# Writing


def to_json(record: Any) -> dict[str, Any]:
    """The record as a JSON object of our own format; empty and absent fields are left out."""
    if isinstance(record, dict):
        return record
    return {k: _plain(v) for k, v in _fields(record) if v is not None and v != () and v != {}}


def _fields(record: Any) -> Iterator[tuple[str, Any]]:
    return ((name, getattr(record, name)) for name in record.__dataclass_fields__)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_json(value)
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def to_line(record: Any) -> str:
    """The record as one line of JSON, its end included. ValueError where a number is not finite."""
    return json.dumps(to_json(record), ensure_ascii=False, allow_nan=False) + "\n"


def write_jsonl(path: Path, records: Iterable[Any]) -> int:
    """One record a line, UTF-8, in order; returns how many."""
    number = 0
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for record in records:
            stream.write(to_line(record))
            number += 1
    return number


def _write_quarantine(path: Path, problems: Iterable[Problem]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for p in problems:
            row = {k: v for k, v in asdict(p).items() if k != "reason"}
            stream.write(json.dumps({**row, "reason": p.reason}, ensure_ascii=False) + "\n")
