"""Rows of plans: models along the wiring, tokens where the plan knows them, and every shipped plan without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.estimate.devices import DEVICES, device
from pipeline.estimate.following import WORLD
from pipeline.estimate.memory import states as states_of
from pipeline.estimate.memory import whole_weights
from pipeline.estimate.rows import Estimate, Wishes, estimate
from pipeline.flow.errors import UserError
from pipeline.flow.plan import load_plan
from pipeline.llama.presets import PRESETS
from stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
EIGHT = 8_030_261_248


def rows(plan: str, *sets: str, on: str = "cpu", **wishes: Any) -> dict[str, Estimate]:
    loaded = load_plan(ROOT / "configs" / plan, sets, STAGES)
    return {found.row: found for found in estimate(loaded, device(on), Wishes(**wishes))}


def test_every_shipped_plan_is_estimated_without_torch():
    code = """
import json, sys
from pathlib import Path
from pipeline.cli import main
for path in sorted(Path("configs").glob("*.yaml")):
    try:
        main(["estimate", str(path), "--model", "llama-3-8b", "--json"])
    except SystemExit as ended:
        assert not ended.code, (path, ended.code)
assert not {"torch", "transformers"} & set(sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    decoder, at, seen = json.JSONDecoder(), 0, 0
    while at < len(ended.stdout.rstrip()):
        document, at = decoder.raw_decode(ended.stdout, at)
        at, seen = at + 1, seen + 1
        assert document["rows"] and all(row["memory"]["total"] > 0 for row in document["rows"])
    assert seen == len(list((ROOT / "configs").glob("*.yaml")))


def test_models_follow_the_wiring():
    found = rows("quickstart.yaml")
    policy, scalar = found["pretrain"].trained, found["reward"].trained
    assert policy == 918_656 and scalar == policy + 128  # tied: the scalar head comes on top
    assert (found["sft"].trained, found["sft"].frozen) == (policy, 0)
    assert (found["ppo"].trained, found["ppo"].frozen) == (policy + scalar, policy + scalar)
    assert found["evaluate"].trained == 0


def test_the_world_says_how_many_tokens_there_are():
    found = rows("quickstart.yaml")
    assert not any(row.cost.per_million or row.notes for row in found.values())
    half = rows("quickstart.yaml", "sources.world.documents=30000")
    assert half["pretrain"].cost.computed == pytest.approx(found["pretrain"].cost.computed / 2)
    steps = rows("quickstart.yaml", "pretrain.train.steps=10")
    assert steps["pretrain"].cost.tokens == 10 * 2048


def test_ppo_counts_what_a_run_of_it_recorded(monkeypatch: pytest.MonkeyPatch):
    """Seed 0 of the quickstart drew 54,658 tokens and learnt from 146,196: 2 epochs of 1,024 prompts with answers."""
    assert rows("quickstart.yaml")["ppo"].cost.tokens == 16 * 64 * (4 * 13 + 2 * (18 + 4 * 13))
    monkeypatch.setattr("pipeline.estimate.rows.WORLD_ANSWER", 54_658 / 4096)
    monkeypatch.setitem(WORLD, "prompts", (146_196 / 2 - 54_658) / 1024)
    assert rows("quickstart.yaml")["ppo"].cost.tokens == pytest.approx(200_854)


def test_ppo_counts_the_records_that_are_learnt_beside():
    """32 documents of 37 tokens in each of 16 x 2 x 4 updates; none while the critic warms up."""
    found = rows("ppo-variants.yaml")
    plain, beside = found["ppo"], found["ppo@ptx"]
    assert beside.cost.tokens - plain.cost.tokens == 128 * 32 * 37
    assert beside.cost.computed / plain.cost.computed > 1.5
    warmed = rows("ppo-variants.yaml", "ppo@ptx.critic.warmup=2")["ppo@ptx"]
    assert warmed.cost.tokens - plain.cost.tokens == 112 * 32 * 37


def test_files_of_a_user_are_not_counted():
    found = rows("own.yaml")
    assert found["pretrain"].cost.per_million and found["pretrain"].cost.tokens == 1e6
    assert not rows("own.yaml", tokens=5e6)["pretrain"].cost.per_million


def test_adapters_leave_a_base_frozen_that_ppo_holds_once():
    found = rows("llama3-8b-lora.yaml", on="h100", model="llama-3-8b")
    lora = 41_943_040
    assert (found["sft"].trained, found["sft"].frozen) == (lora, EIGHT)
    assert found["ppo"].trained == 2 * lora + 4096
    work = found["ppo"].work
    roles = (*work.trained, *work.frozen)
    assert len(roles) == 4 and whole_weights(roles, work.shared) == pytest.approx(4 * EIGHT, rel=0.03)  # float32
    assert found["dpo"].work.trained == found["sft"].work.trained


def test_stages_of_zero_by_their_states():
    wishes = {"on": "h100", "model": "llama-7b"}
    for stage, states in ((1, 38.5), (2, 26.25), (3, 14.0)):
        found = rows("llama3-8b-zero3.yaml", f"launch.zero_stage={stage}", **wishes)["sft"]
        layout = found.work.layout
        assert (layout.ranks, layout.stage, layout.half) == (8, stage, True)
        held = states_of(7e9, ranks=layout.ranks, stage=layout.stage, widths=layout.widths)
        assert held.device == pytest.approx(states * 1e9)


def test_a_model_directory_says_its_shape(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **PRESETS["stories-15m"]}))
    given = (f"sources.base.path={tmp_path}",)
    assert rows("stories.yaml", *given)["sft"].trained == 15_191_712
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}')
    with pytest.raises(UserError, match=r"config.json: vocab_size is missing"):
        rows("stories.yaml", *given)


def test_an_adapter_directory_stands_over_its_base(tmp_path: Path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir(), adapter.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama", **PRESETS["stories-15m"]}))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    sets = [f"sources.base.path={adapter}", "sources.base.base=below"]
    sets.append(f"sources.below={{kind: policy, path: {base}}}")
    found = rows("stories.yaml", *sets)["sft"]
    assert (found.trained, found.frozen) == (6 * 4 * (288 * 2) * 2, 15_191_712)


def test_a_shape_that_nobody_knows_is_asked_for():
    with pytest.raises(UserError, match="sources.base.path is not given.*--model PRESET"):
        rows("stories.yaml")
    with pytest.raises(UserError, match="did you mean 'llama-3-8b'"):
        rows("stories.yaml", model="llama-3-8")


def test_time_follows_the_device():
    slow, fast = (rows("quickstart.yaml", on=name) for name in ("a100-80", "h100"))
    ratio = DEVICES["h100"].bf16 / DEVICES["a100-80"].bf16
    assert slow["pretrain"].seconds / fast["pretrain"].seconds == pytest.approx(ratio)
    assert rows("quickstart.yaml", utilisation=0.2)["sft"].seconds == pytest.approx(
        2 * rows("quickstart.yaml", utilisation=0.4)["sft"].seconds
    )


def test_a_model_that_is_gone_on_from_keeps_its_shape_and_reading_far_is_counted():
    depths = "evaluate@2x.context.depths=1"
    one, none = (rows("context.yaml", depths, f"evaluate@2x.context.passkey={lengths}") for lengths in ("[256]", "[]"))
    assert one["pretrain"].trained == one["pretrain@yarn-4x"].trained > 0
    more = one["evaluate@2x"].cost.computed - none["evaluate@2x"].cost.computed
    shape = one["pretrain"].work.trained[0].shape
    models, texts = 10 + 8, 10
    pairs = texts * 256 * 257 / 2
    products = 2 * (texts * 256 * shape.trunk + texts * 3 * shape.table) + 4 * shape.layers * shape.queries * pairs
    assert more == pytest.approx(models * products)
    assert one["pretrain"].cost.tokens == 2400 * 2048 and one["pretrain@yarn-4x"].cost.tokens == 30 * 2048
