"""QLoRA, and LoRA over int8, through SFT, reward model, PPO, rejection and DPO, two steps each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.data.forest import Segment, build
from pipeline.flow.errors import UserError
from pipeline.llama import quantise_settings
from pipeline.llama.open import open_frozen, open_policy
from pipeline.rollout.reward import open_reward
from pipeline.train.loop import Trainer
from tests.small import policy, save
from tests.stages.rows import Place, Row, train

SHORT = {"samples": 4, "max_new_tokens": 8}
FOREST = build([[Segment([5, 6, 7, 8], weights=[1.0] * 4), Segment([9, 10], 0, weights=[1.0] * 2)]])
NF4: dict[str, Any] = {"kind": "nf4"}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "nf4 in bf16": {"kind": "nf4", "double": False, "compute": "bf16"},
    "int8": {"kind": "int8"},
    "int8 with outliers": {"kind": "int8", "threshold": 1.0},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("quantised"))


@pytest.fixture(scope="module")
def base(place: Place) -> Any:
    return save(place.root / "base", "policy", policy(hidden_size=64, intermediate_size=128).model)


@pytest.fixture(scope="module")
def data(place: Place) -> dict[str, Any]:
    return {"prompts": place.prompts(), "pairs": place.pairs(), "chats": place.demonstrations()}


def logprobs(artifact: Any) -> torch.Tensor:
    return open_frozen(artifact).module(FOREST).logprobs_T.detach()


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k == "nf4" else pytest.mark.slow) for k in KINDS])
def test_the_whole_chain(place: Place, base: Any, data: dict[str, Any], kind: str) -> None:
    """Every row quantises the whole base; then rows that go on from quantised ones without being told."""
    adapter = {"rank": 4, "quantise": KINDS[kind]}
    two = train(epochs=2, batch=8)
    sft = place.run("sft", {"policy": base, "conversations": data["chats"]}, train=two, adapter=adapter)
    scored = place.run(
        "reward", {"policy": sft.out["policy"], "comparisons": data["pairs"], "prompts": data["prompts"]}, train=two,
        max_new_tokens=4,
    )  # fmt: skip
    first = {"policy": base, "reward": scored.out["model"], "prompts": data["prompts"]}
    once = {"prompts": 4, "sampling": SHORT, "train": train()}
    ppo = place.run("ppo", first, iterations=1, epochs=2, minibatch=16, adapter=adapter, **once)
    then = first | {"policy": ppo.out["policy"]}
    rejection = place.run("rejection", then, **{**once, "sampling": {"samples": 16, "max_new_tokens": 40}})
    dpo = place.run("dpo", {"policy": rejection.out["policy"], "comparisons": data["pairs"]}, train=two)
    assert ppo.log[0]["kl"] == 0.0 and ppo.log[0]["first_ratio"] == 1.0
    assert dpo.log[0]["loss"] == pytest.approx(0.6931471806, abs=1e-7)
    assert open_reward(scored.out["model"]).shift == scored.out["model"].lineage["shift"]  # its probe is reproduced
    before = open_policy(base).model
    weights = sum(p.numel() for p in before.parameters())
    for row, slot in ((sft, "policy"), (scored, "model"), (ppo, "policy"), (rejection, "policy"), (dpo, "policy")):
        lineage, files = row.out[slot].lineage, {p.name for p in row.out[slot].path.iterdir()}
        assert lineage["form"] == "adapter" and lineage["base"] == base.digest
        assert lineage["base_quantisation"]["kind"] == KINDS[kind]["kind"]
        assert "base_quantisation.json" in files and not any(name.startswith("model") for name in files)
        trained = row.metrics["trained_parameters"]
        head = 64 - before.lm_head.weight.numel() if slot == "model" else 0
        assert row.metrics["parameters"] == weights + trained + head  # two of 4 bits in a byte are two
    assert not torch.equal(logprobs(sft.out["policy"]), logprobs(base))
    opened = open_policy(dpo.out["policy"]).model
    assert quantise_settings.of(opened) == quantise_settings.stored(dpo.out["policy"].path)
    assert not list(place.root.rglob("*.bin")) and not list(place.root.rglob("*.pt"))


@pytest.fixture(scope="module")
def sft(place: Place, base: Any, data: dict[str, Any]) -> Row:
    return place.run(
        "sft", {"policy": base, "conversations": data["chats"]}, train=train(epochs=4),
        adapter={"rank": 4, "quantise": NF4},
    )  # fmt: skip


def test_merged_into_restored_weights(place: Place, sft: Row, data: dict[str, Any]) -> None:
    """T54, peft#2321: nothing is rounded to 4 bits again; in float32 what comes out is what went in."""
    row = place.run(
        "dpo", {"policy": sft.out["policy"], "comparisons": data["pairs"]}, train=train(learning_rate=1e-9),
        adapter={"kind": "weights", "beneath": "merge"},
    )  # fmt: skip
    assert row.out["policy"].lineage["form"] == "full" and "base_quantisation" not in row.out["policy"].lineage
    assert (logprobs(row.out["policy"]) - logprobs(sft.out["policy"])).abs().max() <= 1e-5
    assert 0 < row.metrics["merge_error"] <= 1e-5 and any("outputs differ by" in text for text in row.said)


@pytest.mark.parametrize("beneath", ["merge", "stack"])
def test_an_adapter_over_a_quantised_one(place: Place, base: Any, sft: Row, data: dict[str, Any], beneath: str) -> None:
    """Stacked they share its base; merged, the sum is whole again unless the row quantises it anew."""
    first = sft.out["policy"]
    for quantise in (None, NF4):
        adapter = {"rank": 2, "beneath": beneath, "quantise": quantise}
        dpo = place.run("dpo", {"policy": first, "comparisons": data["pairs"]}, train=train(epochs=2), adapter=adapter)
        assert dpo.log[0]["loss"] == pytest.approx(0.6931471806, abs=1e-7)
        second = dpo.out["policy"]
        assert second.lineage["base"] == first.digest
        stored = quantise_settings.stored(second.path)
        assert (stored is None) == (beneath == "merge" and quantise is None)
        assert quantise_settings.of(open_policy(second).model) == stored
        on = place.run("dpo", {"policy": second, "comparisons": data["pairs"]}, train=train(learning_rate=1e-12))
        assert (logprobs(on.out["policy"]) - logprobs(second)).abs().max() <= 1e-6


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_killed_it_goes_on_to_the_same_bits(
    place: Place, base: Any, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The base is quantised anew from the same weights, and no checkpoint holds it."""
    inputs = {"policy": base, "conversations": data["chats"]}
    config = {"adapter": {"rank": 4, "quantise": NF4}, "train": train(epochs=4, checkpoint_every=2)}
    whole = place.run("sft", inputs, **config)
    step = Trainer.step

    def killed(trainer: Trainer, *arguments: Any, **named: Any) -> dict[str, float]:
        if trainer.done == 3:
            raise Killed
        return step(trainer, *arguments, **named)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Trainer, "step", killed)
        place.run("sft", inputs, again=tmp_path, **config)
    (saved,) = tmp_path.rglob("tensors.safetensors")
    assert all("lora_" in key for key in load_file(saved))
    found = place.run("sft", inputs, again=tmp_path, **config)
    assert any("goes on after step 2" in text for text in found.said)
    assert found.out["policy"].digest == whole.out["policy"].digest


def test_other_bits_under_an_adapter_are_refused(place: Place, base: Any, sft: Row, data: dict[str, Any]) -> None:
    inputs = {"policy": sft.out["policy"], "comparisons": data["pairs"]}
    with pytest.raises(UserError, match="adapter.quantise: the weights under the adapter .* are quantised otherwise"):
        place.run("dpo", inputs, adapter={"rank": 4, "quantise": {"kind": "int8"}}, train=train())
    narrow = save(place.root / "narrow", "policy", policy().model)
    with pytest.raises(UserError, match="nf4 takes rows of whole blocks of 64 weights, and .*q_proj has rows of 32"):
        place.run("dpo", inputs | {"policy": narrow}, adapter={"rank": 4, "quantise": NF4}, train=train())


def test_damaged_settings_beside_an_adapter_are_named(place: Place, sft: Row, tmp_path: Any) -> None:
    copy = tmp_path / "adapter"
    copy.mkdir()
    for file in sft.out["policy"].path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "base_quantisation.json").write_text(json.dumps({"kind": "nf4", "double": "perhaps"}))
    with pytest.raises(UserError, match="base_quantisation.json: nf4.double: .*expected what `adapter.quantise` takes"):
        quantise_settings.stored(copy)
