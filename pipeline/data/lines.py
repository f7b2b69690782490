"""Files to raw rows, strictly: one JSON object a line (or one JSON array), Parquet, or plain text.

Strict means: UTF-8 without a byte-order mark, no NUL, no duplicate keys, no NaN or Infinity, no lone
surrogate, at most 16 MiB and 64 levels a row; an array or a plain text has at most 2 GiB. CRLF is accepted.
What breaks a rule becomes a `Problem` with file, line and reason, and reading goes on with the next row.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

MAX_ROW_BYTES = 16 * 2**20
MAX_FILE_BYTES = 2 * 2**30  # of a file that is read at once, unpacked
MAX_DEPTH = 64
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # one that is not closed ends with the row
_BETWEEN = re.compile(r"[ \t\n\r]*(,?)[ \t\n\r]*(\]?)[ \t\n\r]*")
_ESCAPE_TO_CHECK = re.compile(rb"\\u(?:[dD][89a-fA-F]|0000)")


class Bad(Exception):
    """Why a row cannot be used: a `reason` that is counted, and a `detail` that is shown."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that cannot be used."""

    file: str
    line: int
    reason: str  # the kind, as counted
    message: str  # the kind with its particulars
    row: str = field(default="", repr=False)  # what stood there, for the quarantine file

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclass(frozen=True, slots=True)
class Row:
    """A parsed row: the object, its line in the file, and the text it came from."""

    line: int
    value: dict[str, Any]
    text: str | bytes = field(repr=False)


def read_rows(path: Path) -> Iterator[Row | Problem]:
    """Rows of a .jsonl, .json or .parquet file; .gz as well. Lines count from 1, Parquet rows too."""
    last = 0
    try:
        for row in _rows(path):
            last = row.line
            yield row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield Problem(str(path), last + 1, "damaged gzip", f"damaged gzip: {error}")


def _rows(path: Path) -> Iterator[Row | Problem]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        yield from _parquet_rows(path)
        return
    if name.endswith((".csv", ".tsv")):
        yield Problem(str(path), 1, "a table as text", "a table as text is not read: save it as JSON lines or Parquet")
        return
    with open_binary(path) as stream:
        first = stream.read(64)
    if first.startswith(_UTF16_BOMS):
        yield Problem(str(path), 1, "UTF-16", "UTF-16: save the file as UTF-8")
    elif name.endswith(".json") and first.removeprefix(_UTF8_BOM).lstrip()[:1] == b"[":
        yield from _array_rows(path)
    else:
        yield from _line_rows(path)


def open_binary(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _whole(path: Path) -> bytes:
    """All of a file. Bad where it is too large: a few megabytes can be packed terabytes."""
    held = io.BytesIO()
    with open_binary(path) as stream:
        while part := stream.read(2**20):
            held.write(part)
            if held.tell() > MAX_FILE_BYTES:
                raise Bad("file too large", f"more than {MAX_FILE_BYTES / 2**30:g} GiB; split it, or give JSON lines")
    return held.getvalue()


def _line_rows(path: Path) -> Iterator[Row | Problem]:
    with open_binary(path) as stream:
        for number, raw in _lines(stream):
            try:
                if raw is None:
                    raise Bad("row too long", f"more than {MAX_ROW_BYTES // 2**20} MiB")
                yield Row(number, parse_object(raw), raw)
            except Bad as bad:
                yield problem(path, number, bad, raw or b"")


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """(line number, line without its end), None for a line over the cap, which is passed over unread."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 2):
        number += 1
        if line.endswith(b"\n") or len(line) <= MAX_ROW_BYTES:
            yield number, line.removesuffix(b"\n").removesuffix(b"\r")
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_ROW_BYTES)
        yield number, None


def parse_object(raw: bytes) -> dict[str, Any]:
    """One JSON object, or Bad."""
    if not raw.strip():
        raise Bad("empty line" if not raw else "white space only")
    if raw.lstrip().startswith(_UTF8_BOM):
        raise Bad("byte-order mark", "save as UTF-8 without BOM")
    if b"\0" in raw:
        raise Bad("NUL byte", "is the file UTF-16?" if raw.count(b"\0") * 3 > len(raw) else "")
    check_depth(raw)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Bad("invalid UTF-8", f"byte {error.start + 1} of the line") from None
    value = _loads(text)
    if not isinstance(value, dict):
        raise Bad("not an object", f"the row is {json_type(value)}, expected an object in braces")
    if _ESCAPE_TO_CHECK.search(raw):
        check_characters(value)
    return value


def _loads(text: str) -> Any:
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _json_problem(text, error) from None
    except RecursionError:
        raise Bad("nested too deeply", f"more than {MAX_DEPTH} levels") from None
    except ValueError as error:  # an integer of thousands of digits
        raise Bad("invalid JSON", str(error)) from None


def _json_problem(text: str, error: json.JSONDecodeError) -> Bad:
    at = f"column {error.pos + 1}"
    rest = text[error.pos :].lstrip()
    if error.msg == "Extra data":
        return Bad("two values on a line", at)
    if re.search(r",\s*$", text[: error.pos].rstrip() + ("," if rest[:1] == "," else "")) and rest[:1] in "]},":
        return Bad("trailing comma", at)
    if not rest or error.msg.startswith("Unterminated string"):
        return Bad("truncated JSON", f"the line ends inside a value, {at}")
    if rest.startswith("'"):
        return Bad("single quotes", f"JSON needs double quotes, {at}")
    if re.match(r",\s*[\]}]", rest) or (error.msg.startswith("Illegal trailing comma")):
        return Bad("trailing comma", at)
    return Bad("invalid JSON", f"{error.msg}, {at}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise Bad("duplicate key", repr(twice))
    return value


def _no_constant(name: str) -> Any:
    raise Bad("not a number", f"{name} is not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
"""Raises Bad for duplicate keys, NaN and Infinity; ValueError and RecursionError as any decoder does."""


def check_depth(raw: bytes) -> None:
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _depth(raw) > MAX_DEPTH:
        raise Bad("nested too deeply", f"more than {MAX_DEPTH} levels")


def _depth(raw: bytes) -> int:
    depth = deepest = 0
    for bracket in re.findall(rb"[\[\]{}]", _STRING.sub(b"", raw)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def check_characters(value: Any) -> None:
    """Raises Bad for what JSON escapes can spell and a tokenizer cannot take: lone surrogates and NUL."""
    text = json.dumps(value, ensure_ascii=False, default=str)  # tables hold dates, decimals and bytes as well
    if "\\u0000" in text and re.search(r"(?<!\\)(?:\\\\)*\\u0000", text):
        raise Bad("NUL byte", "\\u0000 in a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Bad("lone surrogate", f"\\u{ord(text[error.start]):04x} is half a character") from None


def _array_rows(path: Path) -> Iterator[Row | Problem]:
    """Elements of one JSON array, each with the line it starts on. After a syntax error the rest is
    unreadable."""
    try:
        raw = _whole(path)
    except Bad as bad:
        yield problem(path, 1, bad)
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield Problem(str(path), line, "invalid UTF-8", f"invalid UTF-8: byte {error.start + 1} of the file")
        return
    if raw.startswith(_UTF8_BOM):
        yield Problem(str(path), 1, "byte-order mark", "byte-order mark: save as UTF-8 without BOM")
    at, line, counted, first = text.index("[") + 1, 1, 0, True
    while between := _BETWEEN.match(text, at):
        at = between.end()
        line += text.count("\n", counted, at)
        counted = at
        if between.groups() == ("", "]") and at == len(text):
            return
        try:
            value, end = _decode_element(text, between, first)
        except Bad as bad:
            message = f"{bad} (the rest of the file cannot be read)"
            yield Problem(str(path), line, bad.reason, message, text[at : at + 2000])
            return
        yield _element(path, line, value, text[at:end])
        at, first = end, False


def _decode_element(text: str, between: re.Match[str], first: bool) -> tuple[Any, int]:
    """The element that follows, and where it ends. Raises Bad for a wrong comma and for what follows the array."""
    comma, closed = between.groups()
    if closed:
        raise Bad("trailing comma") if comma else Bad("text after the array", "a .json file holds one array")
    if between.end() == len(text):
        raise Bad("truncated JSON", "the array is not closed")
    if bool(comma) == first:
        raise Bad("invalid JSON", "expected one comma between two elements and none before the first")
    try:
        return DECODER.raw_decode(text, between.end())
    except RecursionError:
        raise Bad("nested too deeply", f"more than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise Bad("invalid JSON", str(error)) from None


def _element(path: Path, line: int, value: Any, text: str) -> Row | Problem:
    try:
        if not isinstance(value, dict):
            raise Bad("not an object", f"the element is {json_type(value)}, expected an object in braces")
        check_depth(text.encode("utf-8"))
        if "\\u" in text:
            check_characters(value)
        return Row(line, value, text)
    except Bad as bad:
        return problem(path, line, bad, text)


def _parquet_rows(path: Path) -> Iterator[Row | Problem]:
    import pyarrow
    import pyarrow.parquet as parquet

    number, reason = 0, "not Parquet"
    try:
        table = parquet.ParquetFile(path)
        reason = "damaged Parquet"
        for batch in table.iter_batches():
            for value in batch.to_pylist():
                number += 1
                yield table_row(path, number, value)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        yield Problem(str(path), number + 1, reason, f"{reason}: {' '.join(str(error).split())}")


def table_row(table: Path | str, number: int, value: dict[str, Any]) -> Row | Problem:
    """A table's row as an object: absent fields of nested structs are null there and are left out here."""
    row = _without_nulls(value)
    try:
        check_characters(row)
        return Row(number, row, "")
    except Bad as bad:
        return problem(table, number, bad)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def read_texts(path: Path) -> Iterator[tuple[int, str] | Problem]:
    """(line, text) of the documents in a plain text file.

    Split at <|endoftext|> where the file has it; otherwise paragraphs (separated by blank lines) are gathered
    in order into documents of up to 2,000 characters, so that neighbouring paragraphs stay together. Line
    ends become "\\n".
    """
    try:
        raw = _whole(path)
    except Bad as bad:
        yield problem(path, 1, bad)
        return
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield Problem(str(path), 1, "damaged gzip", f"damaged gzip: {error}")
        return
    if raw.startswith(_UTF16_BOMS):
        yield Problem(str(path), 1, "UTF-16", "UTF-16: save the file as UTF-8")
        return
    try:
        text = raw.decode("utf-8").replace("\r\n", "\n").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield Problem(str(path), line, "invalid UTF-8", f"invalid UTF-8: byte {error.start + 1} of the file")
        return
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        yield Problem(str(path), line, "NUL byte", "NUL byte: is this a text file?")
        return
    marker = "<|endoftext|>"
    yield from (
        _gather(_pieces(text, re.compile(re.escape(marker))), 0)
        if marker in text
        else _gather(_pieces(text, re.compile(r"\n(?:[^\S\n]*\n)+")), 2000)
    )


def _pieces(text: str, separator: re.Pattern[str]) -> Iterator[tuple[int, str]]:
    line, at = 1, 0
    for match in [*separator.finditer(text), None]:
        end = match.start() if match else len(text)
        piece = text[at:end]
        body = piece.strip("\n")
        if body.strip():
            yield line + len(piece) - len(piece.lstrip("\n")), body
        if match:
            line += text.count("\n", at, match.end())
            at = match.end()


def _gather(pieces: Iterable[tuple[int, str]], limit: int) -> Iterator[tuple[int, str]]:
    start, size = 0, 0
    held: list[str] = []
    for line, piece in pieces:
        if held and size + len(piece) > limit:
            yield start, "\n\n".join(held)
            held, size = [], 0
        start = start if held else line
        held.append(piece)
        size += len(piece) + 2
    if held:
        yield start, "\n\n".join(held)


def problem(path: Path | str, line: int, bad: Bad, row: str | bytes = "") -> Problem:
    text = row if isinstance(row, str) else row.decode("utf-8", errors="backslashreplace")
    return Problem(str(path), line, bad.reason, str(bad), text)


def json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value)) or (
        "a number" if isinstance(value, (int, float)) else f"of type {type(value).__name__}"
    )
