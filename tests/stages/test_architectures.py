"""The whole chain with every architecture option, two steps a stage: pretraining builds it, later stages keep it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.data.records import Document
from pipeline.llama.presets import ModelSettings, cached_numbers
from tests.architectures import CASES, FAST
from tests.stages.rows import ANSWERS, QUESTIONS, Place, train

SHORT: dict[str, Any] = {"samples": 2, "max_new_tokens": 6}
MANY = {"samples": 16, "max_new_tokens": 24}  # of a policy that hardly knows how to stop
TWO = {"steps": 2, "batch": 4}


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in CASES])
def test_the_chain_runs_and_keeps_the_architecture(case: str, tmp_path: Path) -> None:
    place, rows = Place(tmp_path), {}  # type: Place, dict[str, Row]
    texts = place.data("documents", [Document(f"{q}? {a}.") for q in QUESTIONS for a in ANSWERS])
    prompts = place.prompts()

    def run(stage: str, inputs: dict[str, Any], **config: Any) -> Any:
        rows[stage] = place.run(stage, inputs, **config)
        return rows[stage].out

    model = {"preset": "test", **CASES[case]}
    objective = "prefix" if "prefix_attention" in model else "causal"
    start = run("pretrain", {"documents": texts, "heldout": texts}, model=model, vocab_size=300, max_tokens=64,
                objective=objective, train=train(steps=2, batch_tokens=256))["policy"]  # fmt: skip
    sft = run("sft", {"policy": start, "conversations": place.demonstrations()}, train=train(**TWO))["policy"]
    reward = run("reward", {"policy": sft, "comparisons": place.pairs(), "prompts": prompts}, train=train(**TWO),
                 max_new_tokens=6, normalise_prompts=8)["model"]  # fmt: skip
    ppo = run("ppo", {"policy": sft, "reward": reward, "prompts": prompts}, iterations=2, prompts=4, minibatch=4,
              sampling=SHORT, reward={"unfinished_score": None}, train=train(**TWO))["policy"]  # fmt: skip
    chosen = run("rejection", {"policy": ppo, "reward": reward, "prompts": prompts}, prompts=8, sampling=MANY,
                 train=train(**TWO))["policy"]  # fmt: skip
    dpo = run("dpo", {"policy": chosen, "comparisons": place.pairs()}, train=train(**TWO))["policy"]
    run("evaluate", {"policies": [sft, dpo], "reference": sft, "reward": reward, "prompts": prompts,
                     "documents": texts}, max_new_tokens=6, best_of=2)  # fmt: skip
    assert rows["ppo"].log[0]["kl"] == 0.0 and rows["ppo"].log[0]["first_ratio"] == 1.0
    assert rows["ppo"].log[0]["sampler_gap"] < 1e-5
    configs = {name: (slot.path / "config.json").read_text() for name, slot in (("start", start), ("end", dpo))}
    assert configs["start"] == configs["end"]
    assert rows["evaluate"].metrics["policies"]
    shape = ModelSettings.model_validate(model).llama(300)
    assert rows["pretrain"].metrics["cache_bytes_per_token"] == 4 * cached_numbers(shape)
