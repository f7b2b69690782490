"""What is said where nothing fits."""

from __future__ import annotations

import re

import pytest

from pipeline.estimate.advice import advice
from pipeline.estimate.devices import device
from pipeline.estimate.rows import Estimate, Wishes, estimate
from pipeline.flow.plan import load_plan
from stages import STAGES
from tests.estimate.test_rows import ROOT

BASE = ["launch.processes=8", "launch.strategy=ddp", "stages.sft.adapter=null"]


def sft(*sets: str, gb: float) -> Estimate:
    plan = load_plan(ROOT / "configs" / "llama3-8b-lora.yaml", [*BASE, *sets], STAGES)
    found = estimate(plan, device("h100", memory=gb * 1e9), Wishes(model="llama-3-8b"))
    return next(one for one in found if one.row == "sft")


def test_one_change_that_is_enough_is_told_with_its_budget():
    found = sft(gb=80)
    assert found.budget == 0 and not found.fits
    told = advice(found)
    assert "--set launch.strategy=deepspeed --set launch.zero_stage=3" in told
    assert "--set sft.adapter.rank=16" in told and "checkpointing" not in told  # the plan has it already


def test_what_is_told_does_fit():
    found = sft(gb=80)
    for option in advice(found).split("; or "):
        sets = re.findall(r"--set (\S+)", option)
        assert sft(*(s for s in sets), gb=80).budget > 0, option


def test_two_changes_where_one_is_not_enough():
    found = sft("stages.sft.train.checkpointing=false", "stages.sft.max_tokens=16000", gb=80)
    told = advice(found)
    assert "sft.train.checkpointing=true" in told and re.search(r"checkpointing=true --set|--set .*checkpointing", told)


def test_nothing_is_enough_for_a_device_that_is_too_small():
    assert advice(sft(gb=1)).startswith("no change here is enough")


@pytest.mark.parametrize("gb", [200, 400])
def test_a_row_that_fits_has_a_budget(gb: float):
    found = sft(gb=gb)
    assert found.fits and found.budget >= found.work.token_budget
