"""Rows run in this process, one after another, on small models, their outputs as the store would hand them on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.data.records import Conversation, Message, Prompt
from pipeline.data.sources import write_jsonl
from pipeline.flow.artifacts import KINDS
from pipeline.flow.stage import Request, load_stage, run_stage, slots_in
from stages import STAGES
from tests.small import artifact, ask, comparison

ANSWERS = ["yes", "no", "a longer one", "x", "it is so", "never", "ten", "blue"]
QUESTIONS = ["first", "second", "what", "x?", "is it", "when", "count", "sky"]


class Place:
    """A directory in which rows run one after another, their outputs as the store would hand them on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.count = 0

    def prompts(self) -> Any:
        return self.data("prompts", [Prompt(f"p{i}", ask(q)) for i, q in enumerate(QUESTIONS)])

    def pairs(self) -> Any:
        answers = [comparison(q, f"{a} sir", "go away") for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
        return self.data("comparisons", answers)

    def demonstrations(self) -> Any:
        turns = [(*ask(q), Message("assistant", a)) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
        return self.data("conversations", [Conversation(t) for t in turns])

    def data(self, kind: str, records: list[Any]) -> Any:
        directory = self.root / f"{kind}{self.count}"
        self.count += 1
        directory.mkdir()
        write_jsonl(directory / "data.jsonl", records)
        return artifact(directory, kind)

    def run(self, stage: str, inputs: dict[str, Any], *, again: Path | None = None, **config: Any) -> Row:
        """As a plan wires it: one artifact will do for a list. `again`: what an earlier try of the row has left."""
        slots = slots_in(load_stage(STAGES[stage]))
        given = {k: [v] if slots[k].many and not isinstance(v, list) else v for k, v in inputs.items()}
        self.count += 1
        partial = again or self.root / f"row{self.count}"
        partial.mkdir(exist_ok=True)
        request = Request(
            row=stage,
            stage=stage,
            target=STAGES[stage],
            fingerprint="0" * 64,
            config=config,
            inputs={k: [v.entry() for v in value] if isinstance(value, list) else value.entry()
                    for k, value in given.items()},
            identity={},
            seed=0,
            partial=str(partial),
        )  # fmt: skip
        events: list[dict[str, Any]] = []
        return Row(run_stage(request, events.append), partial, inputs, events)


class Row:
    def __init__(self, manifest: Any, partial: Path, inputs: dict[str, Any], events: list[dict[str, Any]]) -> None:
        self.metrics, self.partial = manifest["metrics"], partial
        self.log = [e["metrics"] for e in events if e["event"] == "metrics"]
        self.said = [e["text"] for e in events if e["event"] == "said"]
        self.out: dict[str, Any] = {}
        known = [a for value in inputs.values() for a in (value if isinstance(value, list) else [value])]
        bases = {d: p for a in known for d, p in (*a.bases.items(), (a.digest, a.path))}
        for slot, entry in manifest["outputs"].items():
            base = entry["lineage"].get("base")
            self.out[slot] = KINDS[entry["kind"]](
                partial / "out" / slot, tuple(entry["files"]), entry["digest"], entry["lineage"], entry,
                bases=chain(base, bases),
            )  # fmt: skip

    def rows(self, slot: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out[slot].path / "data.jsonl").read_text().splitlines()]


def chain(base: str | None, known: dict[str, Path]) -> dict[str, Path]:
    """A base and what lies below it, nearest first, as the store would find them."""
    if base is None:
        return {}
    config = known[base] / "adapter_config.json"
    below = json.loads(config.read_text())["base_model_name_or_path"] if config.is_file() else None
    return {base: known[base], **chain(below, known)}


def train(**changes: Any) -> dict[str, Any]:
    return {"learning_rate": 1e-2, "batch": 8, "epochs": 1, "warmup": 0.0, "keep": "last", **changes}


def shape(row: Row, slot: str = "policy") -> str:
    return row.out[slot].lineage["form"]
