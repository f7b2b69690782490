"""The figures that are promised, measured: gates over the evaluation rows of several runs (seeds).

    figures([run_of_seed_0, run_of_seed_1, run_of_seed_2]).render_markdown()

A run is the document that `rlhf run --json` prints, with "seed" beside "run" where it is known:

    {"run": "quickstart-0", "seed": 0,
     "rows": [{"row": "evaluate", "stage": "evaluate", "metrics": {"temperature": 1.0, "policies": {...}}}]}

A gate is met, missed or not measured. What was not measured is said, never left out and never counted as met.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group

from pipeline.report.summary import summarise
from pipeline.report.tables import NONE, Grid, interval, markdown, value_of

MET, MISSED, UNMEASURED = "met", "missed", "not measured"
NO_ROW, NO_GAP = "no evaluation row", "no gap to the best of {} by gold"
BEST_OF = "set best_of: {}, with a `judge`"
SCORED = "wire a `judge` or a `reward`"  # what a comparison between policies needs


@dataclass(frozen=True)
class Gate:
    """One promise. `measure` names how it is read (`MEASURES`); the other fields say about what.

    policy, other   names of policies as the evaluation rows have them
    key             part of the judge, or metric of a row
    row             for `row_metric`: the row
    n               for `recovered` and `gap`: best of how many
    """

    name: str
    measure: str
    target: float = 0.0
    policy: str = ""
    other: str = ""
    key: str = ""
    row: str = ""
    n: int = 8

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"gate {self.name!r}: no measure {self.measure!r}; there are: {', '.join(MEASURES)}")


@dataclass(frozen=True)
class Reading:
    """What a gate read. `met` None: not measured, `note` says what is missing."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    met: bool | None = None
    note: str = ""

    @property
    def status(self) -> str:
        return UNMEASURED if self.met is None else MET if self.met else MISSED


@dataclass(frozen=True)
class Evidence:
    """One evaluation row's metrics, and the metrics of all rows of its run by name."""

    evaluation: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]

    def policy(self, name: str) -> Mapping[str, Any] | None:
        """By its name, or by its row's (`dpo` for `dpo.policy`)."""
        policies = self.evaluation.get("policies") or {}
        return policies.get(name) or policies.get(f"{name}.policy")

    def against(self, name: str, other: str, what: str) -> Mapping[str, Any] | None:
        found = (self.policy(name) or {}).get("against") or {}
        pair = found.get(other) or found.get(f"{other}.policy") or {}
        return pair.get(what)

    def wins(self, name: str, other: str) -> Mapping[str, Any] | None:
        rate = (self.policy(name) or {}).get("win_rate")
        if rate and rate.get("vs") in (other, f"{other}.policy"):
            return rate
        return self.against(name, other, "win_rate")

    def best_of(self, n: int) -> Mapping[str, Any] | None:
        rows = (self.evaluation.get("best_of_n") or {}).get("rows") or []
        return next((r for r in rows if r["n"] == n), None)


def _reading(found: Mapping[str, Any] | None, met: Callable[[Any], bool], missing: str) -> Reading:
    if found is None or found.get("mean") is None:
        return Reading(note=missing)
    return Reading(found["mean"], found.get("low"), found.get("high"), met(found))


def _lacking(gate: Gate, seen: Evidence, otherwise: str) -> str:
    """What to give an evaluation row: a policy that the gate is about, else what it needs beside its policies."""
    if not seen.evaluation:
        return NO_ROW
    absent = [name for name in (gate.policy, gate.other) if name and seen.policy(name) is None]
    return f"add {' and '.join(absent)} to `policies`" if absent else otherwise


def _lacking_pairs(seen: Evidence, otherwise: str) -> str:
    if not seen.evaluation:
        return NO_ROW
    if not seen.evaluation.get("reward_model"):
        return "wire `reward`, `pairs` and a `judge`"
    return "wire a `judge`" if seen.evaluation.get("decided_by") != "gold" else otherwise


def _wins(gate: Gate, seen: Evidence) -> Reading:
    """Win rate at the target or above, and its whole interval above one half."""
    found = seen.wins(gate.policy, gate.other)
    return _reading(found, lambda i: i["mean"] >= gate.target and i["low"] > 0.5, _lacking(gate, seen, SCORED))


def _above(gate: Gate, seen: Evidence) -> Reading:
    """Paired difference of gold scores whose whole interval is above the target (0)."""
    found = seen.against(gate.policy, gate.other, "difference")
    return _reading(found, lambda i: i["low"] > gate.target, _lacking(gate, seen, SCORED))


def _not_below(gate: Gate, seen: Evidence) -> Reading:
    """Paired difference of gold scores that is not significantly below the target (0)."""
    found = seen.against(gate.policy, gate.other, "difference")
    return _reading(found, lambda i: i["high"] >= gate.target, _lacking(gate, seen, SCORED))


def _part_not_falling(gate: Gate, seen: Evidence) -> Reading:
    """Win rate on one part of the judge that is not significantly below one half."""
    policy = seen.policy(gate.policy) or {}
    if (policy.get("win_rate") or {}).get("vs") not in (gate.other, f"{gate.other}.policy"):
        return Reading(note=_lacking(gate, seen, f"make {gate.other} the `reference`, and wire a `judge`"))
    found = (policy.get("win_rate_parts") or {}).get(gate.key)
    return _reading(found, lambda i: i["high"] >= gate.target, f"wire a `judge` that scores {gate.key}")


def _share_of_best(gate: Gate, seen: Evidence) -> Reading:
    """Gold score over the best attainable one (`attainable` of the row; the judge's top, 1, where absent)."""
    gold = value_of((seen.policy(gate.policy) or {}).get("gold"))
    if gold is None:
        return Reading(note=_lacking(gate, seen, "wire a `judge`"))
    share = gold / (value_of(seen.evaluation.get("attainable")) or 1.0)
    return Reading(share, met=share >= gate.target)


def _gap(gate: Gate, seen: Evidence) -> Reading:
    """How much of the way from `other` to its best of n by gold the policy has gone.

    The row's own `gap_closed` (with an interval) where it is recorded, else from the means.
    """
    recorded = (seen.policy(gate.policy) or {}).get("gap_closed")
    if recorded is not None:
        return _reading(recorded, lambda i: i["mean"] >= gate.target, NO_GAP.format(gate.n))
    gold = value_of((seen.policy(gate.policy) or {}).get("gold"))
    start = value_of((seen.policy(gate.other) or {}).get("gold"))
    top = value_of((seen.best_of(gate.n) or {}).get("by_gold"))
    if gold is None or start is None or top is None or top <= start:
        drawn = seen.best_of(gate.n) is not None
        return Reading(note=_lacking(gate, seen, NO_GAP.format(gate.n) if drawn else BEST_OF.format(gate.n)))
    share = (gold - start) / (top - start)
    return Reading(share, met=share >= gate.target)


def _recovered(gate: Gate, seen: Evidence) -> Reading:
    found = (seen.best_of(gate.n) or {}).get("recovered")
    return _reading(found, lambda i: i["mean"] >= gate.target, f"{BEST_OF.format(gate.n)} and `reward`")


def _reward_clear(gate: Gate, seen: Evidence) -> Reading:
    """On clear pairs: the target, or within 5 points of the labellers' own accuracy."""
    card = seen.evaluation.get("reward_model") or {}
    labellers = value_of(card.get("clear_labellers"))
    bar = gate.target if labellers is None else min(gate.target, labellers - 0.05)
    reading = _reading(card.get("clear"), lambda i: i["mean"] >= bar, _lacking_pairs(seen, "no clear pairs"))
    return reading if labellers is None else Reading(**{**asdict(reading), "note": f"labellers {labellers:.3f}"})


def _reward_accuracy(gate: Gate, seen: Evidence) -> Reading:
    found = (seen.evaluation.get("reward_model") or {}).get(gate.key)
    return _reading(found, lambda i: i["mean"] >= gate.target, _lacking_pairs(seen, "no such pairs"))


def _policy_metric(gate: Gate, seen: Evidence) -> Reading:
    value = value_of((seen.policy(gate.policy) or {}).get(gate.key))
    return (
        Reading(note=_lacking(gate, seen, f"no {gate.key}"))
        if value is None
        else Reading(value, met=value >= gate.target)
    )


def _row_metric(gate: Gate, seen: Evidence) -> Reading:
    value = value_of(seen.rows.get(gate.row, {}).get(gate.key))
    return Reading(note=f"no {gate.key} of {gate.row}") if value is None else Reading(value, met=value >= gate.target)


@dataclass(frozen=True)
class Measure:
    """How a gate is read, how its target is written, and whether it depends on the sampling temperature."""

    read: Callable[[Gate, Evidence], Reading]
    target: str = "≥ {target:g}"
    by_temperature: bool = True


MEASURES: dict[str, Measure] = {
    "wins": Measure(_wins, "≥ {target:g}, interval above 0.5"),
    "above": Measure(_above, "interval above {target:g}"),
    "not_below": Measure(_not_below, "not significantly below {target:g}"),
    "part_not_falling": Measure(_part_not_falling, "not significantly below {target:g}"),
    "share_of_best": Measure(_share_of_best),
    "gap": Measure(_gap),
    "recovered": Measure(_recovered),
    "reward_clear": Measure(_reward_clear, "≥ {target:g} or labellers - 0.05", by_temperature=False),
    "reward_accuracy": Measure(_reward_accuracy, by_temperature=False),
    "policy_metric": Measure(_policy_metric),
    "row_metric": Measure(_row_metric, by_temperature=False),
}


def chain_gates(
    *,
    base: str = "pretrain",
    sft: str = "sft",
    perfect: str = "sft@perfect",
    chain: Sequence[str] = ("ppo", "rejection", "dpo"),
    from_sft: Mapping[str, float] | None = None,
    value_row: str = "ppo",
) -> list[Gate]:
    """The promises of the whole chain, for policies of these names.

    chain      the aligned policies in order: each starts from the one before it, the first from `sft`
    from_sft   policies started from `sft` alone -> the win rate each must reach over it
    """
    from_sft = {"ppo": 0.60, "rejection@sft": 0.55, "dpo@sft": 0.60} if from_sft is None else from_sft
    gates = [
        Gate(f"{sft} above {base}", "above", policy=sft, other=base),
        Gate(f"{perfect}: share of the best attainable", "share_of_best", 0.85, policy=perfect),
        Gate(f"{perfect} above {sft}", "above", policy=perfect, other=sft),
        Gate("reward model: clear pairs", "reward_clear", 0.85),
        Gate("reward model: correctness alone", "reward_accuracy", 0.70, key="correctness"),
        Gate("best of 8 by reward: gain recovered", "recovered", 0.5),
    ]
    for start, policy in zip([sft, *chain], chain, strict=False):
        gates.append(Gate(f"{policy} not below its input {start}", "not_below", policy=policy, other=start))
    for policy in chain:
        gates += [Gate(f"{policy} above {other}", "above", policy=policy, other=other) for other in (base, sft)]
    if chain:
        final = chain[-1]
        gates.append(Gate(f"{final} wins over {sft}", "wins", 0.65, policy=final, other=sft))
        gates.append(Gate(f"{final}: way to best of 8 by gold", "gap", 0.4, policy=final, other=sft))
    for policy, target in from_sft.items():
        gates.append(Gate(f"{policy} (from {sft}) wins over {sft}", "wins", target, policy=policy, other=sft))
    for policy in dict.fromkeys([*chain, *from_sft]):
        gates.append(
            Gate(
                f"{policy}: wins on correctness",
                "part_not_falling",
                0.5,
                policy=policy,
                other=sft,
                key="correct",
            )
        )
        gates.append(Gate(f"{policy}: stops by itself", "policy_metric", 0.99, policy=policy, key="stop_rate"))
    gates.append(Gate(f"{value_row}: explained variance", "row_metric", 0.3, row=value_row, key="explained_variance"))
    return gates


@dataclass(frozen=True)
class Figures:
    """Readings of every gate, run and temperature, and the grids of the evaluation rows behind them.

    rows: {"run", "seed", "temperature" (None where it does not matter), "gate", "value", "low", "high",
           "target", "status": "met" | "missed" | "not measured", "note"}
    """

    rows: list[dict[str, Any]]
    details: list[Grid] = field(default_factory=list)

    @property
    def missed(self) -> list[dict[str, Any]]:
        return [r for r in self.rows if r["status"] == MISSED]

    def grids(self) -> list[Grid]:
        """One grid for each temperature: gates against seeds."""
        temperatures = sorted({r["temperature"] for r in self.rows}, key=lambda t: (t is not None, -(t or 0)))
        return [self._grid(t) for t in temperatures]

    def _grid(self, temperature: float | None) -> Grid:
        mine = [r for r in self.rows if r["temperature"] == temperature]
        runs = list(dict.fromkeys(_label(r) for r in mine))
        cells = {(r["gate"], _label(r)): _cell(r) for r in mine}
        targets = {r["gate"]: r["target"] for r in mine}
        rows = [[gate, target, *(cells.get((gate, run), NONE) for run in runs)] for gate, target in targets.items()]
        title = "at any temperature" if temperature is None else f"at temperature {temperature:g}"
        return Grid(f"gates {title}", ["gate", "target", *runs], rows, left=frozenset({0, 1}))

    def verdict(self) -> str:
        counts = {s: sum(r["status"] == s for r in self.rows) for s in (MET, MISSED, UNMEASURED)}
        said = f"{counts[MET]} met, {counts[MISSED]} missed, {counts[UNMEASURED]} not measured."
        where = " These are promises of the embedded world, read from evaluation rows: configs/figures.yaml has all."
        return said + (where if counts[UNMEASURED] else "")

    def render_markdown(self) -> str:
        return "\n".join([markdown(self.grids()), self.verdict(), "", markdown(self.details)]).rstrip() + "\n"

    def render_rich(self) -> Group:
        return Group(*(g.render_rich() for g in [*self.grids(), *self.details]), self.verdict())

    def to_json(self) -> dict[str, Any]:
        return {"figures": self.rows, "missed": len(self.missed)}

    def render_json(self) -> str:
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False)


def figures(
    runs: Sequence[Mapping[str, Any]],
    gates: Iterable[Gate | Mapping[str, Any]] | None = None,
    *,
    evaluation_stage: str = "evaluate",
    details: bool = True,
) -> Figures:
    """Read every gate (of the quickstart's chain by default) in every run, at every temperature it evaluated.

    Where a run has several evaluation rows of one temperature, a gate is read in the first that measures it.
    """
    known = [g if isinstance(g, Gate) else Gate(**g) for g in (chain_gates() if gates is None else gates)]
    rows: list[dict[str, Any]] = []
    grids: list[Grid] = []
    for run in runs:
        by_row = {r["row"]: r.get("metrics") or {} for r in run["rows"]}
        names = [r["row"] for r in run["rows"] if r.get("stage") == evaluation_stage and r.get("metrics")]
        seen = [Evidence(by_row[name], by_row) for name in names] or [Evidence({}, by_row)]
        head = {"run": run["run"], "seed": run.get("seed")}
        rows += [{**head, **reading} for reading in _read(known, seen)]
        if details:
            for name in names:
                grids += summarise(by_row[name], f"{_label(head)}, {name}")
    return Figures(rows, grids)


def _read(gates: Sequence[Gate], seen: Sequence[Evidence]) -> Iterable[dict[str, Any]]:
    temperatures = sorted({e.evaluation.get("temperature", 1.0) for e in seen}, reverse=True)
    for gate in gates:
        measure = MEASURES[gate.measure]
        for temperature in temperatures if measure.by_temperature else [None]:
            places = [e for e in seen if temperature in (None, e.evaluation.get("temperature", 1.0))]
            readings = [measure.read(gate, e) for e in places] or [Reading(note=NO_ROW)]
            found = next((r for r in readings if r.met is not None), readings[0])
            yield {
                "temperature": temperature,
                "gate": gate.name,
                "value": found.value,
                "low": found.low,
                "high": found.high,
                "target": measure.target.format(target=gate.target),
                "status": found.status,
                "note": found.note,
            }


def _label(row: Mapping[str, Any]) -> str:
    return f"seed {row['seed']}" if row.get("seed") is not None else str(row["run"])


def _cell(row: Mapping[str, Any]) -> str:
    if row["status"] == UNMEASURED:
        return f"{UNMEASURED}: {row['note']}" if row["note"] else UNMEASURED
    shown = interval({"mean": row["value"], "low": row["low"], "high": row["high"]})
    note = f" ({row['note']})" if row["note"] else ""
    return f"{shown}{note} {row['status']}"
