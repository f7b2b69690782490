"""Runs a plan: which rows are stale, each of them as worker processes, sealed one by one.

The runner touches no tensor. Before anything else it takes the lock of the run directory, so that a second
run of the same directory is refused at once; then it loads and surveys the plan, and goes through the rows
from top to bottom. A fresh row is reused. A stale one is locked by its fingerprint, its request written, its
worker started (`pipeline.flow.launch`), its result sealed. The first row that fails ends the run; what is
sealed stays.

    runs/<name>/plan.json             the plan as resolved
    runs/<name>/rows.json             {row: fingerprint}: what garbage collection keeps
    runs/<name>/logs/<row>.log        all that the row's workers printed, and the traceback of a crash
    runs/<name>/logs/server.log       the same of the fork server
    runs/<name>/logs/*.node<n>.log    both, of the other nodes where there are several
    runs/<name>/metrics/<row>.jsonl   a link to the row's metrics while it runs, a copy afterwards
    runs/<name>/summary.json          {run, rows, started, finished, exit_code, error}: for `rlhf show`
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.flow.errors import Damaged, Locked, NonFinite, RowFailed, UserError
from pipeline.flow.nodes import digest_of, log_of, node_of
from pipeline.flow.secrets import redact
from pipeline.flow.store import Store, read_record, read_rows, run_lock

if TYPE_CHECKING:
    from pipeline.flow.artifacts import Artifact
    from pipeline.flow.launch import Outcome, Workers
    from pipeline.flow.plan import Plan, Row, RowState
    from pipeline.flow.stage import Request

ERRORS: dict[int, type[UserError]] = {
    error.exit_code: error for error in (RowFailed, UserError, Damaged, NonFinite, Locked)
}
SUMMARY = {"run", "rows", "exit_code", "error"}  # what `rlhf show` and `rlhf report` rely on
SUMMARY_ROW = {"row", "stage", "status", "seconds", "metrics", "fingerprint", "headline"}


class Interrupted(UserError):
    """SIGINT or SIGTERM reached the run; exit code 130 or 143."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(
            f"interrupted by {name}; the same command goes on: it reuses the sealed rows and continues this one after "
            "its last checkpoint, where it has one"
        )
        self.exit_code = 128 + number


@dataclass(frozen=True)
class RowResult:
    """What became of one row. `artifacts` maps slots to {"path", "digest"}."""

    row: str
    stage: str
    status: str  # executed | reused | failed | interrupted
    seconds: float = 0.0
    fingerprint: str = ""
    artifacts: dict[str, dict[str, str]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    headline: tuple[str, ...] = ()
    kinds: dict[str, str] = field(default_factory=dict)  # slot -> artifact kind

    def document(self) -> dict[str, Any]:
        """The row as `rlhf run --json` prints it."""
        return {
            "row": self.row,
            "stage": self.stage,
            "status": self.status,
            "seconds": round(self.seconds, 3),
            "artifacts": self.artifacts,
            "metrics": self.metrics,
        }


@dataclass
class RunResult:
    run: str
    run_dir: Path
    rows: list[RowResult] = field(default_factory=list)
    seconds: float = 0.0

    def document(self) -> dict[str, Any]:
        return {"run": self.run, "rows": [row.document() for row in self.rows]}

    def final_policy(self) -> Path | None:
        """Where the last policy of the run lies."""
        for row in reversed(self.rows):
            for slot, kind in row.kinds.items():
                if kind == "policy":
                    return Path(row.artifacts[slot]["path"])
        return None


@dataclass(frozen=True)
class Again:
    """A sealed row computed once more: {slot: {"sealed", "again", "same", "differs": [file, ...]}}."""

    row: str
    stage: str
    fingerprint: str
    seconds: float
    slots: dict[str, dict[str, Any]]
    scratch: Path | None  # where the second result lies, kept where it differs

    @property
    def same(self) -> bool:
        return all(slot["same"] for slot in self.slots.values())


class Listener:
    """Hears of a run's events; override what is of interest."""

    def row_started(self, row: str, stage: str, fingerprint: str, why: str) -> None: ...

    def row_reused(self, result: RowResult) -> None: ...

    def row_done(self, result: RowResult) -> None: ...

    def row_failed(self, result: RowResult, message: str) -> None: ...

    def progress(self, row: str, done: float, total: float | None, unit: str, figures: Mapping[str, Any]) -> None: ...

    def metrics(self, row: str, step: int, values: Mapping[str, Any]) -> None: ...

    def said(self, row: str, text: str) -> None: ...

    def close(self) -> None: ...


class Runner:
    """One run of one plan in one run directory.

    `plan` may be a function that loads it: it is called under the lock, so a second run is refused before any
    stage is imported. `run` raises the first failure; `result` holds what was done until then.
    """

    def __init__(
        self,
        plan: Plan | Callable[[], Plan],
        store: Store,
        run_dir: Path,
        listener: Listener | None = None,
        *,
        accept_code: bool = False,
        check_data: Callable[[Artifact, bool], None] | None = None,
    ) -> None:
        """`check_data(artifact, skip_bad)` raises UserError where a user's file of records cannot be read."""
        self._load = plan
        self._check_file = check_data
        self.store, self.run_dir, self.accept_code = store, Path(run_dir), accept_code
        self.listener = listener or Listener()
        self.result = RunResult(self.run_dir.name, self.run_dir)
        self._workers: Workers | None = None
        self._interrupted: int | None = None
        self._row = self.run_dir.name  # the row at work, for what is said
        self.started = False  # the run directory is ours and the plan is loaded
        self.gathered = False  # the other nodes of several are there, or node 0 has told those that were
        self._began = time.time()

    # ------------------------------------------------------------------------------------------- two commands

    def run(self, from_row: str | None = None, until_row: str | None = None) -> RunResult:
        """Bring every row from `from_row` to `until_row` (default: all) up to date."""
        self._began = time.time()
        error: BaseException | None = None
        with self._guarded():
            try:
                plan = self._open_plan()
                self._gather(plan)
                self._run_rows(plan, span(plan, from_row, until_row))
            except BaseException as failure:
                error = failure
                raise
            finally:
                self.result.seconds = time.time() - self._began
                if self.started:
                    self._write_summary(error, ended=True)
        return self.result

    def again(self, name: str) -> Again:
        """Compute a sealed row once more beside it and compare; the sealed row stays as it is."""
        from pipeline.flow.plan import request, state_of

        with self._guarded():
            plan = self._open_plan()
            self._gather(plan)
            row = plan.row(name)
            state = state_of(plan, row, self.store, accept_code=self.accept_code)
            if state.fingerprint is None or not self.store.is_sealed(state.fingerprint):
                raise UserError(f"row {name} is not sealed yet, so there is nothing to compare: {state.why}")
            scratch = self.run_dir / "again" / name
            shutil.rmtree(scratch, ignore_errors=True)
            began = time.monotonic()
            self.listener.row_started(row.name, row.stage, state.fingerprint, "computed again to compare")
            manifest = self._work(row, replace(request(plan, row, self.store), partial=str(scratch)))
            slots = _compare(self.store.manifest(state.fingerprint)["outputs"], manifest["outputs"])
            seconds = time.monotonic() - began
            if all(slot["same"] for slot in slots.values()):
                shutil.rmtree(scratch)
                return Again(name, row.stage, state.fingerprint, seconds, slots, None)
            return Again(name, row.stage, state.fingerprint, seconds, slots, scratch / "out")

    # ---------------------------------------------------------------------------------------------- all rows

    def _open_plan(self) -> Plan:
        plan = self._load() if callable(self._load) else self._load
        for read in (read_rows, read_summary):
            read(self.run_dir)  # a damaged file is told before hours of work, not after
        (self.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        (self.run_dir / "metrics").mkdir(exist_ok=True)
        _write_json(self.run_dir / "plan.json", plan.document)
        self.started = True
        return plan

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """The run's lock held and signals passed on to the worker."""
        with run_lock(self.run_dir) as lock, self._signals():
            if lock.recovered:
                self.listener.said(self.run_dir.name, f"took over the lock of process {lock.recovered['pid']}, gone")
            code = 0
            try:
                yield
            except BaseException as error:
                code = getattr(error, "exit_code", 1)
                raise
            finally:
                self.store.remember()
                if self._workers is not None:
                    self._workers.close(code)
                    self._workers = None

    def _run_rows(self, plan: Plan, names: list[str]) -> None:
        """`known`: rows.json. `sealed`: the fingerprints among them that the rows below may read."""
        from pipeline.flow.plan import check_sources, state_of, survey

        check_sources(replace(plan, rows=[row for row in plan.rows if row.name in names]))
        previous = read_rows(self.run_dir)
        known = {row.name: previous[row.name] for row in plan.rows if row.name in previous}
        sealed = {
            state.row: state.fingerprint
            for state in survey(plan, self.store, self.accept_code)
            if state.status == "fresh" and state.fingerprint is not None
        }
        _check_start(plan, names, sealed)
        self._check_data(plan, [name for name in names if name not in sealed])
        known.update({name: sealed[name] for name in sealed if name not in names})
        for name in names:
            row = plan.row(name)
            state = state_of(plan, row, self.store, sealed, self.accept_code)
            if state.fingerprint is None:
                raise UserError(f"row {name} {state.why}")
            known[name] = state.fingerprint
            self.store.record_run(self.run_dir, {r.name: known[r.name] for r in plan.rows if r.name in known})
            if state.status == "fresh":
                self._reuse(plan, row, state.fingerprint)
            else:
                self._write_summary(None)  # before hours of work: how an earlier run ended is no longer true
                self._left_behind(name, previous.get(name), state.fingerprint)
                self._execute(plan, row, state, sealed)
            sealed[name] = state.fingerprint
            self._write_summary(None)

    def _check_data(self, plan: Plan, names: list[str]) -> None:
        """Read the users' files of these rows before any of them runs: bad rows are told before hours of work."""
        from pipeline.flow.plan import open_source

        if self._check_file is None:
            return
        used = {ref.source for name in names for ref in plan.row(name).refs()}
        told = []
        for source in plan.sources:
            if source in used:
                try:
                    self._check_file(open_source(plan, source, self.store), plan.skip_bad)
                except UserError as error:
                    told.append(str(error))
        if told:
            raise UserError("\n".join(dict.fromkeys(told)))

    def _left_behind(self, row: str, previous: str | None, fingerprint: str) -> None:
        """Say where unfinished work lies that this row would not replace, since its settings or inputs changed."""
        if previous and previous != fingerprint and not self.store.is_sealed(previous):
            work = self.store.partial_dir(previous)
            if work.exists():
                self.listener.said(row, f"unfinished work of an earlier version stays in {work} (rlhf gc)")

    # ----------------------------------------------------------------------------------------------- one row

    def _reuse(self, plan: Plan, row: Row, fingerprint: str) -> None:
        from pipeline.flow.launch import launch_settings, sharing_of

        result = self._result(row, fingerprint, "reused", 0.0)
        self._copy_metrics(row.name, fingerprint)
        self.result.rows.append(result)
        self.listener.row_reused(result)
        shared = sharing_of(row.cls, launch_settings(plan.launch))
        for difference in environment_differences(self.store.manifest(fingerprint), shared):
            self.listener.said(row.name, f"was computed with {difference}")

    def _execute(self, plan: Plan, row: Row, state: RowState, sealed: Mapping[str, str]) -> None:
        from pipeline.flow.plan import request

        fingerprint = state.fingerprint
        assert fingerprint is not None
        began = time.monotonic()
        with self.store.lock(fingerprint):
            if self.store.is_sealed(fingerprint):  # another run sealed it since the survey
                self._reuse(plan, row, fingerprint)
                return
            partial = self.store.partial_dir(fingerprint)
            self._link_metrics(row.name, partial)
            self.listener.row_started(row.name, row.stage, fingerprint, state.why)
            try:
                asked = request(plan, row, self.store, sealed)
                if asked.fingerprint != fingerprint:
                    raise UserError(f"row {row.name}: an input changed as it started; run the same command again")
                manifest = self._work(row, asked)
                self.store.seal(fingerprint, manifest)
            except Exception as error:
                status = "interrupted" if isinstance(error, Interrupted) else "failed"
                failed = RowResult(row.name, row.stage, status, time.monotonic() - began, fingerprint)
                self.result.rows.append(failed)
                self.listener.row_failed(failed, str(error))
                raise
        self._copy_metrics(row.name, fingerprint)
        result = self._result(row, fingerprint, "executed", time.monotonic() - began)
        self.result.rows.append(result)
        self.listener.row_done(result)

    def _work(self, row: Row, asked: Request) -> dict[str, Any]:
        """Start the row's workers on a request, wait for them, return the manifest they made."""
        from pipeline.flow.launch import asked_to_stop, processes_of
        from pipeline.flow.worker import RESULT

        self._row, workers = row.name, self._open_workers(asked.launch)
        partial = self.store.prepare(asked)
        log = self.run_dir / "logs" / f"{row.name}.log"
        with open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
            print(f"=== {row.name} {time.strftime('%Y-%m-%d %H:%M:%S')} in {partial}", file=file)
        outcome = workers.run(
            partial / "request.json",
            log=log,
            processes=processes_of(row.cls, workers.launch),
            on_event=lambda event: self._hear(row.name, event),
        )
        if self._interrupted is not None and not outcome.reported:  # else what went wrong while it stopped
            raise Interrupted(self._interrupted)
        if not outcome.reported and asked_to_stop(outcome.code):  # not through us
            raise Interrupted(outcome.code - 128)
        if outcome.message is not None:
            raise _failure(row.name, outcome, log_of(log, outcome.node))
        self.store.check_sources(asked)
        document: dict[str, Any] = json.loads((partial / RESULT).read_text(encoding="utf-8"))
        return document

    def _gather(self, plan: Plan) -> None:
        """Of several nodes, whether all are there is known before anything is computed."""
        self.gathered = True
        if plan.launch.get("nodes", 1) > 1:
            say = lambda text: self.listener.said(self.run_dir.name, text)
            self._open_workers(plan.launch).gather(say, digest_of(plan.document, self.run_dir.name))

    def _open_workers(self, launch: Mapping[str, Any]) -> Workers:
        from pipeline.flow.launch import Workers, launch_settings

        if self._workers is None:
            self._workers = Workers(launch_settings(launch), log=self.run_dir / "logs" / "server.log")
        return self._workers

    def _hear(self, row: str, event: dict[str, Any]) -> None:
        match event.pop("event"):
            case "progress":
                self.listener.progress(row, **event)
            case "metrics":
                self.listener.metrics(row, event["step"], event["metrics"])
            case "said":
                self.listener.said(row, event["text"])

    def _result(self, row: Row, fingerprint: str, status: str, seconds: float) -> RowResult:
        manifest = self.store.manifest(fingerprint)
        outputs = {slot: self.store.open_output(fingerprint, slot) for slot in manifest["outputs"]}
        metrics = manifest["metrics"]
        return RowResult(
            row=row.name,
            stage=row.stage,
            status=status,
            seconds=seconds,
            fingerprint=fingerprint,
            artifacts={slot: {"path": str(a.path), "digest": a.digest} for slot, a in outputs.items()},
            metrics=metrics,
            tokens=metrics.get("tokens"),
            headline=tuple(getattr(row.cls, "headline", ())),
            kinds={slot: a.kind for slot, a in outputs.items()},
        )

    # -------------------------------------------------------------------------------------- the run directory

    def _link_metrics(self, row: str, partial: Path) -> None:
        link = self.run_dir / "metrics" / f"{row}.jsonl"
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(partial / "metrics.jsonl", link.parent))

    def _copy_metrics(self, row: str, fingerprint: str) -> None:
        copy = self.run_dir / "metrics" / f"{row}.jsonl"
        copy.unlink(missing_ok=True)
        sealed = self.store.row_dir(fingerprint) / "metrics.jsonl"
        if sealed.exists():
            shutil.copyfile(sealed, copy)

    def _write_summary(self, error: BaseException | None, ended: bool = False) -> None:
        """This run's rows, and those of earlier runs in this directory that still stand in rows.json.

        A run that goes on, or was ended by force, has neither an end nor an exit code.
        """
        fingerprints = read_rows(self.run_dir)
        told = {row["row"]: row for row in read_summary(self.run_dir).get("rows", [])}
        rows = {name: row for name, row in told.items() if fingerprints.get(name) == row["fingerprint"]}
        for row in self.result.rows:
            more = {"fingerprint": row.fingerprint, "tokens": row.tokens, "headline": row.headline}
            rows[row.row] = {**row.document(), **more}
        summary = {
            "run": self.result.run,
            "rows": [rows[name] for name in fingerprints if name in rows],
            "started": self._began,
            "finished": time.time() if ended else None,
            "exit_code": (getattr(error, "exit_code", 1) if error else 0) if ended else None,
            "error": redact(str(error) or type(error).__name__) if error else None,
        }
        _write_json(self.run_dir / "summary.json", summary)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def passed(number: int) -> bool:
            if self._workers is None or not self._workers.signal(number):
                return False
            if self._interrupted is None:
                self.listener.said(self._row, STOPPING.format(signal.Signals(number).name))
            self._interrupted = self._interrupted or number
            return True

        with passed_on(passed):
            yield


STOPPING = "{}: a row that trains ends its step and saves; again to leave at once"


@contextlib.contextmanager
def passed_on(to: Callable[[int], bool]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `to`, which says whether a worker took them; with none at work they end the run here."""

    def handle(number: int, _frame: object) -> None:
        if not to(number):
            raise Interrupted(number)

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs us there handles signals
        before = {}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def follow(plan: Plan, run_dir: Path, say: Callable[[str], None]) -> None:
    """Elsewhere than on node 0: start this node's ranks of every row that node 0 names, until it ends.

    RowFailed with node 0's exit code where the run failed, or where node 0 is gone.
    """
    from pipeline.flow.launch import Workers, launch_settings
    from pipeline.flow.nodes import GONE, LinkGone, call, orders

    launch = launch_settings(plan.launch)

    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    workers = Workers(launch, log=log_of(run_dir / "logs" / "server.log", node_of(launch)))
    with passed_on(workers.signal):
        try:
            link = call(launch, workers.node, say, digest_of(plan.document, run_dir.name))
            workers.start()
            for row in orders(link):
                say(f"node {workers.node}: {Path(row['log']).stem}")
                workers.follow(link, row)
            say(f"node {workers.node}: done")
        except LinkGone:
            raise RowFailed(GONE.format(launch.main_address)) from None
        finally:
            workers.close()


# ------------------------------------------------------------------------------------------------------
# pieces


def span(plan: Plan, first: str | None, last: str | None) -> list[str]:
    """Names of the rows from `first` to `last`, both included."""
    names = [row.name for row in plan.rows]
    start = names.index(plan.row(first).name) if first else 0
    end = names.index(plan.row(last).name) if last else len(names) - 1
    if start > end:
        raise UserError(f"--from {first} stands below --until {last}, so no row is left to run")
    return names[start : end + 1]


def _check_start(plan: Plan, names: list[str], sealed: Mapping[str, str]) -> None:
    """Before anything runs: what the chosen rows read from rows that are not chosen must be sealed."""
    for name in names:
        for ref in plan.row(name).refs():
            if ref.row and ref.row not in names and ref.row not in sealed:
                raise UserError(
                    f"row {name} reads {ref.text}, but row {ref.row} is not sealed for these settings: "
                    f"run it too (--from {ref.row})"
                )


def _failure(row: str, outcome: Outcome, log: Path) -> UserError:
    assert outcome.message is not None
    kind = ERRORS.get(outcome.code, RowFailed)
    if outcome.user:
        return kind(f"row {row}: {outcome.message} (log: {log})")
    return kind(f"row {row} crashed: {outcome.message} (traceback: {log})")


def _compare(sealed: Mapping[str, Any], again: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    slots = {}
    for slot in sorted({*sealed, *again}):
        one, other = sealed.get(slot, {}), again.get(slot, {})
        files, others = one.get("files", {}), other.get("files", {})
        differs = [name for name in sorted({*files, *others}) if files.get(name) != others.get(name)]
        same = one.get("digest") == other.get("digest")
        slots[slot] = {
            "sealed": one.get("digest"),
            "again": other.get("digest"),
            "same": same,
            "differs": differs,
        }
    return slots


def environment_differences(manifest: Mapping[str, Any], shared: str) -> list[str]:
    """What is another now than when the row was computed, versions and processes: said, never identity."""
    from importlib.metadata import PackageNotFoundError, version

    from pipeline.flow.launch import sharing_then
    from pipeline.flow.stage import has_kernel

    environment = manifest["environment"]
    before = sharing_then(environment)
    differences = [] if before == shared else [f"{before}, here it is {shared}"]
    for package, then in environment["packages"].items():
        with contextlib.suppress(PackageNotFoundError):
            now = version(package)
            if now != then:
                differences.append(f"{package} {then}, here it is {now}")
    if (then := environment.get("kernel")) is not None and then != has_kernel():
        differences.append(f"the compiled attention {'built' if then else 'not built'}, here it is otherwise")
    return differences


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json of a run directory; empty before its first run."""
    path = run_dir / "summary.json"
    if not path.exists():
        return {}
    summary = read_record(path)
    rows = summary["rows"] if summary.keys() >= SUMMARY else None
    if not isinstance(rows, list) or not all(map(_is_summary_row, rows)):
        raise Damaged(f"{path}: is no summary of a run; remove it and run the plan again")
    return summary


def _is_summary_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and row.keys() >= SUMMARY_ROW
        and all(isinstance(row[key], str) for key in ("row", "status", "fingerprint"))
        and isinstance(row["seconds"], (int, float))
        and isinstance(row["metrics"], dict)
        and isinstance(row["headline"], list)
        and all(isinstance(name, str) for name in row["headline"])
    )


def _write_json(path: Path, document: Any) -> None:
    """As JSON in UTF-8; a file name that is no UTF-8 keeps its bytes as JSON escapes."""
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, path)
