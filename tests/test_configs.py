"""Every shipped plan loads, wires and type-checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.flow.errors import UserError
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


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["sft.adapter={rank: 4}", "dpo.adapter={rank: 4}", "ppo.adapter={}"], r"row ppo: .*\(kind lora, rank 4\)"),
        (
            ["sft.adapter={rank: 4}", "ppo.adapter={rank: 2, beneath: stack}", "dpo.adapter={rank: 4}"],
            "row dpo: .*rank 2",
        ),
        (["sft.adapter={rank: 4}", "dpo.adapter={kind: weights}"], "row dpo: .* another .kind weights"),
        (
            ["ppo.adapter={kind: ia3}", "rejection.adapter={kind: prompt}"],
            "row rejection: .*kind ia3.* another .kind prompt",
        ),
    ],
)
def test_an_adapter_over_another_is_refused_before_any_row_runs(sets: list[str], told: str):
    with pytest.raises(UserError, match=told):
        load_plan(ROOT / "configs" / "own.yaml", sets, STAGES)


@pytest.mark.parametrize(
    "sets",
    [
        ["sft.adapter={rank: 4}", "dpo.adapter={rank: 4, dropout: 0.1}"],  # how it is trained makes it no other one
        ["sft.adapter={rank: 4, initial: pissa}", "dpo.adapter={rank: 8, alpha: 64}"],  # saved as such a LoRA
        ["sft.adapter={rank: 4}", "ppo.adapter={kind: weights, beneath: merge}", "dpo.adapter={kind: ia3}"],
        ["sft.adapter={rank: 4}", "reward.adapter={rank: 2, beneath: merge}", "dpo.adapter={rank: 2, beneath: stack}"],
    ],
)
def test_an_adapter_that_goes_with_the_one_below_it_is_not(sets: list[str]):
    load_plan(ROOT / "configs" / "own.yaml", sets, STAGES)


def test_every_part_is_used_by_a_plan():
    text = "".join(p.read_text() for p in (ROOT / "configs").rglob("*.yaml"))
    for part in [*(ROOT / "configs" / "model").glob("*.yaml"), *(ROOT / "configs" / "launch").glob("*.yaml")]:
        assert f"{part.parent.name}/{part.name}" in text
