"""Reward models against TRL's RewardTrainer; comparisons a second (preference.py says how it is measured).

pairs       two dialogues of one prompt, which is half of the tokens of each
K = 4       a ranking of four answers, computed together; the rival trains on its six pairs
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
            pairs = Task(**shape, kind="reward", models=folder, turns=repeats + 2)
            pairs = smoke(pairs) if small else pairs
            save_models(pairs, Path(folder))
            rankings = replace(pairs, answers=4, batch=pairs.batch // 2)
            for label, task in {"pairs": pairs, "K = 4": rankings}.items():
                lines += measure("reward", f"{name}, {label}", task, "RewardTrainer", small, repeats)
    return lines
