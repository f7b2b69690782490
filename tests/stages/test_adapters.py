"""Every stage in this process on small models: whole policies, adapters from SFT to DPO, and what each must prove."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.data.groups import conversation_groups
from pipeline.data.records import Message, Prompt, Rated
from pipeline.flow.errors import RowFailed, UserError
from pipeline.llama.open import open_frozen
from pipeline.rollout.collect import Sampler, encode_prompts
from pipeline.rollout.engine import SamplingSettings
from pipeline.rollout.noise import NoiseKey
from pipeline.rollout.reward import open_reward
from pipeline.train.loop import Trainer
from pipeline.train.strategy import Strategy, for_row
from tests.small import artifact, ask, chat, comparison, policy, save
from tests.stages.rows import ANSWERS, QUESTIONS, Place, Row, shape, train

LORA = {"adapter": {"rank": 4}}
SHORT = {"samples": 4, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def base(place: Place) -> Any:
    return save(place.root / "base", "policy", policy().model)


@pytest.fixture(scope="module")
def prompts(place: Place) -> Any:
    return place.prompts()


@pytest.fixture(scope="module")
def pairs(place: Place) -> Any:
    return place.pairs()


@pytest.fixture(scope="module")
def demonstrations(place: Place) -> Any:
    return place.demonstrations()


@pytest.fixture(scope="module")
def sft(place: Place, base: Any, demonstrations: Any) -> Row:
    inputs = {"policy": base, "conversations": demonstrations}
    return place.run("sft", inputs, train=train(epochs=60), adapter={"rank": 8, "alpha": 32})


@pytest.fixture(scope="module")
def reward(place: Place, sft: Row, pairs: Any, prompts: Any) -> Row:
    inputs = {"policy": sft.out["policy"], "comparisons": pairs, "heldout": pairs, "prompts": prompts}
    return place.run("reward", inputs, train=train(epochs=4), max_new_tokens=8)


@pytest.fixture(scope="module")
def ppo(place: Place, sft: Row, reward: Row, prompts: Any) -> Row:
    inputs = {"policy": sft.out["policy"], "reward": reward.out["model"], "prompts": prompts}
    return place.run("ppo", inputs, iterations=2, prompts=4, minibatch=6, sampling=SHORT, train=train())


@pytest.fixture(scope="module")
def rejection(place: Place, ppo: Row, reward: Row, prompts: Any) -> Row:
    inputs = {"policy": ppo.out["policy"], "reward": reward.out["model"], "prompts": prompts}
    return place.run("rejection", inputs, sampling={"samples": 8, "max_new_tokens": 60}, train=train())


@pytest.fixture(scope="module")
def dpo(place: Place, rejection: Row, pairs: Any) -> Row:
    inputs = {"policy": rejection.out["policy"], "comparisons": pairs, "heldout": pairs}
    return place.run("dpo", inputs, train=train(epochs=3, batch=6))


def test_a_policy_trained_on_a_few_answers_gives_them_and_stops(place: Place, base: Any, demonstrations: Any) -> None:
    """T2: overfitted on eight answers, whole weights; all eight end at the right place by themselves."""
    row = place.run("sft", {"policy": base, "conversations": demonstrations}, train=train(epochs=60))
    role = open_frozen(row.out["policy"])
    settings = SamplingSettings(temperature=0, max_new_tokens=30)
    asked = encode_prompts([Prompt(q, ask(q)) for q in QUESTIONS], role.chat, 99, 30)
    found = Sampler(role.model, role.chat, settings, NoiseKey(0, "t")).sample(asked).samples
    assert [s.text for s in found] == ANSWERS
    assert all(s.stopped for s in found)
    assert shape(row) == "full" and row.metrics["accuracy"] == 1.0
    assert {"round1/nll", "round1/accuracy"} <= set(row.log[-1])


def test_sft_trains_an_adapter_over_the_base(base: Any, sft: Row) -> None:
    made = sft.out["policy"]
    assert made.lineage["form"] == "adapter" and made.lineage["base"] == base.digest
    assert json.loads((made.path / "adapter_config.json").read_text())["base_model_name_or_path"] == base.digest
    assert sft.metrics["loss"] < sft.log[0]["nll"] - 2  # embeddings and head of the random base stay
    assert all(torch.isfinite(t).all() for t in load_file(made.path / "adapter_model.safetensors").values())


def test_the_reward_model_carries_the_policys_adapter_and_its_own_head(base: Any, sft: Row, reward: Row) -> None:
    made = reward.out["model"]
    assert made.lineage["form"] == "adapter" and made.lineage["base"] == base.digest
    assert made.lineage["normalised_on"] == "samples of the policy"
    assert any(key.endswith("score.weight") for key in load_file(made.path / "adapter_model.safetensors"))
    assert open_reward(made).shift == made.lineage["shift"]  # and its probe is reproduced
    assert reward.metrics["heldout_accuracy"] == 1.0 and reward.metrics["heldout_pairs"] == 8


def test_ppo_starts_at_the_adapter_that_it_got(base: Any, sft: Row, ppo: Row) -> None:
    """T37, T32: the reference is the SFT adapter over the base, not the base; ratios start at exactly 1."""
    assert ppo.out["policy"].lineage["base"] == base.digest and shape(ppo) == "adapter"
    assert ppo.log[0]["kl"] == 0.0 and ppo.log[1]["kl"] != 0.0
    assert [line["first_ratio"] for line in ppo.log] == [1.0, 1.0]
    assert ppo.metrics["updates"] == 2 * 2 * 4  # four groups of four samples, six wanted in a minibatch
    (said,) = [text for text in ppo.said if "predicted peak memory" in text]
    assert said.startswith("trains ")


def test_rejection_trains_on_its_best_and_writes_pairs(rejection: Row) -> None:
    samples = rejection.rows("samples")
    assert len(samples) == 64 and all(len(s["logprobs"]) == len(s["ids"]) for s in samples)
    best: dict[str, tuple[float, str]] = {}
    for s in samples:  # the first of equal ones stays
        if s["stopped"] and s["text"].strip() and s["scores"]["proxy"] > best.get(s["prompt"]["id"], (-1e9, ""))[0]:
            best[s["prompt"]["id"]] = (s["scores"]["proxy"], s["text"])
    chosen = [c["messages"][-1]["content"] for c in rejection.rows("conversations")]
    assert sorted(chosen) == sorted(text for _, text in best.values()) and len(chosen) >= 4
    for row in rejection.rows("comparisons"):
        assert row["completions"][0]["score"] > row["completions"][1]["score"]
    assert shape(rejection) == "adapter" and rejection.metrics["chosen"] == len(chosen)


def test_dpo_starts_at_ln_2_over_an_adapter_and_learns(base: Any, dpo: Row) -> None:
    """T28, T30: the reference is the adapter that it got; steps of 6 over 8 pairs reach into the next epoch."""
    assert dpo.log[0]["loss"] == pytest.approx(0.6931471806, abs=1e-7) and dpo.log[0]["margin"] == 0.0
    assert dpo.log[-1]["loss"] < 0.6 and dpo.metrics["heldout_accuracy"] == 1.0
    assert dpo.out["policy"].lineage["base"] == base.digest and shape(dpo) == "adapter"


def test_the_base_and_every_input_stay_as_they_were(place: Place, base: Any, dpo: Row, reward: Row) -> None:
    """T28: nothing that a row reads is written to."""
    assert artifact(base.path, "policy").digest == base.digest
    for row, slot in ((reward, "model"), (dpo, "policy")):
        made = row.out[slot]
        assert artifact(made.path, made.kind).digest == made.digest


def test_adapters_and_whole_policies_are_evaluated_side_by_side(
    place: Place, base: Any, sft: Row, dpo: Row, reward: Row, prompts: Any
) -> None:
    inputs = {
        "policies": [base, dpo.out["policy"]], "reference": sft.out["policy"], "reward": reward.out["model"],
        "prompts": prompts,
    }  # fmt: skip
    row = place.run("evaluate", inputs, max_new_tokens=8)
    found = row.metrics["policies"]
    kls = [p["kl"] for p in found.values()]
    assert len(found) == 3 and kls[2] == 0.0 and kls[0] > 0.0 and kls[1] != 0.0
    assert row.metrics["decided_by"] == "proxy"


def test_a_full_policy_may_become_an_adapter_at_any_stage(place: Place, base: Any, pairs: Any, prompts: Any) -> None:
    """A new adapter over the policy that the row got: its reference is that policy, and its base too."""
    row = place.run("dpo", {"policy": base, "comparisons": pairs}, train=train(epochs=2), **LORA)
    assert row.log[0]["loss"] == pytest.approx(0.6931471806, abs=1e-7)
    assert row.out["policy"].lineage["base"] == base.digest
    scored = place.run("reward", {"policy": base, "comparisons": pairs}, train=train(), **LORA)
    assert scored.out["model"].lineage["normalised_on"] == "compared answers"
    inputs = {"policy": base, "reward": scored.out["model"], "prompts": prompts}
    tuned = place.run("ppo", inputs, iterations=1, prompts=4, sampling=SHORT, train=train(), **LORA)
    assert tuned.log[0]["kl"] == 0.0 and tuned.out["policy"].lineage["base"] == base.digest


def test_the_schedule_of_ppo_spans_exactly_its_updates(
    place: Place, sft: Row, reward: Row, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six samples wanted in a minibatch are one whole group of four, so five groups are five minibatches."""
    made: list[Trainer] = []

    class Kept(Trainer):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            made.append(self)

    monkeypatch.setattr("pipeline.train.loop.Trainer", Kept)
    inputs = {"policy": sft.out["policy"], "reward": reward.out["model"], "prompts": prompts}
    place.run("ppo", inputs, iterations=1, prompts=5, minibatch=6, sampling=SHORT, train=train())
    assert [(trainer.done, trainer.total) for trainer in made] == [(10, 10)]


def test_more_processes_than_groups_in_a_minibatch_are_refused(
    place: Place, sft: Row, reward: Row, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Three(Strategy):
        world = property(lambda self: 3)  # type: ignore[assignment]

    one = for_row
    monkeypatch.setattr("pipeline.train.strategy.for_row", lambda *a, **k: Three(one(*a, **k).accelerator))
    inputs = {"policy": sft.out["policy"], "reward": reward.out["model"], "prompts": prompts}
    with pytest.raises(UserError, match="8 samples are 2 whole prompt groups, fewer than the 3 processes"):
        place.run("ppo", inputs, iterations=1, prompts=8, minibatch=8, sampling=SHORT, train=train())


def test_another_adapter_than_the_one_at_hand_is_refused(place: Place, sft: Row, pairs: Any) -> None:
    with pytest.raises(UserError, match="the plan asks for another"):
        place.run("dpo", {"policy": sft.out["policy"], "comparisons": pairs}, adapter={"rank": 2})


def test_dropout_is_off_where_ratios_are_taken(place: Place, base: Any, pairs: Any, prompts: Any) -> None:
    """T28, T33: adapters with dropout start PPO and DPO as exactly as those without, and it is said."""
    half = {"adapter": {"rank": 4, "dropout": 0.5}}
    first = place.run("dpo", {"policy": base, "comparisons": pairs}, train=train(epochs=2), **half)
    row = place.run("dpo", {"policy": first.out["policy"], "comparisons": pairs}, train=train())
    assert row.log[0]["loss"] == pytest.approx(0.6931471806, abs=1e-7)
    assert any("dropout is off" in text for text in row.said)
    scored = place.run("reward", {"policy": first.out["policy"], "comparisons": pairs}, train=train())
    inputs = {"policy": first.out["policy"], "reward": scored.out["model"], "prompts": prompts}
    tuned = place.run("ppo", inputs, iterations=2, prompts=4, sampling=SHORT, train=train())
    assert tuned.log[0]["kl"] == 0.0 and [line["first_ratio"] for line in tuned.log] == [1.0, 1.0]
    stored = json.loads((tuned.out["policy"].path / "adapter_config.json").read_text())
    assert stored["lora_dropout"] == 0.5


def test_a_reference_that_is_not_the_start_is_refused(
    place: Place, base: Any, sft: Row, reward: Row, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base below an adapter is not where the row starts: asserted at run time, before the first update."""
    import pipeline.train.roles as roles

    monkeypatch.setattr(roles, "open_start", lambda *start: open_frozen(base))
    inputs = {"policy": sft.out["policy"], "reward": reward.out["model"], "prompts": prompts}
    with pytest.raises(RowFailed, match="the reference is not the policy that this row starts from"):
        place.run("ppo", inputs, iterations=1, prompts=4, sampling=SHORT, train=train())


def test_pairs_that_do_not_fit_are_left_out_of_every_count(place: Place, base: Any) -> None:
    data = place.data("comparisons", [comparison("q", "good", "bad"), comparison("q", "good" * 30, "bad")])
    inputs = {"policy": base, "comparisons": data, "heldout": data}
    row = place.run("reward", inputs, max_tokens=40, train=train())
    assert (row.metrics["comparisons"], row.metrics["dropped_too_long"], row.metrics["heldout_pairs"]) == (1, 1, 1)
    assert row.metrics["heldout_accuracy_interval"]["count"] == 1


def test_rejection_trains_on_the_sample_alone(
    place: Place, base: Any, reward: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An assistant turn with a tool call inside the prompt's last round carries no loss."""
    trained: list[float] = []

    def spy(*arguments: Any) -> Any:
        encoded = conversation_groups(*arguments)
        trained.extend(sum(group[0].weights or ()) for group in encoded.groups)
        return encoded

    monkeypatch.setattr("pipeline.data.groups.conversation_groups", spy)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = (*ask("add"), Message("assistant", None, tool_calls=(call,)), Message("tool", "two"))
    inputs = {"policy": base, "reward": reward.out["model"], "prompts": place.data("prompts", [Prompt("p", turns)])}
    row = place.run("rejection", inputs, sampling={"samples": 64, "max_new_tokens": 6}, train=train())
    (text,) = [c["messages"][-1]["content"] for c in row.rows("conversations")]
    assert trained == [len(chat().completion_ids(text))]


LOSSES = {  # loss -> what it starts at, None where that depends on the policy
    "sigmoid": 0.6931471806,
    "robust": 0.6931471806,
    "ipo": 25.0,
    "hinge": 1.0,
    "sigmoid_norm": 0.6931471806,
    "apo_zero": 1.0,
    "llama3": None,
    "simpo": None,
    "orpo": None,
    "kto": 0.5,
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_preference_loss_trains(
    place: Place, base: Any, pairs: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of half the records each, from the loss that policy = reference gives; the second is lower."""
    from pipeline.algo.preference import LOSSES as known
    from pipeline.train import reference

    assert set(LOSSES) == set(known)
    taken: list[Any] = []
    found = reference._summed
    monkeypatch.setattr(reference, "_summed", lambda *a: taken.append(a) or found(*a))
    count = 16 if name == "kto" else 8  # comparisons are split for it
    inputs = {"policy": base, "comparisons": pairs, "heldout": pairs}
    gentle = train(learning_rate=1e-3, batch=count // 2)
    row = place.run("dpo", inputs, loss={"name": name}, train=gentle)
    start = LOSSES[name]
    assert len(row.log) == 2
    assert start is None or row.log[0]["loss"] == pytest.approx(start, rel=2e-7)
    assert row.metrics["heldout_loss"] < row.log[0]["loss"]
    assert row.metrics["rated" if name == "kto" else "comparisons"] == count
    assert bool(taken) == known[name].needs_reference  # else nothing was computed for one
    assert ("margin" in row.log[1]) == known[name].paired and ("reference_point" in row.log[1]) == (name == "kto")


@pytest.fixture(scope="module")
def rated(place: Place) -> Any:
    texts = [f"{a} sir" if i % 2 else "go away" for i, a in enumerate(ANSWERS)]
    records = [Rated(ask(q), text, text != "go away") for q, text in zip(QUESTIONS, texts, strict=True)]
    return place.data("rated", records)


def test_kto_learns_from_ratings_and_comparisons_together(place: Place, base: Any, rated: Any, pairs: Any) -> None:
    inputs = {"policy": base, "rated": rated, "comparisons": pairs, "heldout_rated": rated}
    row = place.run("dpo", inputs, loss={"name": "kto", "beta": 0.3}, train=train(epochs=3), **LORA)
    assert row.metrics["rated"] == 8 + 16 and row.metrics["heldout_accuracy"] == 1.0
    assert row.metrics["reward_desirable"] > 0 > row.metrics["reward_undesirable"]
    assert row.log[0]["loss"] == 0.5 and row.log[-1]["loss"] < 0.4
    assert row.metrics["read"]["rated"]["records"] == 8 and row.metrics["read"]["comparisons"]["records"] == 8
    assert not any("answers are desirable" in text for text in row.said)  # 12 of 24
    with pytest.raises(UserError, match="comparisons and rated: no record is left"):
        place.run("dpo", inputs, loss={"name": "kto"}, max_tokens=8, train=train())


def test_the_short_settings_are_the_losss_own(place: Place, base: Any, pairs: Any) -> None:
    """`beta` beside the loss and within it are the same run, to the bit."""
    inputs = {"policy": base, "comparisons": pairs}
    short = place.run("dpo", inputs, beta=0.3, sft_coefficient=0.2, train=train())
    long = place.run("dpo", inputs, loss={"beta": 0.3, "sft_coefficient": 0.2}, train=train())
    assert short.out["policy"].digest == long.out["policy"].digest
    assert short.log[0]["preference_loss"] == pytest.approx(0.6931471806, abs=1e-7)
    assert short.log[0]["loss"] == pytest.approx(0.6931471806 + 0.2 * short.log[0]["sft_nll"], rel=1e-6)
