"""Every shipped plan loads, wires and type-checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.flow.plan import load_plan
from stages import STAGES

ROOT = Path(__file__).resolve().parent.parent
PLANS = sorted((ROOT / "configs").glob("*.yaml"))


def test_there_are_plans():
    assert {p.stem for p in PLANS} >= {"quickstart", "figures", "own", "hh", "stories"}


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_a_shipped_plan_loads(path: Path):
    plan = load_plan(path, [], STAGES)
    assert plan.rows and all(row.stage in STAGES or row.stage == "world" for row in plan.rows)


def test_a_ppo_row_of_the_quickstart_can_be_gone_on_with():
    assert load_plan(ROOT / "configs" / "quickstart.yaml", [], STAGES).row("ppo").config.train.checkpoint_every == 1


def test_every_part_is_used_by_a_plan():
    text = "".join(p.read_text() for p in (ROOT / "configs").rglob("*.yaml"))
    for part in [*(ROOT / "configs" / "model").glob("*.yaml"), *(ROOT / "configs" / "launch").glob("*.yaml")]:
        assert f"{part.parent.name}/{part.name}" in text
