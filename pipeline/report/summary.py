"""Tables for people from what evaluation rows record, and of the best-of-n curve that rejection sampling records too.

rlhf show RUN evaluate        the grids of one row, below everything that is recorded about it
{"temperature": 1.0, "policies": {"sft": {"proxy": 0.1, "gold": 0.6, "win_rate": null, ...}, ...},
 "reward_model": {...}, "best_of_n": {...}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.tables import NONE, Grid, interval, number

# key of the evaluation row -> heading, digits
COLUMNS = {
    "gold": ("gold", 3),
    "proxy": ("proxy reward", 3),
    "heldout": ("held-out reward", 3),
    "kl": ("KL, nats", 2),
    "length": ("tokens", 1),
    "stop_rate": ("stopped", 3),
    "text_perplexity": ("perplexity", 2),
}
DECIDED_BY = {
    "gold": "the judge",
    "heldout": "the held-out reward model",
    "proxy": "the reward model that was trained against",
}
# key of a best-of-n table -> heading, digits
BEST_OF_N = {
    "reward": ("reward", 3),
    "by_reward": ("gold, chosen by reward", 3),
    "by_gold": ("gold, chosen by gold", 3),
    "recovered": ("gain recovered", 2),
}
FEW = 20  # prompts below which resampling them says nothing about others
CARD = {
    "labels": "against the labels",
    "length": "length alone, against the labels",
    "clear": "clear pairs, true order",
    "clear_labellers": "clear pairs, the labellers themselves",
    "correctness": "pairs that differ in correctness alone",
}


def summarise(evaluation: Mapping[str, Any], title: str = "evaluation") -> list[Grid]:
    """Every grid that the row's metrics allow: policies, parts of the judge, reward model, best of n, contexts."""
    grids = [policies_grid(evaluation, title)]
    for more in (parts_grid, reward_grid, best_of_n_grid, positions_grid, passkey_grid, passkey_places_grid):
        grid = more(evaluation)
        if grid is not None:
            grids.append(grid)
    return grids


def row_grids(metrics: Mapping[str, Any], title: str) -> list[Grid]:
    """What can be shown as tables of any row's metrics; [] of most."""
    if "policies" in metrics:
        return summarise(metrics, title)
    grid = best_of_n_grid(metrics)
    return [grid] if grid else []


def policies_grid(evaluation: Mapping[str, Any], title: str = "policies") -> Grid:
    """Policies against metrics; columns that no policy has are left out."""
    policies: Mapping[str, Mapping[str, Any]] = evaluation["policies"]
    columns = [k for k in COLUMNS if any(p.get(k) is not None for p in policies.values())]
    versus = sorted({p["win_rate"]["vs"] for p in policies.values() if p.get("win_rate")})
    head = ["policy", *(f"wins over {v}" for v in versus), *(COLUMNS[k][0] for k in columns)]
    prompts = evaluation.get("prompts")
    few = prompts is not None and prompts < FEW
    rows = []
    for name, p in policies.items():
        rate = p.get("win_rate")
        won = [(number(rate) if few else interval(rate)) if rate and rate["vs"] == v else NONE for v in versus]
        rows.append([name, *won, *(number(p.get(k), COLUMNS[k][1]) for k in columns)])
    note = f"{prompts} prompts are too few to say how others would go." if few else ""
    return Grid(_title(evaluation, title, bool(versus)), head, rows, note)


def _title(evaluation: Mapping[str, Any], title: str, compared: bool) -> str:
    """The row, how it sampled, and who decided the wins."""
    temperature, prompts = evaluation.get("temperature"), evaluation.get("prompts")
    facts = [title, *([f"temperature {temperature:g}"] if temperature is not None else [])]
    facts += [f"{prompts} prompts"] if prompts is not None else []
    decided = DECIDED_BY.get(evaluation.get("decided_by") or "")
    return ", ".join(facts) + (f"; wins by {decided}" if compared and decided else "")


def parts_grid(evaluation: Mapping[str, Any]) -> Grid | None:
    """Mean of each part of the judge, with the win rate on that part beside it. None without a judge."""
    policies: Mapping[str, Mapping[str, Any]] = evaluation["policies"]
    parts = list(dict.fromkeys(k for p in policies.values() for k in p.get("gold_parts") or {}))
    if not parts:
        return None
    rows = []
    for name, p in policies.items():
        means, won = p.get("gold_parts") or {}, p.get("win_rate_parts") or {}
        rows.append([name, *(number(means.get(k)) + _wins(won.get(k)) for k in parts)])
    return Grid("parts of the judge (wins on that part)", ["policy", *parts], rows)


def _wins(rate: Mapping[str, Any] | None) -> str:
    return f" ({interval(rate, 2)})" if rate else ""


def reward_grid(evaluation: Mapping[str, Any]) -> Grid | None:
    """The reward model's scorecard; None where it was not computed."""
    card = evaluation.get("reward_model")
    if not card:
        return None
    rows = [[label, interval(card[key]), str(card[key]["count"])] for key, label in CARD.items() if card.get(key)]
    direction = (card.get("length") or {}).get("direction")
    note = f"Length alone: the {direction} one is taken to be better." if direction else ""
    return Grid("reward model: accuracy", ["pairs", "accuracy", "count"], rows, note)


def best_of_n_grid(metrics: Mapping[str, Any]) -> Grid | None:
    """Reward and gold score of the best of n, chosen by reward and by gold; None where it was not computed."""
    table = metrics.get("best_of_n")
    if not table or not table.get("rows"):
        return None
    shown = {key: cell for key, cell in BEST_OF_N.items() if any(r.get(key) is not None for r in table["rows"])}
    rows = [[str(r["n"]), *(interval(r.get(key), digits) for key, (_, digits) in shown.items()),
             number(r["kl_bound"], 2)] for r in table["rows"]]  # fmt: skip
    title = f"best of n samples of {table['policy']}" if table.get("policy") else "best of n"
    return Grid(title, ["n", *(head for head, _ in shown.values()), "KL bound, nats"], rows)


def positions_grid(evaluation: Mapping[str, Any]) -> Grid | None:
    """Perplexity of each policy by position in a window; None where it was not measured."""
    found = {name: context["positions"] for name, context in _contexts(evaluation).items()}
    spans = list(dict.fromkeys((b["from"], b["to"]) for buckets in found.values() for b in buckets))
    if not spans:
        return None
    rows = []
    for name, buckets in found.items():
        by_span = {(b["from"], b["to"]): b["perplexity"] for b in buckets}
        rows.append([name, *(number(by_span.get(span), 2) for span in spans)])
    return Grid("perplexity by position", ["policy", *(f"{low} to {high - 1}" for low, high in spans)], rows)


def passkey_grid(evaluation: Mapping[str, Any]) -> Grid | None:
    """Share of pass keys that each policy retrieves by the length of the text, over all places of the key, and in
    brackets the mean nats of a token of a key."""
    found = {name: context["passkey"] for name, context in _contexts(evaluation).items()}
    lengths = sorted({row["length"] for rows in found.values() for row in rows})
    if not lengths:
        return None
    rows = []
    for name, measured in found.items():
        by_length = [[r for r in measured if r["length"] == length] for length in lengths]
        rows.append([name, *(_retrieved(those) for those in by_length)])
    return Grid("pass keys retrieved (nats a token), by tokens of the text", ["policy", *map(str, lengths)], rows)


def passkey_places_grid(evaluation: Mapping[str, Any]) -> Grid | None:
    """The same by place, 0 the beginning, a row for each policy and length."""
    found = {name: context["passkey"] for name, context in _contexts(evaluation).items()}
    places = sorted({row["depth"] for rows in found.values() for row in rows})
    if not places:
        return None
    rows = []
    for name, measured in found.items():
        for length in sorted({r["length"] for r in measured}):
            by_place = {r["depth"]: r["accuracy"] for r in measured if r["length"] == length}
            rows.append([name, str(length), *(number(by_place.get(place), 2) for place in places)])
    head = ["policy", "tokens", *(f"at {place:g}" for place in places)]
    return Grid("pass keys retrieved, by place of the key", head, rows)


def _contexts(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What was measured of contexts: the reference under other positions, then the policies."""
    before = {f"{evaluation['reference']} as {name}": found for name, found in evaluation.get("untrained", {}).items()}
    return before | {name: p["context"] for name, p in evaluation["policies"].items() if p.get("context")}


def _retrieved(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return NONE
    accuracy, nll = (sum(row[key] for row in rows) / len(rows) for key in ("accuracy", "nll"))
    return f"{number(accuracy, 2)} ({number(nll, 2)})"
