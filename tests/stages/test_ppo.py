"""PPO's settings through the stage, on small models: each trains, starts exactly, and says what it must."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.data.forest import Segment, build
from pipeline.data.records import Document, Prompt
from pipeline.flow.errors import Damaged, NonFinite, UserError
from pipeline.flow.stage import Workspace
from pipeline.llama.heads import at_last
from pipeline.llama.make import new_classifier
from pipeline.rollout.reward import open_reward, write_probe
from pipeline.rollout.rewards import Rewards
from pipeline.train.memory import human
from pipeline.train.ppo_settings import PpoSettings
from pipeline.train.roles import open_roles
from stages.ppo import Ppo
from tests.small import ask, policy, save
from tests.stages.rows import Place, Row, train

SHORT = {"samples": 4, "max_new_tokens": 6}
SMALL: dict[str, Any] = {
    "iterations": 2, "prompts": 4, "minibatch": 8, "sampling": SHORT,
    "reward": {"unfinished_score": None}, "train": {**train(), "checkpoint_every": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("ppo"))


@pytest.fixture(scope="module")
def inputs(place: Place) -> dict[str, Any]:
    base = save(place.root / "base", "policy", policy().model)
    reward = place.run("reward", {"policy": base, "comparisons": place.pairs(), "prompts": place.prompts()},
                       train=train(epochs=4), max_new_tokens=6)  # fmt: skip
    return {"policy": base, "reward": reward.out["model"], "prompts": place.prompts()}


def weights(row: Row, slot: str = "policy") -> dict[str, torch.Tensor]:
    (path,) = row.out[slot].path.glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"advantage": "rloo"},
        {"advantage": "grpo"},
        {"advantage": "grpo", "divide": False, "average_over": "answers"},
        {"advantage": "reinforce++", "whiten": True},
        {"kl": {"where": "loss", "estimator": "k2"}},
        {"kl": {"where": "loss", "estimator": "exact"}},
        {"kl": {"estimator": "exact", "control": "band"}},
        {"kl": {"estimator": "k3", "control": "adaptive", "stop": 0.5}},
        {"critic": {"start": "shared"}},
        {"critic": {"start": "policy", "learning_rate": 1e-3}},
        {"reference": {"kind": "average", "decay": 0.5}},
        {"reference": {"kind": "refreshed", "every": 2}},
        {"clip_high": 0.3, "dual_clip": 3.0, "value_lam": 1.0, "entropy_coefficient": 0.01},
        {"importance": {"correct": True}},
        {"adapter": {"rank": 4}, "critic": {"start": "policy"}},
    ],
    ids=str,
)
def test_every_setting_trains_and_starts_exactly(place: Place, inputs: dict[str, Any], settings: dict[str, Any]):
    row = place.run("ppo", inputs, **{**SMALL, **settings})
    assert row.log[0]["kl"] == 0.0 and row.log[0]["first_ratio"] == 1.0 == row.log[1]["first_ratio"]
    assert row.log[1]["kl"] != 0.0
    assert row.log[0]["sampler_gap"] < 1e-5  # the sampler and the trainer are one policy
    critic = settings.get("advantage", "gae") == "gae"
    assert ("value_loss" in row.log[0]) is critic
    assert row.log[0]["gradient_norm/policy"] > 0 if critic else "gradient_norm/policy" not in row.log[0]


def test_the_critic_starts_as_the_normalised_reward(inputs: dict[str, Any]):
    """At an answer's last token the reward model's score is what the critic says, its shift with it."""
    forest = build([[Segment([5, 6, 7]), Segment([8, 9], 0)]])
    reward = open_reward(inputs["reward"])
    critic = open_roles(inputs["policy"], inputs["reward"], PpoSettings(), None, 0).actor.value
    assert reward.shift != 0.0
    assert at_last(critic(forest), forest).tolist() == pytest.approx(
        [score + reward.shift for score in at_last(reward.model(forest), forest).tolist()], abs=1e-6
    )


def test_a_warm_up_trains_the_critic_alone(place: Place, inputs: dict[str, Any]):
    for start in ("reward", "shared"):
        critic = {"start": start, "warmup": 2}
        row = place.run("ppo", inputs, **{**SMALL, "critic": critic})
        assert row.log[1]["kl"] == 0.0  # the policy has not moved at all
        before = load_file(inputs["policy"].path / "model.safetensors")
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights(row).items())
        assert row.log[1]["value_loss"] != row.log[0]["value_loss"] and row.log[0]["gradient_norm/value"] > 0


def test_a_moving_average_of_the_policy_is_an_artifact_of_its_own(place: Place, inputs: dict[str, Any]):
    """After one update with decay 0.75 it stands a quarter of the way."""
    one = {**SMALL, "iterations": 1, "epochs": 1, "minibatch": 16, "average": 0.75}
    row = place.run("ppo", inputs, **one)
    start = load_file(inputs["policy"].path / "model.safetensors")
    after, average = weights(row), weights(row, "average")
    for name, tensor in start.items():
        torch.testing.assert_close(average[name], 0.75 * tensor + 0.25 * after[name], atol=1e-6, rtol=0)
    assert any(not torch.equal(after[name], tensor) for name, tensor in start.items())


def test_other_records_are_learnt_beside(place: Place, inputs: dict[str, Any]):
    more = {
        **inputs,
        "documents": place.data("documents", [Document("aaaa bbbb"), Document("cccc dddd")]),
        "conversations": place.demonstrations(),
    }
    mix = {"pretraining": 5.0, "sft": 5.0, "batch": 2}
    row = place.run("ppo", more, **{**SMALL, "iterations": 6, "mix": mix})
    assert row.log[-1]["pretraining_nll"] < 0.8 * row.log[0]["pretraining_nll"]
    assert row.log[-1]["sft_nll"] < row.log[0]["sft_nll"]
    with pytest.raises(UserError, match=r"ppo.mix.pretraining is 1, but the row has no input 'documents'"):
        Ppo.check(Ppo.Config(mix={"pretraining": 1.0}), frozenset(inputs))


def test_an_iteration_ends_early_where_the_policy_has_moved_far(place: Place, inputs: dict[str, Any]):
    row = place.run("ppo", inputs, **{**SMALL, "epochs": 4, "kl": {"stop": 1e-6}})
    assert row.log[0]["updates"] == 2  # the first update stands at KL 0, the second does not
    assert row.metrics["updates"] < 2 * 4 * 2


def test_an_average_beside_leaves_the_reference_where_it_was(place: Place, inputs: dict[str, Any]):
    """The reference, the average and the reward model start from equal bits, and only the average moves: the run is the
    one without an average, to the bit."""
    for reference in ({"kind": "start"}, {"kind": "refreshed", "every": 3}):
        settings = {**SMALL, "iterations": 4, "reference": reference}
        plain = place.run("ppo", inputs, **settings)
        beside = place.run("ppo", inputs, **settings, average=0.5)
        assert beside.out["policy"].digest == plain.out["policy"].digest
        assert beside.log[-1]["kl"] == plain.log[-1]["kl"]


def test_roles_over_one_base_hold_it_once(place: Place, inputs: dict[str, Any]):
    """Policy, reference, critic and reward model are adapters over one base."""
    lora = {"adapter": {"rank": 4}}
    sft = place.run("sft", {"policy": inputs["policy"], "conversations": place.demonstrations()}, train=train(), **lora)
    reward = place.run("reward", {"policy": sft.out["policy"], "comparisons": place.pairs()}, train=train())
    over = {"policy": sft.out["policy"], "reward": reward.out["model"], "prompts": inputs["prompts"]}
    row = place.run("ppo", over, **SMALL)
    (line,) = [said for said in row.said if "held once for several roles" in said]
    assert row.log[0]["kl"] == 0.0 and row.log[0]["first_ratio"] == 1.0
    # of four copies of the trunk and two of the policy's head, three and one are spared
    base = load_file(inputs["policy"].path / "model.safetensors")
    spared = sum(t.numel() * 4 * (1 if name == "lm_head.weight" else 3) for name, t in base.items())
    assert f", {human(spared)} of it held once" in line


def stopped_after(monkeypatch: pytest.MonkeyPatch, iteration: int) -> None:
    """The process ends without a word once that iteration was logged and saved."""
    progress = Workspace.progress

    def dies(self: Workspace, done: float, total: float | None = None, unit: str = "tokens", **figures: Any) -> None:
        progress(self, done, total, unit, **figures)
        if unit == "iterations" and done == iteration + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Workspace, "progress", dies)


MOVING: dict[str, Any] = {
    **SMALL,
    "iterations": 4,
    "kl": {"control": "adaptive", "target": 0.01, "horizon": 100},
    "reference": {"kind": "average"},
    "average": 0.9,
    "train": {**SMALL["train"], "evaluations": 4, "keep": "best"},
}


def test_a_row_that_was_stopped_goes_on_to_the_same_bits(
    place: Place, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """Both optimisers, the controller, moving weights, the best weights and the log: the last iteration before the
    stop is saved, the one that was cut off is done again."""
    watched = {**inputs, "dev": place.prompts()}
    whole = place.run("ppo", watched, **MOVING)
    broken = place.root / "broken"
    with monkeypatch.context() as patch:
        stopped_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            place.run("ppo", watched, again=broken, **MOVING)
    shutil.rmtree(broken / "out", ignore_errors=True)
    again = place.run("ppo", watched, again=broken, **MOVING)
    assert "goes on after iteration 2, from its checkpoint" in again.said
    assert len(again.rows("samples")) == 4 * 4 * 4
    for slot in ("policy", "average", "samples"):
        assert again.out[slot].digest == whole.out[slot].digest
    assert timeless(again.metrics) == timeless(whole.metrics)
    assert lines(again) == lines(whole) and len(lines(again)) == 4


def timeless(figures: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in figures.items() if not k.startswith("time/")}


def lines(row: Row) -> list[dict[str, Any]]:
    return [timeless(json.loads(line)) for line in (row.partial / "metrics.jsonl").read_text().splitlines()]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(place: Place, inputs: dict[str, Any]):
    row = place.run("ppo", inputs, **{**SMALL, "iterations": 3})
    checkpoints = row.partial / "checkpoints"
    assert sorted(p.name for p in checkpoints.glob("step-*")) == ["step-000002", "step-000003"]
    damage(checkpoints / "step-000003" / "tensors.safetensors")
    again = place.run("ppo", inputs, again=row.partial, **{**SMALL, "iterations": 3})
    assert again.out["policy"].digest == row.out["policy"].digest
    assert any("step-000003/tensors.safetensors" in said and "trying the one before" in said for said in again.said)
    for name in ("step-000002", "step-000003"):
        damage(checkpoints / name / "state.json")
    with pytest.raises(Damaged, match="no checkpoint verifies"):
        place.run("ppo", inputs, again=row.partial, **{**SMALL, "iterations": 3})


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_dev_is_recorded_and_chooses_within_the_budget(place: Place, inputs: dict[str, Any]):
    heldout = other_reward(place)
    watched = {**inputs, "dev": place.prompts(), "heldout_reward": heldout}
    settings = {**SMALL, "iterations": 3, "train": {**SMALL["train"], "evaluations": 3, "keep": "best"}}
    row = place.run("ppo", watched, **settings)
    assert {"dev/proxy", "dev/heldout", "dev/kl", "dev/stop_rate"} <= row.log[0].keys()
    best = max(range(3), key=lambda i: row.log[i]["dev/heldout"])
    assert row.metrics["chosen_by"] == "heldout" and row.metrics["kept_step"] == best + 1
    tight = place.run("ppo", watched, **{**settings, "kl_budget": 1e-9})
    assert any("within kl_budget" in said for said in tight.said)
    assert tight.metrics["kept_step"] == 3 and "chosen_by" not in tight.metrics


def other_reward(place: Place) -> Any:
    from pipeline.llama.heads import ScalarModel

    model = new_classifier(policy(5).model, 5).eval()
    found = save(place.root / "heldout", "reward_model", model)
    write_probe(ScalarModel(model), [], found.path)
    return found


def test_numbers_that_are_not_finite_stop_the_row(
    place: Place, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """T23: at that step, weights untouched, the last good checkpoint named."""
    total = Rewards.total
    seen: list[int] = []

    def poisoned(self: Rewards, samples: Any, ranks: Any = None) -> list[float]:
        seen.append(1)
        found = total(self, samples, ranks)
        return [float("nan"), *found[1:]] if len(seen) == 2 else found

    monkeypatch.setattr(Rewards, "total", poisoned)
    with pytest.raises(NonFinite, match="1 of 16 scores are not finite"):
        place.run("ppo", inputs, **{**SMALL, "minibatch": 16})


def test_truncated_sampling_needs_the_correction(place: Place, inputs: dict[str, Any]):
    cut = Ppo.Config(sampling={"top_k": 5})
    with pytest.raises(UserError, match=r"ppo.importance.correct"):
        Ppo.check(cut, frozenset(inputs))
    settings = {**SMALL, "sampling": {**SHORT, "top_k": 5}, "importance": {"correct": True}}
    row = place.run("ppo", inputs, **settings)
    assert row.log[0]["sampler_gap"] > 0.01  # the mass that was cut off
    assert row.log[0]["first_ratio"] == 1.0


def test_groups_of_one_have_nothing_to_compare(inputs: dict[str, Any]):
    with pytest.raises(UserError, match="rloo compares answers to one prompt"):
        Ppo.check(Ppo.Config(advantage="rloo", sampling={"samples": 1}), frozenset(inputs))


def test_estimators_with_a_wrong_gradient_are_warned_of():
    """T35."""
    for estimator, word in (("k1", "expectation 0"), ("k3", r"KL(reference || policy)")):
        (said, *_) = PpoSettings(kl={"where": "loss", "estimator": estimator}).cautions()
        assert word in said
    for estimator in ("k2", "k3", "exact"):
        (said,) = PpoSettings(kl={"estimator": estimator}).cautions()
        assert "in the reward the gradient" in said and estimator in said
    assert not PpoSettings(kl={"where": "loss", "estimator": "exact"}).cautions()
    assert not PpoSettings().cautions()


def test_a_coefficient_of_zero_cannot_be_controlled():
    """It is multiplied: 0 stays 0."""
    for control in ("adaptive", "band"):
        (said,) = PpoSettings(kl={"control": control, "coefficient": 0.0}).cautions()
        assert said == f"kl.control is {control}, which multiplies kl.coefficient: from 0 it never moves"
    assert not PpoSettings(kl={"coefficient": 0.0}).cautions()


def test_a_row_that_ends_in_its_warm_up_says_that_the_policy_stays(place: Place, inputs: dict[str, Any]):
    row = place.run("ppo", inputs, **{**SMALL, "critic": {"warmup": 2}})
    assert "critic.warmup: all 2 iterations train the critic alone, the policy stays what it was" in row.said
    assert not any("critic.warmup" in said for said in place.run("ppo", inputs, **SMALL).said)


def test_settings_without_effect_are_named():
    given = PpoSettings(
        advantage="rloo", lam=0.9, gamma=0.5, kl={"target": 3.0}, mix={"batch": 4}, importance={"cap": 3}
    )
    said = " ".join(given.cautions())
    for name in ("lam is set", "gamma is set", "kl.target is set", "mix.batch is set", "importance.cap is set"):
        assert name in said
    assert not PpoSettings(**PpoSettings(advantage="rloo").model_dump()).cautions()  # as a worker gets them, all given
    assert not PpoSettings(advantage="gae", lam=0.9, gamma=0.5, kl={"control": "adaptive", "target": 3.0}).cautions()


def test_every_policy_stage_records_and_chooses_on_dev(place: Place, inputs: dict[str, Any]):
    """Rejection and DPO as PPO does: the best of four looks by the held-out model is what is saved."""
    seen = {"dev": place.prompts(), "heldout_reward": other_reward(place)}
    settings = {"train": {**train(epochs=4), "evaluations": 4, "keep": "best"}, "max_new_tokens": 6}
    pairs = place.pairs()
    rows = {
        "dpo": place.run("dpo", {"policy": inputs["policy"], "comparisons": pairs, **seen}, **settings),
        "rejection": place.run(
            "rejection", {**inputs, **seen}, train={**settings["train"], "batch": 1}, sampling=SHORT
        ),
    }
    for name, row in rows.items():
        looks = [line for line in row.log if "dev/heldout" in line]
        best = max(looks, key=lambda line: line["dev/heldout"])
        assert len(looks) == 4 and row.metrics["chosen_by"] == "heldout", name
        assert row.log.index(best) + 1 == row.metrics["kept_step"]
        assert all(line["dev/kl"] != 0 for line in looks)


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_the_controller_waits_until_the_policy_has_moved(place: Place, inputs: dict[str, Any], warmup: int):
    """What is sampled during warm-up and in the iteration after it has KL 0 by construction: that says nothing about
    the coefficient, which halves only after the first KL that was measured on a policy that had moved."""
    band = {"control": "band", "band": [50.0, 60.0], "coefficient": 0.1}
    row = place.run("ppo", inputs, **{**SMALL, "iterations": warmup + 3, "critic": {"warmup": warmup}, "kl": band})
    assert [line["kl"] == 0.0 for line in row.log] == [True] * (warmup + 1) + [False] * 2
    assert [line["kl_coefficient"] for line in row.log] == [0.1] * (warmup + 2) + [0.05]


def test_a_prompt_with_all_its_answers_must_fit_a_pass(place: Place, inputs: dict[str, Any]):
    with pytest.raises(UserError, match=r"ppo.train.token_budget: 40 tokens a pass, but a prompt with its 4 answers"):
        place.run(
            "ppo", inputs, **{**SMALL, "sampling": {**SHORT, "max_new_tokens": 16}, "train": train(token_budget=40)}
        )


def test_a_prompt_of_dev_with_its_answer_must_fit_a_pass(place: Place, inputs: dict[str, Any]):
    """Said before anything is trained: a user turn of 80 characters is 84 tokens, its answer 6 more."""
    long = {**inputs, "dev": place.data("prompts", [Prompt("p0", ask("x" * 80))])}
    pairs = {"policy": inputs["policy"], "comparisons": place.pairs(), "dev": long["dev"]}
    for stage, given, more in (("ppo", long, SMALL), ("dpo", pairs, {"max_new_tokens": 6})):
        with pytest.raises(UserError, match=r"dev: a prompt with its answer may have 90 tokens, more than train.token"):
            place.run(stage, given, **{**more, "train": train(token_budget=89, evaluations=1)})
        place.run(stage, given, **{**more, "train": train(token_budget=90, evaluations=1)})


def test_dev_without_a_reward_model_is_recorded_and_chooses_nothing(place: Place, inputs: dict[str, Any]):
    dpo = {"policy": inputs["policy"], "comparisons": place.pairs(), "dev": place.prompts()}
    row = place.run("dpo", dpo, train={**train(epochs=4), "evaluations": 2, "keep": "best"}, max_new_tokens=6)
    assert sum("dev/kl" in line for line in row.log) == 2 and "chosen_by" not in row.metrics
    assert row.metrics["kept_step"] == row.metrics["steps"]
