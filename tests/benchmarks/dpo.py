"""DPO against TRL's DPOTrainer; comparisons a second (preference.py says how it is measured).

The prompt is three quarters of the tokens, and both sides compute the reference's log-probs before they train.

    spread      prompts of 48 to 192 tokens, answers of a third of that, give or take a half
    equal       prompts of 120 tokens, answers of 40: nothing is padded
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.benchmarks.preference import Task, measure, smoke
from tests.benchmarks.shapes import save_models, shapes


def run(*, small: bool = False, repeats: int | None = None) -> list[dict[str, Any]]:
    repeats = repeats or (2 if small else 5)
    lines: list[dict[str, Any]] = []
    for name, shape in shapes(small).items():
        with tempfile.TemporaryDirectory() as folder:
            spread = Task(
                **shape, kind="dpo", models=folder, shortest=48, longest=192, share=0.75, turns=repeats + 2
            )  # fmt: skip
            spread = smoke(spread) if small else spread
            save_models(spread, Path(folder))
            middle = (spread.shortest + spread.longest) // 2 // 8 * 8
            equal = replace(spread, shortest=middle, longest=middle, spread=0.0)
            for label, task in {"spread": spread, "equal": equal}.items():
                lines += measure("dpo", f"{name}, {label}", task, "DPOTrainer", small, repeats)
    return lines
