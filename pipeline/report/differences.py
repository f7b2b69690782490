"""What differs between two runs: settings, seeds, code, inputs, environment and figures, row by row.

    a = Side("quickstart", rows={"world": FP, "sft": FP, ...}, manifests=store.manifests())
    compare(a, Side("beta03", ...)).document()

Rows are compared by name. A difference is told where it starts: a row that differs only because a row above it does
says so, and names the rows in which it began, instead of repeating what they say.

The document ("a" or "b" is absent from a CHANGE or FIGURE where that run has no such thing; DIGEST is sha256 in hex):

    {"a": RUN, "b": RUN, "identical", "starts": [ROW, ...],
     "rows": [{"row", "status": STATUS, "fingerprints": [FP|null, FP|null],
               "own": [CHANGE, ...],                                what differs in the row itself
               "inputs": [{"slot", "from": ROW, "starts": [ROW, ...]}],     what differs because a row above does
               "environment": [CHANGE, ...],                        recorded, never part of a row's identity
               "outputs": [{"slot", "a": DIGEST, "b": DIGEST, "same"}],
               "figures": [FIGURE, ...], "times": [FIGURE, ...]}]}

    STATUS   "identical" (one fingerprint) | "differs" (in itself) | "inputs" (only what it reads) |
             "only a" | "only b" | "unsealed" (nothing is stored of it in one of the runs)
    CHANGE   {"what": "stage"|"version"|"schema"|"seed"|"setting"|"input"|"format"|"part"|"skip_bad"|"code"|
              "environment"|"spelling", "name", "a", "b"}
    FIGURE   {"name": "heldout.accuracy", "a", "b", "difference": b - a|null, "relative": (b - a)/|a||null,
              "overlap": true|false|null}; a and b are numbers, {"mean", "low", "high"} or text, `overlap` says
              whether their intervals do, null without intervals

`everything` adds what is equal (its entries have "same": true) and "times", which are no differences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from pipeline.flow.artifacts import canonical
from pipeline.report.summary import COLUMNS
from pipeline.report.tables import Grid, number

Manifest = Mapping[str, Any]


class _Unset:
    def __repr__(self) -> str:
        return "unset"


UNSET: Any = _Unset()  # this run has no such thing; null is a value


@dataclass(frozen=True)
class Change:
    """One thing that differs; `same` is set only among what `everything` adds."""

    what: str
    name: str
    a: Any = UNSET
    b: Any = UNSET
    same: bool = False

    def document(self) -> dict[str, Any]:
        sides = {key: value for key, value in (("a", self.a), ("b", self.b)) if value is not UNSET}
        return {"what": self.what, "name": self.name, **sides, **({"same": True} if self.same else {})}


@dataclass(frozen=True)
class Figure:
    """A metric of both runs: numbers, intervals {"mean", "low", "high"}, or anything else as it stands."""

    name: str
    a: Any = UNSET
    b: Any = UNSET
    same: bool = False

    @property
    def difference(self) -> float | None:
        """b - a; None where either is no finite number."""
        one, two = central(self.a), central(self.b)
        if one is None or two is None or not math.isfinite(one - two):
            return None
        return two - one

    @property
    def relative(self) -> float | None:
        """(b - a) / |a|; None where a is 0."""
        one, difference = central(self.a), self.difference
        return None if difference is None or not one else difference / abs(one)

    @property
    def overlap(self) -> bool | None:
        """Whether the intervals overlap: where they do, the difference may be chance."""
        if not (is_interval(self.a) and is_interval(self.b)):
            return None
        return bool(self.a["low"] <= self.b["high"] and self.b["low"] <= self.a["high"])

    def document(self) -> dict[str, Any]:
        sides = {key: value for key, value in (("a", self.a), ("b", self.b)) if value is not UNSET}
        facts = {"difference": self.difference, "relative": self.relative, "overlap": self.overlap}
        return {"name": self.name, **sides, **facts, **({"same": True} if self.same else {})}


@dataclass(frozen=True)
class Inherited:
    """An input that differs because row `origin`, which made it, does; the difference began in `starts`."""

    slot: str
    origin: str
    starts: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        return {"slot": self.slot, "from": self.origin, "starts": list(self.starts)}


@dataclass(frozen=True)
class RowDifference:
    row: str
    status: str
    fingerprints: tuple[str | None, str | None]
    own: list[Change] = field(default_factory=list)
    inputs: list[Inherited] = field(default_factory=list)
    environment: list[Change] = field(default_factory=list)
    outputs: list[Change] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    times: list[Figure] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return {
            "row": self.row,
            "status": self.status,
            "fingerprints": list(self.fingerprints),
            "own": [change.document() for change in self.own],
            "inputs": [inherited.document() for inherited in self.inputs],
            "environment": [change.document() for change in self.environment],
            "outputs": [_output_document(change) for change in self.outputs],
            "figures": [figure.document() for figure in self.figures],
            "times": [figure.document() for figure in self.times],
        }


def _output_document(change: Change) -> dict[str, Any]:
    sides = {key: value for key, value in (("a", change.a), ("b", change.b)) if value is not UNSET}
    return {"slot": change.name, **sides, "same": change.same}


@dataclass(frozen=True)
class Side:
    """One run. `rows` are the fingerprints of its rows in the plan's order; `manifests` may hold more rows than that:
    what a row read may be of an earlier version of the row that stands above it now."""

    run: str
    rows: Mapping[str, str]
    manifests: Mapping[str, Manifest]

    @cached_property
    def makers(self) -> dict[str, list[tuple[str, str]]]:
        """digest -> (fingerprint, slot) of what made it, the run's own rows first."""
        found: dict[str, list[tuple[str, str]]] = {}
        own = [fp for fp in self.rows.values() if fp in self.manifests]
        for fp in dict.fromkeys([*own, *self.manifests]):
            for slot, output in self.manifests[fp]["outputs"].items():
                found.setdefault(output["digest"], []).append((fp, slot))
        return found


@dataclass(frozen=True)
class Differences:
    a: str
    b: str
    rows: list[RowDifference]

    @property
    def identical(self) -> bool:
        return all(row.status == "identical" for row in self.rows)

    @property
    def starts(self) -> list[str]:
        """Rows in which a difference starts, in the order of the plan; further rows that one run alone has too."""
        return [row.row for row in self.rows if row.status in ("differs", "only a", "only b")]

    def only(self, row: str) -> Differences:
        return replace(self, rows=[found for found in self.rows if found.row == row])

    def document(self) -> dict[str, Any]:
        return {
            "a": self.a,
            "b": self.b,
            "identical": self.identical,
            "starts": self.starts,
            "rows": [row.document() for row in self.rows],
        }


def compare(a: Side, b: Side, everything: bool = False) -> Differences:
    """Every row of either run, in a's order, then those of b alone."""
    return Differences(a.run, b.run, _Comparison(a, b, everything).rows())


class _Comparison:
    def __init__(self, a: Side, b: Side, everything: bool) -> None:
        self.a, self.b, self.everything = a, b, everything
        self._told: dict[tuple[str, str], tuple[list[Change], list[Inherited]]] = {}

    def rows(self) -> list[RowDifference]:
        return [self._row(name) for name in dict.fromkeys([*self.a.rows, *self.b.rows])]

    def _row(self, name: str) -> RowDifference:
        fa, fb = self.a.rows.get(name), self.b.rows.get(name)
        if fa is None or fb is None:
            return RowDifference(name, "only b" if fa is None else "only a", (fa, fb))
        ma, mb = self.a.manifests.get(fa), self.b.manifests.get(fb)
        if ma is None or mb is None:
            return RowDifference(name, "unsealed", (fa, fb))
        if fa == fb and not self.everything:
            return RowDifference(name, "identical", (fa, fb))
        own, inputs = self._causes(fa, fb)
        metrics = dict(flat(ma["metrics"])), dict(flat(mb["metrics"]))
        figures = self._figures(*({k: v for k, v in m.items() if not is_time(k)} for m in metrics))
        times = tuple({k: v for k, v in m.items() if is_time(k)} for m in metrics)
        seconds = tuple({"seconds": m["finished"] - m["started"]} for m in (ma, mb))
        equal = self._settings(ma, mb) if self.everything else []
        return RowDifference(
            name,
            "identical" if fa == fb else "differs" if own else "inputs",
            (fa, fb),
            own=own + [change for change in equal if change.same],
            inputs=inputs,
            environment=self._environment(ma, mb),
            outputs=_outputs(ma, mb),
            figures=figures,
            times=self._figures(seconds[0] | times[0], seconds[1] | times[1]) if self.everything else [],
        )

    # ------------------------------------------------------------------------------------------------- identity

    def _causes(self, fa: str, fb: str) -> tuple[list[Change], list[Inherited]]:
        """What differs in a row itself, and in which of its inputs; nothing for one and the same row."""
        if fa == fb:
            return [], []
        if (fa, fb) not in self._told:
            self._told[fa, fb] = [], []  # a row that hands on what it read could lead back to itself
            ma, mb = self.a.manifests[fa], self.b.manifests[fb]
            one, two = ma["identity"], mb["identity"]
            own = [*_facts(one, two), *(change for change in self._settings(ma, mb) if not change.same)]
            inherited: list[Inherited] = []
            for slot in dict.fromkeys([*one["inputs"], *two["inputs"]]):
                changes, handed = self._input(slot, ma, mb)
                own += changes
                inherited += handed
            own += _named("format", one.get("formats", {}), two.get("formats", {}))
            own += _named("part", one.get("parts", {}), two.get("parts", {}))
            own += _named("code", one["code"], two["code"])
            self._told[fa, fb] = own if own or inherited else _spelling(one, two), inherited
        return self._told[fa, fb]

    def _settings(self, ma: Manifest, mb: Manifest) -> list[Change]:
        """Every setting that decides the result, defaults too; equal ones are marked."""
        one, two = (dict(flat(m["identity"]["settings"])) for m in (ma, mb))
        return _named("setting", one, two, equal=True)

    def _input(self, slot: str, ma: Manifest, mb: Manifest) -> tuple[list[Change], list[Inherited]]:
        """One slot. In a list the names and their order count, as they do in a row's identity."""
        one, two = (m["identity"]["inputs"].get(slot, UNSET) for m in (ma, mb))
        if isinstance(one, list) and isinstance(two, list):
            names = [name for name, _ in one], [name for name, _ in two]
            changes = [] if names[0] == names[1] else [Change("input", slot, *names)]
            digests = dict(two)
            pairs = [(f"{slot}[{name}]", digest, digests[name]) for name, digest in one if name in digests]
        elif one is UNSET or two is UNSET or isinstance(one, list) or isinstance(two, list):
            return [Change("input", slot, self._wired(self.a, ma, one), self._wired(self.b, mb, two))], []
        else:
            changes, pairs = [], [(slot, one, two)]
        inherited: list[Inherited] = []
        for name, da, db in pairs:
            if da != db:
                told = self._traced(name, da, db, ma, mb)
                if isinstance(told, Inherited):
                    inherited.append(told)
                else:
                    changes.append(told)
        return changes, inherited

    def _traced(self, name: str, da: str, db: str, ma: Manifest, mb: Manifest) -> Change | Inherited:
        """Where two inputs come from: one and the same row of both runs, or something that differs itself."""
        one, two = self._makers(self.a, da, ma), self._makers(self.b, db, mb)
        for (row, slot), fa in one.items():
            fb = two.get((row, slot))
            if fb is not None:
                return Inherited(name, row, self._starts(fa, fb))
        return Change("input", name, _origin(one, da, ma), _origin(two, db, mb))

    def _starts(self, fa: str, fb: str) -> tuple[str, ...]:
        own, inherited = self._causes(fa, fb)
        above = [start for handed in inherited for start in handed.starts]
        here = [str(self.a.manifests[fa]["row"])] if own else []
        return tuple(dict.fromkeys([*above, *here]))

    def _makers(self, side: Side, digest: str, reader: Manifest) -> dict[tuple[str, str], str]:
        """(row, slot) -> fingerprint of the rows whose output this is, best first; none for files of the user."""
        found: dict[tuple[str, str], str] = {}
        for fp, slot in side.makers.get(digest, []):
            row = str(side.manifests[fp]["row"])
            if digest not in reader.get("places", {}) and row != reader["row"]:
                found.setdefault((row, slot), fp)
        return found

    def _wired(self, side: Side, reader: Manifest, value: Any) -> Any:
        if value is UNSET:
            return UNSET
        if isinstance(value, list):
            return [name for name, _ in value]
        return _origin(self._makers(side, value, reader), value, reader)

    # ---------------------------------------------------------------------------------------------- what it gave

    def _environment(self, ma: Manifest, mb: Manifest) -> list[Change]:
        """Versions, device, processes, threads; and settings that are no part of the identity."""
        one, two = (dict(flat(m["environment"])) | _beside(m) for m in (ma, mb))
        return _named("environment", one, two, equal=self.everything)

    def _figures(self, one: Mapping[str, Any], two: Mapping[str, Any]) -> list[Figure]:
        found = []
        for name in dict.fromkeys([*one, *two]):
            a, b = one.get(name, UNSET), two.get(name, UNSET)
            equal = same(a, b)
            if self.everything or not equal:
                found.append(Figure(name, a, b, equal))
        return found


# ------------------------------------------------------------------------------------------------------- pieces


def same(a: Any, b: Any) -> bool:
    """Equal as values: 1 is 1.0, 0.0 is -0.0, NaN is NaN; true is not 1, null is not unset, order counts in lists."""
    if a is UNSET or b is UNSET:
        return a is b
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b or (a != a and b != b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by path; intervals stay whole, so do lists of plain values; lists of mappings are numbered.

    >>> dict(flat({"train": {"betas": [0.9, 0.95]}, "rows": [{"n": 1}], "gold": {"mean": 2, "low": 1, "high": 3}}))
    {'train.betas': [0.9, 0.95], 'rows[0].n': 1, 'gold': {'mean': 2, 'low': 1, 'high': 3}}
    """
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping) and item and not is_interval(item):
            yield from flat(item, f"{name}.")
        elif isinstance(item, list) and item and all(isinstance(one, Mapping) for one in item):
            for i, one in enumerate(item):
                yield from flat({f"{name}[{i}]": one}, "")
        else:
            yield name, item


def is_interval(value: Any) -> bool:
    """{"mean", "low", "high"} in numbers, whatever else stands beside them (win rates have "vs")."""
    return isinstance(value, Mapping) and all(_is_number(value.get(key)) for key in ("mean", "low", "high"))


def is_time(name: str) -> bool:
    """Whether a metric is a time: those are recorded under `time/` and never called a difference."""
    return any(part.startswith("time/") or part == "seconds" for part in name.split("."))


def central(value: Any) -> float | None:
    """The number, or the mean of the interval; None for anything else."""
    if is_interval(value):
        value = value["mean"]
    return float(value) if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _facts(one: Manifest, two: Manifest) -> list[Change]:
    keys = ("stage", "version", "schema", "seed", "skip_bad")
    sides = ({key: identity.get(key, False if key == "skip_bad" else UNSET) for key in keys} for identity in (one, two))
    a, b = sides
    return [Change(key, key, a[key], b[key]) for key in keys if not same(a[key], b[key])]


def _named(what: str, one: Mapping[str, Any], two: Mapping[str, Any], equal: bool = False) -> list[Change]:
    """Entries of two mappings that differ; `equal`: and those that do not, marked."""
    pairs = {name: (one.get(name, UNSET), two.get(name, UNSET)) for name in dict.fromkeys([*one, *two])}
    changes = [Change(what, name, a, b, same(a, b)) for name, (a, b) in pairs.items()]
    return [change for change in changes if equal or not change.same]


def _spelling(one: Manifest, two: Manifest) -> list[Change]:
    """Two rows that differ in nothing but how a number is written (1 and 1.0) are two rows all the same."""
    leaves = dict(flat(one)), dict(flat(two))
    pairs = ((name, leaves[0].get(name, UNSET), leaves[1].get(name, UNSET)) for name in leaves[0] | leaves[1])
    return [Change("spelling", name, a, b) for name, a, b in pairs if UNSET in (a, b) or canonical(a) != canonical(b)]


def _origin(makers: Mapping[tuple[str, str], str], digest: str, reader: Manifest) -> str:
    """An input in words: "sft.policy", or the user's files with the head of their digest."""
    for row, slot in makers:
        return f"{row}.{slot}"
    places: Sequence[str] = reader.get("places", {}).get(digest, [])
    return f"{', '.join(places) or 'files'} ({digest[:12]})"


def _beside(manifest: Manifest) -> dict[str, Any]:
    """Settings that are no part of the identity, as they were."""
    deciding = dict(flat(manifest["identity"]["settings"]))
    return {f"settings.{name}": value for name, value in flat(manifest["settings"]) if name not in deciding}


def _outputs(ma: Manifest, mb: Manifest) -> list[Change]:
    one, two = ({slot: output["digest"] for slot, output in m["outputs"].items()} for m in (ma, mb))
    return _named("output", one, two, equal=True)


def sources_of(files: Iterable[str]) -> dict[str, list[str]]:
    """Source files by package.

    >>> sources_of(["algo/kl.py", "algo/policy.py", "stages/ppo.py"])
    {'algo': ['kl.py', 'policy.py'], 'stages': ['ppo.py']}
    """
    found: dict[str, list[str]] = {}
    for file in files:
        package, _, name = file.rpartition("/")
        found.setdefault(package, []).append(name)
    return found


# ---------------------------------------------------------------------------------------------- policies, a table


def policies_grid(row: RowDifference) -> Grid | None:
    """What an evaluation says of each policy, from one run to the other; None where nothing of that differs.

    A policy's columns are those of the evaluation's own table. Cells read "0.600 → 0.700 (+0.100)"; one that does not
    differ is left empty, "~" marks intervals that overlap.
    """
    found: dict[str, dict[str, Figure]] = {}
    columns = {"win_rate": ("wins", 3), **COLUMNS}
    for figure in row.figures:
        policy, key = _of_policy(figure.name)
        if key in columns and not figure.same:
            found.setdefault(policy, {})[key] = figure
    keys = [key for key in columns if any(key in figures for figures in found.values())]
    if not keys:
        return None
    lines = [[policy, *(_cell(figures.get(key), columns[key][1]) for key in keys)] for policy, figures in found.items()]
    note = "~ the intervals overlap" if any("~" in cell for line in lines for cell in line[1:]) else ""
    return Grid(f"{row.row}: policies", ["policy", *(columns[key][0] for key in keys)], lines, note)


def _of_policy(name: str) -> tuple[str, str]:
    """
    >>> _of_policy("policies.dpo.gold"), _of_policy("policies.dpo.against.sft.gold"), _of_policy("tokens")
    (('dpo', 'gold'), ('dpo', 'against.sft.gold'), ('', ''))
    """
    head, _, rest = name.partition(".")
    policy, _, key = rest.partition(".")
    return (policy, key) if head == "policies" else ("", "")


def _cell(figure: Figure | None, digits: int) -> str:
    if figure is None:
        return ""
    one, two = central(figure.a), central(figure.b)
    change = figure.difference
    tiny = change is not None and round(change, digits) == 0
    difference = "" if change is None else f" ({change:+.0e})" if tiny else f" ({change:+.{digits}f})"
    return f"{number(one, digits)} → {number(two, digits)}{difference}{' ~' if figure.overlap else ''}"
