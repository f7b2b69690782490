"""Every kind of adapter through SFT, reward model, PPO, rejection and DPO, two steps each, and one over another."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from pipeline.data.forest import Segment, build
from pipeline.flow.errors import UserError
from pipeline.llama.adapters import is_stacked
from pipeline.llama.heads import PolicyModel
from pipeline.llama.open import open_frozen, open_policy
from pipeline.rollout.reward import open_reward
from tests.architectures import LATENT
from tests.small import policy, save
from tests.stages.rows import Place, Row, shape, train

SHORT = {"samples": 4, "max_new_tokens": 8}
FOREST = build([[Segment([5, 6, 7, 8], weights=[1.0] * 4), Segment([9, 10], 0, weights=[1.0] * 2)]])
KINDS: dict[str, dict[str, Any]] = {
    "rank-stabilised": {"rank": 4, "rank_stabilised": True},
    "dora": {"rank": 4, "dora": True},
    "lora+": {"rank": 4, "rate_ratio": 16},
    "pissa": {"rank": 4, "alpha": 4, "initial": "pissa"},
    "ia3": {"kind": "ia3"},
    "prefix": {"kind": "prefix", "tokens": 3},
    "projected prefix": {"kind": "prefix", "tokens": 3, "projection": 8},
    "prompt": {"kind": "prompt", "tokens": 3},
    "random prompt": {"kind": "prompt", "tokens": 3, "initial": "random"},
    "p-tuning mlp": {"kind": "p_tuning", "tokens": 3, "hidden": 8},
    "p-tuning lstm": {"kind": "p_tuning", "tokens": 3, "hidden": 8, "encoder": "lstm"},
    "weights": {"kind": "weights", "train": ["model.layers.1.*", "*norm.weight"]},
}
FAST = ("pissa", "prefix")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def base(place: Place) -> Any:
    return save(place.root / "base", "policy", policy().model)


@pytest.fixture(scope="module")
def data(place: Place) -> dict[str, Any]:
    return {"prompts": place.prompts(), "pairs": place.pairs(), "chats": place.demonstrations()}


def logprobs(artifact: Any) -> torch.Tensor:
    return open_frozen(artifact).module(FOREST).logprobs_T.detach()


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow) for kind in KINDS])
def test_the_whole_chain(place: Place, base: Any, data: dict[str, Any], kind: str) -> None:
    """A new adapter in every row over the whole base; then a row that goes on from the adapter of the first."""
    settings = {"adapter": KINDS[kind]}
    two = train(epochs=2, batch=8)
    sft = place.run("sft", {"policy": base, "conversations": data["chats"]}, train=two, **settings)
    scored = place.run(
        "reward", {"policy": base, "comparisons": data["pairs"], "prompts": data["prompts"]}, train=two,
        max_new_tokens=4, **settings,
    )  # fmt: skip
    inputs = {"policy": base, "reward": scored.out["model"], "prompts": data["prompts"]}
    once = {"prompts": 4, "sampling": SHORT, "train": train()}
    ppo = place.run("ppo", inputs, iterations=1, epochs=2, minibatch=16, **once, **settings)
    rejection = place.run(
        "rejection", inputs, **{**once, "sampling": {"samples": 16, "max_new_tokens": 40}}, **settings
    )
    dpo = place.run("dpo", {"policy": base, "comparisons": data["pairs"]}, train=two, **settings)
    assert ppo.log[0]["kl"] == 0.0 and ppo.log[0]["first_ratio"] == 1.0
    assert dpo.log[0]["loss"] == pytest.approx(0.6931471806, abs=1e-7)
    whole = kind == "weights"
    for row, slot in ((sft, "policy"), (scored, "model"), (ppo, "policy"), (rejection, "policy"), (dpo, "policy")):
        lineage = row.out[slot].lineage
        assert lineage["form"] == ("full" if whole else "adapter") and lineage.get("base") == (
            None if whole else base.digest
        )
        trained = row.metrics["trained_parameters"]
        assert 0 < trained < row.metrics["parameters"] and any(f"trains {trained:,} of" in text for text in row.said)
    assert (logprobs(sft.out["policy"]) - logprobs(base)).abs().max() > 1e-4
    if not whole:
        opened_by_peft(base, sft)
    on = place.run("dpo", {"policy": sft.out["policy"], "comparisons": data["pairs"]}, train=two)
    assert on.log[0]["loss"] == pytest.approx(0.6931471806, abs=1e-7) and shape(on) == shape(sft)
    assert on.out["policy"].lineage.get("base") == sft.out["policy"].lineage.get("base")
    assert not torch.equal(logprobs(on.out["policy"]), logprobs(sft.out["policy"]))
    critic = {"policy": sft.out["policy"], "reward": scored.out["model"], "prompts": data["prompts"]}
    tuned = place.run("ppo", critic, iterations=1, critic={"start": "policy"}, **once)
    assert tuned.log[0]["kl"] == 0.0 and tuned.log[0]["first_ratio"] == 1.0


@pytest.mark.slow
def test_the_whole_chain_over_latent_attention(place: Place, data: dict[str, Any]) -> None:
    """LoRA lies on what compresses keys, values and queries, and on what makes them of that."""
    base = save(place.root / "latent", "policy", policy(**LATENT, q_lora_rank=10).model)
    test_the_whole_chain(place, base, data, "rank-stabilised")


def opened_by_peft(base: Any, row: Row) -> None:
    """The folder is an ordinary one: plain peft over the base computes what our opening does."""
    ids = FOREST.ids_T[None, :4]
    with torch.no_grad():
        plain = peft.PeftModel.from_pretrained(open_policy(base).model, str(row.out["policy"].path)).eval()
        logits = plain(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -4:]
        expected = logits.log_softmax(-1)[:3].gather(1, ids[0, 1:, None])[:, 0]
        ours = PolicyModel(open_frozen(row.out["policy"]).model)(FOREST).logprobs_T[1:4]
    assert (ours - expected).abs().max() <= 1e-5


@pytest.fixture(scope="module")
def sft(place: Place, base: Any, data: dict[str, Any]) -> Row:
    return place.run(
        "sft", {"policy": base, "conversations": data["chats"]}, train=train(epochs=4), adapter={"rank": 4}
    )


@pytest.mark.parametrize("beneath", ["merge", "stack"])
def test_an_adapter_over_an_adapter(place: Place, base: Any, sft: Row, data: dict[str, Any], beneath: str) -> None:
    """The first is part of what is trained, saved and opened again, in every row: never left out, never trained on."""
    first, settings = sft.out["policy"], {"adapter": {"rank": 2, "targets": "attention", "beneath": beneath}}
    dpo = place.run("dpo", {"policy": first, "comparisons": data["pairs"]}, train=train(epochs=2), **settings)
    second = dpo.out["policy"]
    assert dpo.log[0]["loss"] == pytest.approx(0.6931471806, abs=1e-7)
    assert second.lineage["base"] == first.digest and list(second.bases) == [first.digest, base.digest]
    assert not torch.equal(logprobs(second), logprobs(first))
    opened = open_policy(second).model
    assert is_stacked(opened) == (beneath == "stack")
    with torch.no_grad():  # by hand: the first adapter merged into the base, the second over it
        whole = peft.PeftModel.from_pretrained(open_policy(base).model, str(first.path)).merge_and_unload()
        both = PolicyModel(peft.PeftModel.from_pretrained(whole, str(second.path)).eval())(FOREST).logprobs_T
    assert (logprobs(second) - both).abs().max() <= 1e-5
    untrained = load_file(second.path / "adapter_model.safetensors")
    assert {t.shape[0] for k, t in untrained.items() if ".lora_A." in k} == {2}

    scored = place.run(
        "reward", {"policy": first, "comparisons": data["pairs"], "prompts": data["prompts"]}, train=train(),
        max_new_tokens=4, **settings,
    )  # fmt: skip
    assert scored.out["model"].lineage["base"] == first.digest
    assert open_reward(scored.out["model"]).shift == scored.out["model"].lineage["shift"]  # and its probe is reproduced
    inputs = {"policy": second, "reward": scored.out["model"], "prompts": data["prompts"]}
    once = {"iterations": 1, "prompts": 4, "sampling": SHORT, "train": train()}
    for more, below in (({}, first), (settings, second)):  # trained on, and a third over it
        ppo = place.run("ppo", inputs, **once, **more)
        assert ppo.log[0]["kl"] == 0.0 and ppo.log[0]["first_ratio"] == 1.0
        assert ppo.out["policy"].lineage["base"] == below.digest
        assert not torch.equal(logprobs(ppo.out["policy"]), logprobs(second))
        assert is_stacked(open_policy(ppo.out["policy"]).model) == (beneath == "stack")


def test_all_weights_after_an_adapter(place: Place, sft: Row, data: dict[str, Any]) -> None:
    """Merged first; what comes out is a whole policy without any base."""
    row = place.run(
        "dpo", {"policy": sft.out["policy"], "comparisons": data["pairs"]}, train=train(learning_rate=1e-9),
        adapter={"kind": "weights", "beneath": "merge"},
    )  # fmt: skip
    assert shape(row) == "full" and row.metrics["trained_parameters"] == row.metrics["parameters"]
    assert (logprobs(row.out["policy"]) - logprobs(sft.out["policy"])).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ({"rank": 2}, "the row starts from an adapter .*rank 4.* the plan asks for another .*rank 2.*adapter.beneath"),
        ({"kind": "ia3"}, "the plan asks for another .kind ia3"),
        ({"kind": "ia3", "beneath": "stack"}, "stack adds up LoRA adapters alone"),
        ({"kind": "weights"}, "the plan asks for another .kind weights"),
    ],
)
def test_an_adapter_is_not_laid_over_another_by_accident(
    place: Place, sft: Row, data: dict[str, Any], adapter: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        place.run("dpo", {"policy": sft.out["policy"], "comparisons": data["pairs"]}, adapter=adapter, train=train())
