"""`rlhf plan`: what a run would do, without doing any of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.cli.common import STORE, Json, PlanFile, Sets, StoreDir, print_json, print_table, stage_table
from pipeline.cli.run import AcceptCode, SkipBad, plan_sets

if TYPE_CHECKING:
    from pipeline.flow.plan import Plan, Row, RowState
    from pipeline.flow.stage import Slot


def plan(
    plan: PlanFile,
    sets: Sets = None,
    skip_bad: SkipBad = False,
    accept_code: AcceptCode = False,
    store: StoreDir = STORE,
    json: Json = False,
) -> None:
    """Show the rows of a plan: types, fingerprints, which are fresh, stale or pending, and why."""
    from pipeline.flow.plan import load_plan, survey
    from pipeline.flow.store import Store

    loaded = load_plan(plan, plan_sets(sets, skip_bad), stage_table())
    document = plan_document(loaded, survey(loaded, Store(store), accept_code))
    if json:
        print_json(document)
        return
    lines = []
    for row in document["rows"]:
        lines.append([row["row"], row["status"], (row["fingerprint"] or "")[:12], row["why"]])
        for slot, wired in row["inputs"].items():
            origins = wired["from"] if isinstance(wired["from"], list) else [wired["from"]]
            lines.append([f"  {slot}: {wired['type']}", "", "", f"<- {', '.join(origins)}"])
        lines += [[f"  -> {slot}: {kind}", "", "", ""] for slot, kind in row["outputs"].items()]
    print_table(("row", "", "fingerprint", "why"), lines)


def plan_document(loaded: Plan, states: list[RowState]) -> dict[str, Any]:
    """What `rlhf plan --json` prints; inputs that the plan leaves open are left out.

    {"plan", "rows": [{"row", "stage", "status": "fresh"|"stale"|"pending", "fingerprint", "why", "waits_for",
                       "inputs": {slot: {"type", "from": REF | [REF, ...]}}, "outputs": {slot: type}}]}
    """
    return {
        "plan": loaded.name,
        "rows": [
            {
                "row": row.name,
                "stage": row.stage,
                "status": state.status,
                "fingerprint": state.fingerprint,
                "why": state.why,
                "waits_for": state.waits_for,
                "inputs": _inputs(row),
                "outputs": {slot.name: slot.kinds[0].__name__ for slot in row_outputs(row)},
            }
            for row, state in zip(loaded.rows, states, strict=True)
        ],
    }


def _inputs(row: Row) -> dict[str, Any]:
    from pipeline.flow.stage import slots_in

    found = {}
    for name, slot in slots_in(row.cls).items():
        refs = row.inputs.get(name)
        if refs:
            origin = [ref.text for ref in refs] if isinstance(refs, list) else refs.text
            found[name] = {"type": slot.expects, "from": origin}
    return found


def row_outputs(row: Row) -> list[Slot]:
    from pipeline.flow.stage import slots_out

    withheld = row.cls.withheld(row.config)
    return [slot for slot in slots_out(row.cls).values() if slot.name not in withheld]
