"""Whole runs of a plan of trivial stages: what is executed, what is reused, and how a run ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from toy_stages import TABLE

from pipeline.flow.errors import Damaged, Locked, NonFinite, RowFailed, UserError
from pipeline.flow.plan import load_plan
from pipeline.flow.runner import (
    Again,
    Interrupted,
    Listener,
    RowResult,
    Runner,
    RunResult,
    environment_differences,
    read_summary,
)
from pipeline.flow.stage import has_kernel
from pipeline.flow.store import Store, read_rows

PLAN = """
launch: {preload: false, threads: 1}
sources:
  text: {kind: documents, path: text.txt}
  pairs: {kind: comparisons, path: pairs.jsonl}
rows:
  - first: {documents: text}
  - second: {documents: first.documents}
  - pair: {documents: second.documents, comparisons: pairs}
  - second@2: {documents: pair.documents}
  - last: {documents: [second.documents, second@2.documents]}
"""
ROWS = ["first", "second", "pair", "second@2", "last"]


class Heard(Listener):
    """Everything a run says, as lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def row_started(self, row: str, stage: str, fingerprint: str, why: str) -> None:
        self.lines.append(f"{row} started: {why}")

    def row_reused(self, result: RowResult) -> None:
        self.lines.append(f"{result.row} reused")

    def row_done(self, result: RowResult) -> None:
        self.lines.append(f"{result.row} done")

    def row_failed(self, result: RowResult, message: str) -> None:
        self.lines.append(f"{result.row} failed")

    def progress(self, row: str, done: float, total: float | None, unit: str, figures: Mapping[str, Any]) -> None:
        self.lines.append(f"{row} {done}/{total} {unit} {sorted(figures)}")

    def said(self, row: str, text: str) -> None:
        self.lines.append(f"{row} said: {text}")


class Place:
    """A directory with a plan, its two files, a store and a run directory."""

    def __init__(self, root: Path) -> None:
        self.root, self.run_dir, self.heard = root, root / "runs" / "toy", Heard()
        (root / "text.txt").write_text("text ")
        (root / "pairs.jsonl").write_text("pairs ")
        (root / "plan.yaml").write_text(PLAN)

    def runner(self, *sets: str) -> Runner:
        self.heard = Heard()
        return Runner(
            lambda: load_plan(self.root / "plan.yaml", list(sets), TABLE),
            Store(self.root / "store"),
            self.run_dir,
            self.heard,
        )

    def run(self, *sets: str, first: str | None = None, last: str | None = None) -> RunResult:
        return self.runner(*sets).run(first, last)

    def file_of(self, row: str) -> Path:
        return Store(self.root / "store").row_dir(read_rows(self.run_dir)[row]) / "documents" / "data.jsonl"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, RunResult]:
    """A run to the end; tests look at it or copy it."""
    made = Place(tmp_path_factory.mktemp("finished"))
    return made, made.run()


@pytest.fixture
def done(finished: tuple[Place, RunResult], tmp_path: Path) -> Place:
    """A copy of the finished run, to change: content decides, not where things lie."""
    shutil.copytree(finished[0].root, tmp_path / "copy")
    return Place(tmp_path / "copy")


def statuses(result: RunResult) -> dict[str, str]:
    return {row.row: row.status for row in result.rows}


def test_what_is_sealed_is_recorded_while_the_run_goes_on(place: Place) -> None:
    seen = []

    class Watch(Heard):
        def row_started(self, row: str, stage: str, fingerprint: str, why: str) -> None:
            summary = read_summary(place.run_dir)
            rows = [r["row"] for r in summary.get("rows", [])]
            seen.append((rows, summary.get("exit_code"), summary.get("finished")))

    runner = place.runner()
    runner.listener = Watch()
    runner.run(None, "pair")
    assert seen == [([], None, None), (["first"], None, None), (["first", "second"], None, None)]
    assert read_summary(place.run_dir)["exit_code"] == 0 and read_summary(place.run_dir)["finished"]
    seen.clear()
    runner = place.runner("first.fail=crash")
    runner.listener = Watch()
    with pytest.raises(RowFailed):
        runner.run(None, "first")
    assert [ended for _, *ended in seen] == [[None, None]]  # not the end of the run before
    assert read_summary(place.run_dir)["exit_code"] == RowFailed.exit_code


def test_a_second_run_executes_nothing(finished: tuple[Place, RunResult]) -> None:
    place, first = finished
    assert statuses(first) == dict.fromkeys(ROWS, "executed")
    assert place.file_of("last").read_text() == ("text word\nword\n" + "text word\nword\npairs word\nword\n" + "word\n")
    second = place.run()
    assert statuses(second) == dict.fromkeys(ROWS, "reused")
    assert [row.artifacts for row in second.rows] == [row.artifacts for row in first.rows]
    assert not any("started" in line for line in place.heard.lines)


def test_another_run_directory_reuses_the_same_rows(done: Place) -> None:
    done.run_dir = done.root / "runs" / "other"
    assert statuses(done.run()) == dict.fromkeys(ROWS, "reused")


def test_one_byte_of_an_input_file_reruns_what_descends_from_it(done: Place) -> None:
    (done.root / "pairs.jsonl").write_text("pairS ")
    result = done.run()
    assert statuses(result) == {
        "first": "reused", "second": "reused", "pair": "executed", "second@2": "executed", "last": "executed",
    }  # fmt: skip
    assert "pair started: input comparisons changed" in done.heard.lines
    (done.root / "pairs.jsonl").write_text("pairs ")
    assert statuses(done.run()) == dict.fromkeys(ROWS, "reused"), "the first rows are still there"


def test_a_changed_setting_is_told(done: Place) -> None:
    result = done.run("second@2.word=other", last="second@2")
    assert statuses(result)["pair"] == "reused" and statuses(result)["second@2"] == "executed"
    assert "second@2 started: settings.word word -> other" in done.heard.lines


def test_a_run_directory_records_what_happened(finished: tuple[Place, RunResult]) -> None:
    place, result = finished
    rows = read_rows(place.run_dir)
    assert list(rows) == ROWS
    assert "toy log line" in (place.run_dir / "logs" / "second@2.log").read_text()
    metrics = place.run_dir / "metrics" / "pair.jsonl"
    assert not metrics.is_symlink()
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [0, 1, 2]
    summary = json.loads((place.run_dir / "summary.json").read_text())
    assert [row["row"] for row in summary["rows"]] == ROWS
    assert (summary["exit_code"], summary["error"]) == (0, None)
    assert json.loads((place.run_dir / "plan.json").read_text())["rows"][0] == {"first": {"documents": "text"}}
    assert result.rows[0].metrics == {"bytes": 10, "tokens": 3, "loss": 0.25}
    assert result.rows[0].tokens == 3 and result.rows[0].headline == ("bytes",)


def test_another_environment_is_said_and_no_reason_to_run(done: Place) -> None:
    ddp = {"strategy": "ddp"}
    manifest = {"environment": {"world": 2, "launch": ddp, "packages": {"pydantic": "0.0.1", "never-installed": "1"}}}
    world, package = environment_differences(manifest, "1 process")
    assert world == "2 processes (ddp), here it is 1 process" and package.startswith("pydantic 0.0.1, here it is 2")
    built = {"environment": {"world": 1, "launch": {}, "packages": {}, "kernel": has_kernel()}}
    assert environment_differences(built, "1 process") == []
    built["environment"]["launch"] = ddp  # a stage of one process in a run of several
    assert environment_differences(built, "1 process") == []
    built["environment"]["kernel"] = not has_kernel()
    (said,) = environment_differences(built, "1 process")
    assert said.startswith("the compiled attention")
    result = done.run("launch.processes=2", "launch.strategy=ddp", last="first")
    assert statuses(result) == {"first": "reused"}
    assert "first said: was computed with 1 process, here it is 2 processes (ddp)" in done.heard.lines


def test_progress_and_words_reach_the_listener(place: Place) -> None:
    place.run(last="first")
    assert place.heard.lines == [
        "first started: never run",
        "first 1/3 tokens ['loss']",
        "first 2/3 tokens ['loss']",
        "first 3/3 tokens ['loss']",
        "first said: toy said something",
        "first done",
    ]


def test_only_the_rows_between_from_and_until_run(place: Place) -> None:
    assert list(statuses(place.run(last="second"))) == ["first", "second"]
    assert list(read_rows(place.run_dir)) == ["first", "second"]
    assert statuses(place.run(first="pair", last="pair")) == {"pair": "executed"}
    assert list(read_rows(place.run_dir)) == ["first", "second", "pair"]


def test_from_below_an_unsealed_row_is_refused_before_anything_runs(place: Place) -> None:
    with pytest.raises(UserError, match="row pair reads second.documents, but row second is not sealed.*--from second"):
        place.run(first="pair")
    assert place.heard.lines == []
    with pytest.raises(UserError, match="--from last stands below --until first"):
        place.run(first="last", last="first")
    with pytest.raises(UserError, match="no row 'secnd'.*did you mean 'second'"):
        place.run(first="secnd")


def test_a_missing_file_is_named_before_anything_runs(place: Place) -> None:
    (place.root / "pairs.jsonl").unlink()
    with pytest.raises(UserError, match=r"sources.pairs.path: there is no file .*pairs.jsonl"):
        place.run()
    assert place.heard.lines == []
    assert statuses(place.run(last="second")) == {"first": "executed", "second": "executed"}


@pytest.mark.parametrize(
    ("fail", "error", "message"),
    [
        (
            "crash",
            RowFailed,
            r"row second crashed: ValueError: seven is not eight \(traceback: .*second.log\)",
        ),
        ("nan", NonFinite, r"row second: loss is not a number at step 7 \(log: .*second.log\)"),
        ("kill", RowFailed, r"row second: the worker was killed \(SIGKILL"),
    ],
)
def test_a_failing_row_ends_the_run_and_leaves_the_others(
    place: Place, fail: str, error: type[UserError], message: str
) -> None:
    runner = place.runner(f"second.fail={fail}")
    with pytest.raises(error, match=message):
        runner.run()
    assert statuses(runner.result) == {"first": "executed", "second": "failed"}
    assert json.loads((place.run_dir / "summary.json").read_text())["exit_code"] == error.exit_code
    if fail == "crash":
        assert "Traceback" in (place.run_dir / "logs" / "second.log").read_text()
        assert statuses(place.run(last="second")) == {"first": "reused", "second": "executed"}


def test_a_flipped_byte_in_a_sealed_file_is_refused_by_name(done: Place) -> None:
    path = done.file_of("second")
    before = path.stat()
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(Damaged, match=str(path)):
        done.run()
    assert done.heard.lines == []


# ------------------------------------------------------------------------------------------------------
# files that change while a row runs


class Overwrites(Heard):
    """Writes other text of the same length over a file at the first event of a kind."""

    def __init__(self, path: Path, at: str) -> None:
        super().__init__()
        self.path, self.at = path, at

    def _hear(self, event: str) -> None:
        if event == self.at:
            self.path.write_text("other")

    def row_started(self, row: str, stage: str, fingerprint: str, why: str) -> None:
        self._hear("started")

    def progress(self, row: str, done: float, total: float | None, unit: str, figures: Mapping[str, Any]) -> None:
        self._hear("progress")


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("progress", "row first: {} changed while the row ran; run the same command again"),
        ("started", "row first: an input changed as it started; run the same command again"),
    ],
)
def test_a_row_is_not_sealed_under_the_digest_of_a_file_that_changed(place: Place, at: str, message: str) -> None:
    text = place.root / "text.txt"
    runner = place.runner()
    runner.listener = Overwrites(text, at)
    with pytest.raises(UserError) as error:
        runner.run(None, "first")
    assert str(error.value) == message.format(text) and error.value.exit_code == 2
    assert statuses(runner.result) == {"first": "failed"}
    assert not list((place.root / "store").glob("rows/*"))
    assert statuses(place.run(last="first")) == {"first": "executed"}
    assert place.file_of("first").read_text() == "otherword\n"


def test_a_row_computed_again_of_a_changed_file_is_refused_not_compared(place: Place) -> None:
    place.run(last="first")
    runner = place.runner()
    runner.listener = Overwrites(place.root / "text.txt", "progress")
    with pytest.raises(UserError, match="changed while the row ran"):
        runner.again("first")


# ------------------------------------------------------------------------------------------------------
# damaged files of a run directory


@pytest.mark.parametrize("text", ["", "null", "[1]", '{"rows": 5}'])
@pytest.mark.parametrize("name", ["rows.json", "summary.json"])
def test_a_damaged_file_of_the_run_is_named_before_anything_runs(place: Place, name: str, text: str) -> None:
    place.run_dir.mkdir(parents=True)
    (place.run_dir / name).write_text(text)
    with pytest.raises(Damaged, match="; remove it and run the plan again") as error:
        place.run(last="first")
    assert str(error.value).startswith(f"{place.run_dir / name}: ")
    assert place.heard.lines == []
    (place.run_dir / name).unlink()
    assert statuses(place.run(last="first")) == {"first": "executed"}


def test_names_that_are_no_utf8_are_recorded(tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"odd\xff")
    try:
        root.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    place = Place(root)
    place.run(last="first")
    plan = json.loads((place.run_dir / "plan.json").read_text())
    assert plan["sources"]["text"]["path"] == str(root / "text.txt")


# -------------------------------------------------------------------------------- locks


def hold(place: Place) -> subprocess.Popen[str]:
    """Another process that holds the lock of the run directory."""
    code = f"""
        import time
        from pathlib import Path
        from pipeline.flow.store import run_lock
        with run_lock(Path({str(place.run_dir)!r})):
            print("held", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_a_second_run_is_refused_fast_naming_the_holder_and_a_dead_one_is_recovered(place: Place) -> None:
    holder = hold(place)
    try:
        began = time.monotonic()
        with pytest.raises(Locked, match=f"process {holder.pid} on "):
            place.run()
        assert time.monotonic() - began < 1.0
        assert not (place.run_dir / "plan.json").exists(), "refused before the plan is loaded"
    finally:
        holder.kill()
        holder.wait()
    assert statuses(place.run(last="first")) == {"first": "executed"}
    assert f"toy said: took over the lock of process {holder.pid}, gone" in place.heard.lines


def test_a_row_locked_by_another_run_is_refused(place: Place) -> None:
    place.run(last="first")
    plan = load_plan(place.root / "plan.yaml", [], TABLE)
    store = Store(place.root / "store")
    from pipeline.flow.plan import survey

    fingerprint = survey(plan, store)[1].fingerprint
    assert fingerprint is not None
    with store.lock(fingerprint), pytest.raises(Locked, match="the row "):
        place.run()
    assert statuses(place.run(last="second")) == {"first": "reused", "second": "executed"}


# --------------------------------------------------------------------------------------------------------
# interrupted


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_the_worker_and_ends_the_run(place: Place, number: int, code: int) -> None:
    log = place.run_dir / "logs" / "second.log"
    stop = _later(lambda: log.exists() and "toy log line" in log.read_text(), number)
    runner = place.runner("second.seconds=30")
    began = time.monotonic()
    with pytest.raises(Interrupted) as ended:
        runner.run()
    stop.join()
    assert ended.value.exit_code == code and time.monotonic() - began < 15
    assert "it reuses the sealed rows and continues this one after" in str(ended.value)
    assert statuses(runner.result) == {"first": "executed", "second": "interrupted"}


def _later(ready: Callable[[], bool], number: int) -> threading.Thread:
    def wait() -> None:
        while not ready():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


# ------------------------------------------------------------------------------------------------------
# computed again


def test_a_row_computed_again_gives_the_same_digests(place: Place) -> None:
    place.run(last="second")
    sealed = place.file_of("second")
    before = sealed.stat()
    again = place.runner().again("second")
    assert isinstance(again, Again) and again.same and again.scratch is None
    digest = again.slots["documents"]["sealed"]
    assert again.slots == {"documents": {"sealed": digest, "again": digest, "same": True, "differs": []}}
    assert sealed.stat() == before
    assert not (place.run_dir / "again" / "second").exists()


def test_a_row_that_comes_out_otherwise_is_shown_file_by_file(place: Place) -> None:
    place.run("first.random=true", last="first")
    again = place.runner("first.random=true").again("first")
    assert not again.same
    assert again.slots["documents"]["differs"] == ["data.jsonl"]
    assert again.scratch is not None
    assert (again.scratch / "documents" / "data.jsonl").read_text() != place.file_of("first").read_text()


def test_a_row_that_is_not_sealed_cannot_be_compared(place: Place) -> None:
    with pytest.raises(UserError, match="row first is not sealed yet.*never run"):
        place.runner().again("first")
