"""Settings of the stages: what planning refuses, and that every stage says what its settings do."""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pipeline.algo.preference import make_loss
from pipeline.flow.config import parse_settings
from pipeline.flow.errors import UserError
from pipeline.flow.plan import load_plan
from pipeline.flow.stage import load_stage, slots_in, slots_out
from stages import STAGES


def config(name: str, **values: Any) -> Any:
    return parse_settings(load_stage(STAGES[name]).Config, values, name)


@pytest.mark.parametrize("sampling", [{"top_k": 5}, {"top_p": 0.9}, {"temperature": 0}, {"min_new_tokens": 1}], ids=str)
def test_ppo_refuses_samplers_that_are_not_the_policy(sampling: dict[str, Any]) -> None:
    """T34."""
    stage = load_stage(STAGES["ppo"])
    with pytest.raises(UserError, match=r"ppo\.sampling"):
        stage.check(config("ppo", sampling=sampling), frozenset({"reward"}))
    stage.check(config("ppo", sampling={"temperature": 0.7, "samples": 2}), frozenset({"reward"}))


@pytest.mark.parametrize(
    ("stage", "values", "named"),
    [
        ("dpo", {"beta": 0}, "beta"),
        ("dpo", {"label_smoothing": 0.5}, "label_smoothing"),
        ("dpo", {"loss": {"name": "simpo", "gamma": -1}}, r"dpo\.loss\.gamma"),
        ("dpo", {"loss": {"name": "sompi"}}, "dpo.loss.name: expected .*, found 'sompi'; did you mean 'simpo'"),
        ("dpo", {"loss": {"name": "simpo", "lambda": 1}}, "simpo has no lambda; it has: beta, gamma, sft_coefficient"),
        ("dpo", {"loss": {"name": "kto"}, "sft_coefficient": 0.5}, "kto has no sft_coefficient"),
        ("dpo", {"loss": {"beta": 0.2}, "beta": 0.1}, "beta and loss.beta are the same setting"),
        ("reward", {"weight_by": "rank"}, "weight_by"),
        ("sft", {"train_on": "everything"}, "train_on"),
        ("sft", {"train": {"epochs": 0}}, "epochs"),
        ("ppo", {"kl": {"control": "adaptiv"}}, "control"),
        ("ppo", {"kl": {"target": 0}}, "target"),
        ("ppo", {"adapter": {"rank": 0}}, "rank"),
        ("rejection", {"pairs": {"margin": -1}}, "margin"),
        ("rejection", {"pairs": {"by": "best_second"}}, "by"),
        ("rejection", {"choose": {"fraction": 0}}, "fraction"),
        ("rejection", {"choose": {"by": "threshold"}}, "threshold"),
        ("rejection", {"temperatures": [0.7, 1.0, 0.7]}, "temperatures"),
        ("rejection", {"temperatures": [-1]}, "temperatures"),
        ("evaluate", {"temperature": -1}, "temperature"),
        ("pretrain", {"vocab_size": 100}, "vocab_size"),
        (
            "pretrain",
            {"train": {"batch_start": 9000, "batch_growth": 9}},
            "must be less than batch_tokens",
        ),
        ("sft", {"train": {"schedule": "wsd", "final_fraction": 0}}, "final_fraction: must be above 0 under wsd"),
        (
            "pretrain",
            {"objective": "fmi"},
            "expected 'causal', .*'fim', 'spans', 'ul2', found 'fmi'; did you mean 'fim'",
        ),
        ("rejection", {"train": "no"}, "rejection.train: expected a mapping of settings, found 'no'"),
        ("rejection", {"choose": {"by": "bst"}}, "expected 'best', 'fraction' or 'threshold', found 'bst'; did you"),
        ("pretrain", {"objective": {"name": "fim", "rate": 1.5}}, r"pretrain\.objective\.rate"),
    ],
)
def test_values_out_of_range_are_named(stage: str, values: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        config(stage, **values)


@pytest.mark.parametrize(
    ("name", "train"),
    [("skip_spikes", {"skip_spikes": 6}), ("batch_start", {"batch_tokens": 9, "batch_start": 2, "batch_growth": 9})],
)
def test_ppo_refuses_what_its_steps_do_not_have(name: str, train: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"ppo\.train\.{name}: has no effect in PPO"):
        load_stage(STAGES["ppo"]).check(config("ppo", train=train), frozenset({"reward"}))


@pytest.mark.parametrize("stage", ["reward", "ppo", "rejection", "dpo", "evaluate"])
def test_answers_leave_room_for_a_prompt(stage: str) -> None:
    longest = {"sampling": {"max_new_tokens": 600}} if stage in ("ppo", "rejection") else {"max_new_tokens": 600}
    given = frozenset({"policy", "reward", "prompts", "comparisons", "dev"})
    with pytest.raises(UserError, match=rf"^{stage}\..*max_new_tokens: answers of up to 600 .* max_tokens 512: lower"):
        load_stage(STAGES[stage]).check(config(stage, **longest), given)
    load_stage(STAGES[stage]).check(config(stage, **longest, max_tokens=601), given)


@pytest.mark.parametrize(
    ("loss", "given", "message"),
    [
        ("sigmoid", ["comparisons", "heldout"], None),
        ("simpo", ["comparisons"], None),
        ("kto", ["rated", "heldout_rated"], None),
        ("kto", ["comparisons", "heldout"], None),
        ("kto", ["comparisons", "rated"], None),
        ("sigmoid", [], "the loss sigmoid needs comparisons: give the row comparisons"),
        ("kto", ["heldout_rated"], "the loss kto needs rated answers, or comparisons to split: give the row rated"),
        ("ipo", ["rated"], r"ipo compares two answers to a prompt, which rated do not have; use loss: \{name: kto\}"),
        ("orpo", ["comparisons", "heldout_rated"], "orpo compares two answers to a prompt, which heldout_rated"),
    ],
)
def test_losses_and_inputs_go_together(loss: str, given: list[str], message: str | None) -> None:
    stage = load_stage(STAGES["dpo"])
    with pytest.raises(UserError, match=message) if message else nullcontext():
        stage.check(config("dpo", loss={"name": loss}), frozenset(["policy", *given]))


def test_short_settings_of_dpo_reach_whatever_loss_there_is() -> None:
    smooth = make_loss("sigmoid", beta=0.3, label_smoothing=0.1)
    assert config("dpo", beta=0.3, label_smoothing=0.1).loss.made() == smooth
    for ipo in ({"name": "ipo"}, "ipo"):
        assert config("dpo", beta=0.3, loss=ipo).loss.made() == make_loss("ipo", beta=0.3)
    assert config("dpo", sft_coefficient=None, loss={"name": "kto"}).loss.made() == make_loss("kto")
    assert config("dpo", beta=0.3).identity()["loss"] == config("dpo", loss={"beta": 0.3}).identity()["loss"]


BUDGET = {"kl_budget": 4.0}


@pytest.mark.parametrize(
    ("stage", "values", "given", "message"),
    [
        ("ppo", {}, "reward", "chooses weights by `dev`, which is not given"),
        ("ppo", {"train": {"keep": "last"}}, "reward dev", "set train.keep to best"),
        ("ppo", {"train": {"evaluations": 0}}, "reward dev", "train.evaluations above 0"),
        ("ppo", {"sampling": {"top_k": 5}, "importance": {"correct": True}}, "reward dev", "the KL .* is not known"),
        ("ppo", {}, "reward dev", None),
        ("rejection", {"sampling": {"top_p": 0.9}}, "policy prompts reward dev", "the KL .* is not known"),
        ("rejection", {"sampling": {"temperature": 0}}, "policy prompts reward dev", None),
        ("rejection", {}, "policy samples dev", "none scores `dev`"),
        ("rejection", {}, "policy samples dev heldout_reward", None),
        ("dpo", {}, "policy comparisons dev judge", "none scores `dev`"),
        ("dpo", {}, "policy comparisons dev reward", None),
    ],
)
def test_a_kl_budget_is_refused_where_it_could_not_be_held_to(
    stage: str, values: dict[str, Any], given: str, message: str | None
) -> None:
    """A budget without effect would leave weights beyond it unnoticed."""
    with pytest.raises(UserError, match=rf"{stage}\.kl_budget: .*{message}") if message else nullcontext():
        load_stage(STAGES[stage]).check(config(stage, **values, **BUDGET), frozenset(given.split()))


def test_adaptive_control_never_turns_its_coefficient_round() -> None:
    """Ziegler's factor is 1 - 0.2 n / horizon at its least: 64 responses and a horizon of 12.8 make it 0."""
    stage = load_stage(STAGES["ppo"])
    kl = lambda horizon: {"control": "adaptive", "horizon": horizon}
    small = {"prompts": 16, "sampling": {"samples": 4}}
    with pytest.raises(UserError, match=r"ppo\.kl\.horizon: 12\.8 .* 64 responses an iteration"):
        stage.check(config("ppo", **small, kl=kl(12.8)), frozenset({"reward"}))
    stage.check(config("ppo", **small, kl=kl(12.9)), frozenset({"reward"}))
    stage.check(config("ppo", **small, kl={"horizon": 1.0}), frozenset({"reward"}))  # nothing adapts


def test_a_ladder_of_temperatures_draws() -> None:
    beams = {"temperature": 0.0, "num_beams": 4, "samples": 2}
    with pytest.raises(UserError, match=r"rejection\.temperatures: .*num_beams"):
        load_stage(STAGES["rejection"]).check(
            config("rejection", sampling=beams, temperatures=[0.5, 1.0]), frozenset({"policy", "prompts", "reward"})
        )


def test_the_score_that_chooses_is_no_single_sources() -> None:
    """It would stand in the store in place of that reward model's own."""
    stage = load_stage(STAGES["rejection"])
    two, one = {"reward": ["reward", "reward@b"]}, {"reward": ["reward"]}
    with pytest.raises(UserError, match=r"rejection\.score: 'reward' is what one of 2 sources is called"):
        stage.check_names(config("rejection", score="reward"), two)
    stage.check_names(config("rejection", score="both"), two)
    stage.check_names(config("rejection", score="reward"), one)
    checked = {"functions": [{"call": "pipeline.rollout.checks.exact_match", "name": "exact"}]}
    with pytest.raises(UserError, match=r"rejection\.score: 'exact' is what one of 2 sources is called"):
        stage.check_names(config("rejection", score="exact", reward=checked), one)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_describes_itself(name: str) -> None:
    stage = load_stage(STAGES[name])
    assert stage.name == name and import_module(stage.__module__).__doc__
    assert slots_in(stage) and slots_out(stage)
    for field, info in stage.Config.model_fields.items():
        assert (info.description or "").endswith((".", ";")), f"{name}.{field} has no sentence of its own"


def test_an_adapter_is_asked_for_by_its_settings_alone() -> None:
    for name in ("sft", "reward", "ppo", "rejection", "dpo"):
        assert config(name).adapter is None
        assert config(name, adapter={"rank": 4}).adapter.rank == 4


def test_ids_and_weights_cross_only_between_one_tokenizer() -> None:
    """Texts are rendered again for another tokenizer's reward model; a critic that starts as one reads ids."""
    rejection, ppo = (load_stage(STAGES[name]) for name in ("rejection", "ppo"))
    assert rejection.boundaries(config("rejection")) == ()
    assert ppo.boundaries(config("ppo")) == (("policy", "reward[0]"),)
    for without in ({"critic": {"start": "policy"}}, {"advantage": "rloo"}):
        assert ppo.boundaries(config("ppo", **without)) == ()


@pytest.mark.parametrize(
    ("values", "given", "message"),
    [
        ({}, {"policy", "reward"}, "input prompts: nothing to draw answers for"),
        ({}, {"samples", "reward"}, "input policy: nothing to train"),
        ({}, {"prompts", "policy"}, "rejection: nothing rewards an answer"),
        ({"reward": {"clip": 5.0}}, {"policy", "samples"}, "rejection.reward.clip: has no effect"),
        (
            {"train": None},
            {"prompts", "reward", "samples"},
            "input policy: not given, but answers to prompts are drawn",
        ),
    ],
)
def test_rejection_says_which_input_its_work_needs(values: dict[str, Any], given: set[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_stage(STAGES["rejection"]).check(config("rejection", **values), frozenset(given))


@pytest.mark.parametrize(
    ("values", "given"),
    [
        ({}, {"policy", "reward", "prompts"}),
        ({}, {"policy", "samples"}),
        ({"train": None}, {"samples"}),
        ({"train": None}, {"samples", "reward"}),
        ({"train": None}, {"policy", "prompts", "reward", "samples"}),
    ],
)
def test_rejection_works_with_what_its_work_needs(values: dict[str, Any], given: set[str]) -> None:
    stage = load_stage(STAGES["rejection"])
    stage.check(config("rejection", **values), frozenset(given))
    assert stage.withheld(config("rejection", **values)) == ({"policy"} if values else set())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": "fim"}, None),
        (
            {"objective": "spans", "vocab_size": 300},
            "vocab_size: 300, but bytes and the control tokens of spans are 365",
        ),
        ({"objective": "spans", "max_tokens": 4096}, r"objective\.sentinels: 100, but a window of 3721 tokens has 186"),
        ({"objective": "ul2", "max_tokens": 6}, "max_tokens: 6 leaves no text beside the control tokens"),
    ],
)
def test_objectives_fit_their_windows_and_vocabulary(values: dict[str, Any], message: str | None) -> None:
    stage = load_stage(STAGES["pretrain"])
    with pytest.raises(UserError, match=message) if message else nullcontext():
        stage.check(config("pretrain", **values), frozenset({"documents"}))


@pytest.mark.parametrize(
    ("clean", "given", "message"),
    [
        ({"duplicates": "near", "similarity": 0.9}, set(), None),
        ({"ngram": 8, "contaminated": "cut"}, {"evaluations"}, None),
        ({"duplicates": "exact", "similarity": 0.9}, set(), "clean.similarity: has no effect without duplicates: near"),
        ({"ngram": 8}, set(), "clean.ngram: has no effect without evaluation sets: give the row `evaluations`"),
    ],
)
def test_cleaning_without_effect_is_refused(clean: dict[str, Any], given: set[str], message: str | None) -> None:
    stage = load_stage(STAGES["pretrain"])
    with pytest.raises(UserError, match=message) if message else nullcontext():
        stage.check(config("pretrain", clean=clean), frozenset({"documents", *given}))


MIXED = """
sources:
  web:   {kind: documents, path: w}
  books: {kind: documents, path: b}
  ask:   {kind: prompts, path: a}
rows:
  - pretrain: {documents: web, more: books, evaluations: [ask, books]}
stages: {pretrain: {mixture: {weights: {web: 3, books: 1}}}}
"""


def test_sources_that_are_mixed_are_wired_and_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(MIXED)
    (row,) = load_plan(path, [], STAGES).rows
    assert [ref.text for ref in row.refs()] == ["web", "books", "ask", "books"]
    with pytest.raises(UserError, match="the row reads nothing called 'boks'; did you mean 'books'"):
        load_plan(path, ["pretrain.mixture.weights.boks=1"], STAGES)
    path.write_text(MIXED.replace("more: books, ", ""))
    with pytest.raises(UserError, match="nothing called 'books'"):
        load_plan(path, [], STAGES)


def test_settings_that_are_younger_than_sealed_rows_leave_their_identity_alone() -> None:
    """The keys that pretraining had before it could do anything else than predict the next token of one source."""
    found = config("pretrain").identity()
    assert set(found) == {"model", "vocab_size", "max_tokens", "train"}
    assert config("pretrain", objective="causal").identity() == found
    assert config("pretrain", objective="prefix").identity()["objective"] == {"name": "prefix", "share": 0.5}


PLAN = """
sources:
  policy: {kind: policy, path: p}
  reward: {kind: reward_model, path: r}
  ask:    {kind: prompts, path: a}
  store:  {kind: samples, path: s}
rows:
  - rejection: {policy: policy, reward: reward, prompts: ask, samples: [store]}
  - dpo:       {policy: rejection.policy, comparisons: rejection.comparisons}
"""


def test_a_policy_that_is_not_trained_cannot_be_named_below(tmp_path: Path) -> None:
    """Refused while planning, not after the row has run."""
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    assert [row.name for row in load_plan(path, [], STAGES).rows] == ["rejection", "dpo"]
    with pytest.raises(UserError) as error:
        load_plan(path, ["rejection.train=null"], STAGES)
    assert (
        "row dpo, input policy: expects Policy; rejection.policy is left out by the settings of row rejection"
        in str(error.value)
    )
    path.write_text(PLAN.replace("policy: rejection.policy", "policy: policy"))
    load_plan(path, ["rejection.train=null"], STAGES)
