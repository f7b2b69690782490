"""`rlhf estimate`: what the rows of a plan cost, before any of them runs."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.common import Json, PlanFile, Sets, print_json, print_table, stage_table

if TYPE_CHECKING:
    from pipeline.estimate.devices import Device
    from pipeline.estimate.rows import Estimate


def estimate(
    plan: PlanFile,
    sets: Sets = None,
    device: Annotated[
        str | None, typer.Option(help="h100, h200, a100-80, a100-40, l40s, rtx4090 or cpu; default: what launch says")
    ] = None,
    peak: Annotated[float | None, typer.Option(metavar="TFLOPS", help="peak of a device that is not known")] = None,
    memory: Annotated[float | None, typer.Option(metavar="GB", help="its memory (GB are 1e9 bytes)")] = None,
    utilisation: Annotated[float, typer.Option(help="share of the peak that products reach")] = 0.4,
    tokens: Annotated[
        float | None, typer.Option(help="tokens of a training row whose records nobody has counted")
    ] = None,
    prompt: Annotated[int, typer.Option(help="tokens of a prompt, where the plan does not say")] = 256,
    model: Annotated[
        str | None, typer.Option(metavar="PRESET", help="shape of policies without a path, e.g. llama-3-8b")
    ] = None,
    json: Json = False,
) -> None:
    """Say what a plan costs: parameters, operations, time, memory of a rank, the largest token budget that fits."""
    from pipeline.estimate.devices import device as known
    from pipeline.estimate.rows import Wishes
    from pipeline.estimate.rows import estimate as estimates
    from pipeline.flow.plan import load_plan

    _require(peak=peak, memory=memory, utilisation=utilisation, tokens=tokens, prompt=float(prompt))
    loaded = load_plan(plan, sets or [], stage_table())
    chosen = known(
        device,
        peak=None if peak is None else peak * 1e12,
        memory=None if memory is None else memory * 1e9,
        default="h100" if loaded.launch.get("device") == "cuda" else "cpu",
    )
    found = estimates(loaded, chosen, Wishes(utilisation, tokens, prompt, model))
    if model and not any(source.kind.is_model and not source.paths for source in loaded.sources.values()):
        print(
            f"--model {model}: changes nothing, no source of this plan is a model without a path; the shape of what a "
            "row pretrains is a setting of it, such as pretrain.model",
            file=sys.stderr,
        )
    document = estimate_document(loaded.name, chosen, utilisation, found)
    print_json(document) if json else _print(document, found)


def _require(**options: float | None) -> None:
    for name, value in options.items():
        most = 1.0 if name == "utilisation" else math.inf
        if value is not None and not (math.isfinite(value) and 0 < value <= most):
            bound = "above 0, at most 1" if name == "utilisation" else "above 0"
            raise typer.BadParameter(f"{value:g} is not a number {bound}", param_hint=f"--{name}")


def estimate_document(name: str, device: Device, utilisation: float, found: list[Estimate]) -> dict[str, Any]:
    """What `rlhf estimate --json` prints; bytes, seconds and operations as plain numbers.

    {"plan", "device": {"name", "bf16", "fp32", "memory"}, "utilisation",
     "rows": [{"row", "stage", "trained", "frozen", "ranks", "tokens", "per_million", "operations", "seconds",
               "memory": {"total", "phase", "parts": {PART: BYTES}, "phases": {PHASE: BYTES}, "host"},
               "room": BYTES|null, "token_budget", "largest_token_budget", "fits", "advice": TEXT|null,
               "notes": [TEXT]}]}
    """
    from pipeline.estimate.advice import advice

    return {
        "plan": name,
        "device": {"name": device.name, "bf16": device.bf16, "fp32": device.fp32, "memory": device.memory},
        "utilisation": utilisation,
        "rows": [
            {
                "row": one.row,
                "stage": one.stage,
                "trained": one.trained,
                "frozen": one.frozen,
                "ranks": one.work.layout.ranks,
                "tokens": round(one.cost.tokens),
                "per_million": one.cost.per_million,
                "operations": one.cost.computed + one.cost.drawn,
                "seconds": one.seconds,
                "memory": {
                    "total": round(one.peak.total),
                    "phase": one.peak.phase,
                    "parts": {part: round(size) for part, size in one.peak.parts.items()},
                    "phases": {phase: round(size) for phase, size in one.peak.phases.items()},
                    "host": round(one.peak.host),
                },
                "room": round(one.room) if math.isfinite(one.room) else None,
                "token_budget": one.work.token_budget,
                "largest_token_budget": one.budget,
                "fits": one.fits,
                "advice": _advice(one, advice),
                "notes": list(one.notes),
            }
            for one in found
        ],
    }


def _advice(one: Estimate, advice: Any) -> str | None:
    if one.fits:
        return None
    if one.budget:
        return f"--set {one.row}.{one.key}={one.budget}"
    return advice(one)


def _print(document: dict[str, Any], found: list[Estimate]) -> None:
    from pipeline.estimate.memory import MOST, human

    device = document["device"]
    print(
        f"{device['name']}: {human(device['memory'])}, {device['bf16'] / 1e12:g} TFLOP/s in bf16, "
        f"{device['fp32'] / 1e12:g} in float32, of which {document['utilisation']:.0%} are used"
    )
    lines = [
        [
            row["row"],
            f"{row['trained']:,}",
            f"{row['frozen']:,}",
            ("each " if row["per_million"] else "") + quantity(row["tokens"]),
            quantity(row["operations"]),
            duration(row["seconds"]),
            human(row["memory"]["total"]) + ("" if row["fits"] else " !"),
            row["memory"]["phase"],
            "none" if not row["largest_token_budget"]
            else f"{row['largest_token_budget']:,}{'+' if row['largest_token_budget'] >= MOST else ''}",
        ]
        for row in document["rows"]
    ]  # fmt: skip
    head = ("row", "trained", "frozen", "tokens", "operations", "time", "memory a rank", "while", "largest budget")
    print_table(head, lines, right=(1, 2, 3, 4, 5, 6, 8))
    for row in document["rows"]:
        if row["advice"]:
            words = "nothing fits" if not row["largest_token_budget"] else "too much"
            print(f"\n{row['row']}: {words} ({human(row['room'])} a rank); {row['advice']}")
    notes: dict[str, list[str]] = {}
    for row in document["rows"]:
        for note in row["notes"]:
            notes.setdefault(note, []).append(row["row"])
    for note, rows in notes.items():
        print(f"\n{', '.join(rows)}: {note}")


def quantity(number: float) -> str:
    """
    >>> quantity(950), quantity(1.234e6), quantity(4.04e22)
    ('950', '1.23 M', '4.04e+22')
    """
    for unit, size in (("", 1.0), (" k", 1e3), (" M", 1e6), (" G", 1e9), (" T", 1e12), (" P", 1e15)):
        if number < 1000 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.2e}"


def duration(seconds: float) -> str:
    """
    >>> duration(0.2), duration(75), duration(7300), duration(260000)
    ('under 1 s', '1:15', '2:01:40', '3.0 days')
    """
    if seconds < 1:
        return "under 1 s"
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.1f} days"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
