"""`rlhf estimate` against what rows really hold: the predicted peak of every stage on a CPU over a grid of settings,
and the most memory that its process ever held. A row runs for a few steps of full passes in a process of its own.

The prediction must be within 15 % of the measured peak. `ours` and `rival` are the predicted and the measured MB.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.common import MARK, Figure, say, wanted

WITHIN = 0.15
WORDS = [f"w{i}" for i in range(400)]
MODEL = {"num_attention_heads": 8, "num_key_value_heads": 4}
PLAN = """
launch: {threads: 1, device: cpu}
sources:
  text: {kind: documents, path: text.jsonl}
  chats: {kind: conversations, path: chats.jsonl}
  pairs: {kind: comparisons, path: pairs.jsonl}
  asks: {kind: prompts, path: asks.jsonl}
rows:
  - pretrain: {documents: text}
  - sft: {policy: pretrain.policy, conversations: chats}
  - reward: {policy: sft.policy, comparisons: pairs, prompts: asks}
  - ppo: {policy: sft.policy, reward: reward.model, prompts: asks}
  - rejection: {policy: sft.policy, reward: reward.model, prompts: asks}
  - dpo: {policy: sft.policy, comparisons: pairs}
  - evaluate: {policies: [sft.policy, dpo.policy], reward: reward.model, prompts: asks}
"""


def cases(small: bool) -> dict[str, dict[str, Any]]:
    """Settings by name: shape, tokens a pass, precision, recomputation, adapters."""
    if small:
        return {"smoke": {"hidden": 64, "layers": 2, "budget": 1024}}
    return {
        "fp32": {"hidden": 256, "layers": 4, "budget": 4096},
        "bf16": {"hidden": 384, "layers": 4, "budget": 2048, "precision": "bf16"},
        "recomputed": {"hidden": 256, "layers": 8, "budget": 4096, "checkpointing": True},
        "LoRA": {"hidden": 384, "layers": 4, "budget": 2048, "adapter": {"rank": 8}},
        "QLoRA": {"hidden": 384, "layers": 4, "budget": 2048, "adapter": {"rank": 8, "quantise": {"kind": "nf4"}}},
        "int8": {"hidden": 384, "layers": 4, "budget": 2048, "adapter": {"rank": 8, "quantise": {"kind": "int8"}}},
    }


def run(*, small: bool = False, repeats: int | None = None) -> list[dict[str, Any]]:
    """`repeats` is not used: memory does not depend on how busy the machine is."""
    lines = []
    for name, case in cases(small).items():
        if wanted(name) or os.environ.get("BENCH_CASE", "").startswith(f"{name},"):
            lines += _measure(name, case, small)
    worst = max(lines, key=lambda line: abs(line["error"]))
    say(f"largest error {worst['error']:+.1%} ({worst['case']}) of {len(lines)} rows")
    if not small and (beyond := [line["case"] for line in lines if abs(line["error"]) > WITHIN]):
        say(f"beyond {WITHIN:.0%}: {', '.join(beyond)}")
    return lines


def _measure(name: str, case: Mapping[str, Any], small: bool) -> list[dict[str, Any]]:
    from pipeline.estimate.devices import device
    from pipeline.estimate.rows import Wishes, estimate
    from pipeline.flow.plan import load_plan, request
    from pipeline.flow.store import Store
    from stages import STAGES

    lines = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _write_records(root, case["budget"])
        (root / "plan.yaml").write_text(PLAN + json.dumps({"stages": settings(case)})[1:-1])
        plan, store = load_plan(root / "plan.yaml", [], STAGES), Store(root / "store")
        predicted = {e.row: e for e in estimate(plan, device("cpu"), Wishes())}
        known: dict[str, str] = {}
        for row in plan.rows:
            asked = request(plan, row, store, known)
            partial = store.prepare(asked)
            asked.write(partial / "request.json")
            measured = _run(partial / "request.json", root / "manifest.json")
            store.seal(asked.fingerprint, json.loads((root / "manifest.json").read_text()))
            known[row.name] = asked.fingerprint
            label = f"{name}, {row.name}"
            if not wanted(label):
                continue
            found = predicted[row.name]
            mb = found.peak.total / 2**20
            error = mb / measured - 1
            say(f"  {label}: predicted {mb:.0f}, measured {measured:.0f} MB, {error:+.1%}, while {found.peak.phase}")
            more = {"error": round(error, 4), "phase": found.peak.phase}
            figure = Figure("estimate", label, mb, measured, "MB", higher_is_better=False, more=more)
            lines.append(figure.line())
    return lines


def _run(request: Path, manifest: Path) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.estimate_row", str(request), str(manifest)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    marked = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not marked:
        raise SystemExit(f"{request}: {done.stderr[-2000:]}")
    return float(json.loads(marked[-1][len(MARK) :])["mb"])


def settings(case: Mapping[str, Any]) -> dict[str, Any]:
    """Of all stages: two steps, each of two full passes."""
    hidden, budget = case["hidden"], case["budget"]
    train = {
        "token_budget": budget, "steps": 2, "precision": case.get("precision", "fp32"),
        "checkpointing": case.get("checkpointing", False), "warmup": 0.0,
    }  # fmt: skip
    shape = {**MODEL, "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": case["layers"]}
    lora = {"adapter": case["adapter"]} if "adapter" in case else {}
    batched = train | {"batch_tokens": 2 * budget}
    drawn = {"samples": 4, "max_new_tokens": 64}
    return {
        "pretrain": {"model": shape, "vocab_size": 512, "max_tokens": 256, "train": batched},
        "sft": {"max_tokens": 256, "train": batched, **lora},
        "reward": {"max_tokens": 256, "max_new_tokens": 64, "normalise_prompts": 64, "train": batched, **lora},
        "ppo": {
            "max_tokens": 192, "iterations": 1, "prompts": 32, "minibatch": 128, "epochs": 1, "sampling": drawn,
            "train": {k: v for k, v in train.items() if k != "steps"}, **lora,
        },
        "rejection": {
            "max_tokens": 192, "prompts": 32, "sampling": drawn, "token_budget": budget, "train": batched, **lora,
        },
        "dpo": {"max_tokens": 256, "train": batched, **lora},
        "evaluate": {"prompts": 64, "max_tokens": 192, "max_new_tokens": 64, "token_budget": budget},
    }  # fmt: skip


def _write_records(root: Path, budget: int) -> None:
    """Texts of which a few fill a pass, prompts and answers as long as the settings allow."""
    draw = random.Random(0)
    text = lambda n: " ".join(draw.choices(WORDS, k=n))
    count = 8 * budget // 128 + 64
    ask = lambda: [{"role": "user", "content": text(40)}]
    rows: dict[str, list[Any]] = {
        "text": [{"text": text(100)} for _ in range(count)],
        "chats": [{"messages": [*ask(), {"role": "assistant", "content": text(50)}]} for _ in range(count)],
        "pairs": [
            {"prompt": ask(), "chosen": [{"role": "assistant", "content": text(30)}],
             "rejected": [{"role": "assistant", "content": text(30)}]}
            for _ in range(count)
        ],
        "asks": [{"prompt": ask()} for _ in range(96)],
    }  # fmt: skip
    for name, records in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
