"""Rows of files: every malformed row is named with file, line and reason, alone and all in one file."""

from __future__ import annotations

import gzip
import json
import time
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest

from pipeline.data import lines
from pipeline.data.lines import MAX_ROW_BYTES, Problem, Row, read_rows, read_texts
from pipeline.data.sources import read_conversations, survey
from pipeline.flow.errors import UserError

GOOD = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def turns(*pairs: tuple[str, object]) -> bytes:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in pairs]}).encode()


MALFORMED = {
    "empty line": b"",
    "white space only": b"  \t ",
    "byte-order mark": b"\xef\xbb\xbf" + GOOD,
    "invalid UTF-8": GOOD.replace(b'"a"', b'"\xff\xfe"'),
    "NUL byte": GOOD.replace(b'"a"', b'"\0"'),
    "truncated JSON": GOOD[:40],
    "trailing comma": GOOD[:-1] + b",}",
    "single quotes": GOOD.replace(b'"', b"'"),
    "two values on a line": GOOD + GOOD,
    "not an object": b"[" + GOOD + b"]",
    "not a number": GOOD[:-1] + b', "x": NaN}',
    "duplicate key": GOOD[:-1] + b', "messages": []}',
    "missing messages": b'{"id": 3}',
    "messages is not a list": b'{"messages": "a"}',
    "messages is empty": b'{"messages": []}',
    "turn is not an object": b'{"messages": ["a"]}',
    "missing role": b'{"messages": [{"content": "a"}]}',
    "unknown role": turns(("wizard", "a"), ("assistant", "b")),
    "missing content": b'{"messages": [{"role": "user"}]}',
    "content is null": turns(("user", "a"), ("assistant", None)),
    "content has the wrong type": turns(("user", 3), ("assistant", "b")),
    "same role twice in a row": turns(("user", "a"), ("user", "b"), ("assistant", "c")),
    "no assistant turn": turns(("system", "s"), ("user", "a")),
    "only a system turn": turns(("system", "s")),
    "empty assistant": turns(("user", "a"), ("assistant", " \n")),
    "lone surrogate": GOOD.replace(b'"a"', b'"\\ud800"'),
    "row too long": b'{"messages": "' + b"x" * MAX_ROW_BYTES + b'"}',
    "nested too deeply": b"[" * 100_000,
    "system turn is not first": turns(("user", "a"), ("system", "s")),
    "turns out of order": turns(("assistant", "a"), ("user", "b")),
}
FURTHER = [
    ("not an object", b"7"),
    ("not an object", b"null"),
    ("not a number", GOOD[:-1] + b', "x": -Infinity}'),
    ("NUL byte", GOOD.replace(b'"a"', b'"\\u0000"')),
    ("trailing comma", GOOD.replace(b"}]", b"},]")),
    ("truncated JSON", GOOD[:-1]),
    ("truncated JSON", b"{"),
    ("nested too deeply", b'{"x": ' * 70 + b"1" + b"}" * 70),
    ("byte-order mark", b"  \xef\xbb\xbf{}"),
    ("invalid JSON", b"hello"),
    ("unsupported part", turns(("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", "b"))),
    ("turns out of order", turns(("user", "a"), ("tool", "b"), ("assistant", "c"))),
    ("same role twice in a row", turns(("user", "a"), ("assistant", "b"), ("assistant", "c"))),
]


@pytest.mark.parametrize(("reason", "row"), [*MALFORMED.items(), *FURTHER], ids=lambda x: str(x)[:24])
def test_each_malformed_row_is_named(tmp_path: Path, reason: str, row: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + row + b"\n" + GOOD + b"\n")
    with pytest.raises(UserError) as caught:
        read_conversations(path, format="messages")
    first = str(caught.value).splitlines()[0]
    assert first.startswith(f"{path}:2: {reason}")
    assert caught.value.exit_code == 2
    left = read_conversations(path, format="messages", skip_bad=True)
    assert len(left) == 2
    assert [(p.line, p.reason) for p in left.bad] == [(2, reason)]


def test_a_table_is_one_problem(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\nq,a,b\n")
    (problem,) = read_rows(tmp_path / "pairs.csv")
    assert isinstance(problem, Problem) and problem.message.endswith("save it as JSON lines or Parquet")


def test_all_malformed_rows_in_one_pass(tmp_path: Path) -> None:
    path, quarantine = tmp_path / "rows.jsonl", tmp_path / "deep" / "bad.jsonl"
    path.write_bytes(b"".join(row + b"\n" + GOOD + b"\n" for row in MALFORMED.values()))
    left = read_conversations(path, skip_bad=True, quarantine=quarantine)
    assert [p.reason for p in left.bad] == list(MALFORMED)
    assert [p.line for p in left.bad] == list(range(1, 2 * len(MALFORMED), 2))
    assert (left.counts["records"], left.counts["rows"]) == (len(MALFORMED), 2 * len(MALFORMED))
    assert left.reasons == dict.fromkeys(MALFORMED, 1)
    kept = [json.loads(line) for line in quarantine.read_text(encoding="utf-8").splitlines()]
    assert [k["reason"] for k in kept] == list(MALFORMED)
    assert kept[7]["row"].encode() == MALFORMED["single quotes"]
    with pytest.raises(UserError) as caught:
        read_conversations(path)
    told = str(caught.value)
    assert all(f"{path}:{p.line}: {reason}" in told for p, reason in zip(left.bad, MALFORMED, strict=True))
    assert f"{len(MALFORMED)} of {2 * len(MALFORMED)} rows cannot be used" in told and "--skip-bad" in told


def test_long_lists_of_problems_are_cut_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + b"{\n" * 200)
    with pytest.raises(UserError, match=r"and 150 more\n200 of 201 rows cannot be used \(200 truncated JSON\)"):
        read_conversations(path)


def test_utf16_is_one_problem(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes((GOOD + b"\n").decode().encode("utf-16"))
    with pytest.raises(UserError, match="rows.jsonl:1: UTF-16: save the file as UTF-8"):
        read_conversations(path)


def test_crlf_and_a_last_line_without_end_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\r\n" + GOOD)
    assert len(read_conversations(path)) == 2


def test_a_trailing_user_turn_is_legal_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(turns(("user", "a"), ("assistant", "b"), ("user", "c")) + b"\n")
    assert read_conversations(path).counts["trailing user turns"] == 1


def test_a_byte_order_mark_inside_a_text_is_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD.decode().replace('"a"', '"a\ufeffb"') + "\n", encoding="utf-8")
    assert read_conversations(path)[0].messages[0].content == "a\ufeffb"


def test_lines_after_an_overlong_one_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * (3 * MAX_ROW_BYTES) + b"\n" + GOOD + b"\n")
    rows = list(read_rows(path))
    assert isinstance(rows[0], Problem) and rows[0].reason == "row too long" and rows[0].row == ""
    assert isinstance(rows[1], Row) and rows[1].line == 2


@pytest.mark.parametrize("ending", [b'"', b""])
def test_a_row_of_quotes_is_read_in_time(tmp_path: Path, ending: bytes) -> None:
    """Brackets enough to be counted, then escaped quotes in a string that need not end: looked at once each."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": ' + b"[" * 65 + b'"' + b'\\"' * 2**20 + ending + b"\n")
    began = time.monotonic()
    (found,) = read_rows(path)
    assert time.monotonic() - began < 10
    assert isinstance(found, Problem) and found.reason == "nested too deeply"


@pytest.mark.parametrize("name", ["big.json", "big.json.gz", "big.txt", "big.txt.gz"])
def test_what_is_read_at_once_is_bounded_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(lines, "MAX_FILE_BYTES", 2**21)
    read_all = read_texts if "txt" in name else read_rows
    pack = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(pack(b"[" + b" " * 2**21))
    (found,) = read_all(tmp_path / name)
    assert isinstance(found, Problem) and found.message == (
        "file too large: more than 0.00195312 GiB; split it, or give JSON lines"
    )


def test_arrays_name_the_line_of_each_element(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b"[\n" + GOOD + b",\n7,\n\n" + GOOD + b'\n,{"a": \n[NaN]}]')
    rows = list(read_rows(path))
    assert [r.line for r in rows] == [2, 3, 5, 6]
    assert [getattr(r, "reason", "") for r in rows] == ["", "not an object", "", "not a number"]
    path.write_bytes(b"[" + GOOD + b",\n" + GOOD)
    assert [getattr(r, "reason", "") for r in read_rows(path)] == ["", "", "truncated JSON"]


ONE = b'{"prompt": "a"}'


@pytest.mark.parametrize(
    ("raw", "line", "reason"),
    [
        (b"[" + ONE + b"]\n[" + ONE + b"," + ONE + b"]", 2, "text after the array"),
        (b"[" + ONE + b"] garbage", 1, "text after the array"),
        (b"[" + ONE + b"\n" + ONE + b"]", 2, "invalid JSON"),
        (b"[" + ONE + b",\n, " + ONE + b"]", 2, "invalid JSON"),
        (b"[" + ONE + b",\n]", 2, "trailing comma"),
        (b"[" + ONE + b',\n{"x": ' + b"1" * 5000 + b"}]", 2, "invalid JSON"),
        (b"[" + ONE + b",\n" + b"[" * 100_000 + b"]", 2, "nested too deeply"),
        (b"[" + ONE + b',\n{"x": NaN}]', 2, "not a number"),
    ],
)
def test_what_breaks_an_array_is_one_problem(tmp_path: Path, raw: bytes, line: int, reason: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(raw)
    row, problem = read_rows(path)
    assert isinstance(row, Row) and row.value == {"prompt": "a"}
    assert isinstance(problem, Problem) and (problem.line, problem.reason) == (line, reason)
    assert problem.message.startswith(reason) and "(the rest of the file cannot be read)" in problem.message


def test_arrays_may_be_empty_and_spaced_but_begin_with_no_comma(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b"[ ]\r\n")
    assert list(read_rows(path)) == []
    path.write_bytes(b" [\n" + ONE + b"\t,\n\n" + ONE + b" ] \n\n")
    assert [(type(r), r.line) for r in read_rows(path)] == [(Row, 2), (Row, 4)]
    path.write_bytes(b"[, " + ONE + b"]")
    assert [getattr(r, "reason", "") for r in read_rows(path)] == ["invalid JSON"]


def test_compressed_files_and_damaged_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress((GOOD + b"\n") * 500))
    assert len(read_conversations(path)) == 500
    path.write_bytes(path.read_bytes()[:-20])
    assert "damaged gzip" in read_conversations(path, skip_bad=True).reasons


def test_tables(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    rows = [json.loads(GOOD), {"messages": [{"role": "user", "content": "x", "name": "n"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    left = read_conversations(tmp_path / "rows.parquet", skip_bad=True)
    assert (len(left), [p.line for p in left.bad]) == (1, [2])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not Parquet"):
        read_conversations(tmp_path / "bad.parquet")


def test_tables_may_hold_what_json_does_not(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    path = tmp_path / "rows.parquet"
    unused = {"when": datetime(2024, 5, 1), "raw": b"\xff", "price": Decimal("1.5")}
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a", **unused}, {"prompt": "b\0", **unused}]), path)
    row, bad = read_rows(path)
    assert isinstance(row, Row) and row.value == {"prompt": "a", **unused}
    assert isinstance(bad, Problem) and (bad.line, bad.reason) == (2, "NUL byte")
    parquet.write_table(pyarrow.table({"prompt": [b"a"]}), path)
    left = survey(path, None, quarantine=tmp_path / "bad.jsonl")
    assert [str(p) for p in left.bad] == [
        f"{path}:1: prompt has the wrong type: prompt is of type bytes, expected a string or a list"
    ]
    assert json.loads((tmp_path / "bad.jsonl").read_text())["row"] == """{"prompt": "b'a'"}"""


def test_a_damaged_page_of_a_table_names_the_file(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a"] * 5000}), path)
    raw = bytearray(path.read_bytes())
    raw[4:40] = b"\xff" * 36  # the first page's header, after the four bytes that mark the format
    path.write_bytes(raw)
    (problem,) = read_rows(path)
    assert isinstance(problem, Problem) and str(problem).startswith(f"{path}:1: damaged Parquet: ")
    assert "\n" not in str(problem)


def test_plain_text_by_marker_or_by_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\r\ntwo<|endoftext|>\nthree\n<|endoftext|>\n \n")
    assert list(read_texts(path)) == [(1, "one\n\ntwo"), (4, "three")]
    path.write_text("\n\nA\nb\n\n \nC\n\n" + "d" * 1999 + "\n\nE")
    assert list(read_texts(path)) == [(3, "A\nb\n\nC"), (9, "d" * 1999), (11, "E")]
    path.write_bytes(b"ok\n\xff\n")
    (problem,) = read_texts(path)
    assert str(problem) == f"{path}:2: invalid UTF-8: byte 4 of the file"
