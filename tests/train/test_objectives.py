"""Losses of the supervised stages on chosen log-probs and scores, so that every number can be checked by hand."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pipeline.algo.preference import make_loss
from pipeline.algo.reward import ranking_pairs
from pipeline.data.forest import Forest, Segment, build
from pipeline.data.groups import answers, comparison_groups, continuations, only
from pipeline.train.batches import weigh_tokens
from pipeline.train.loop import Trainer
from pipeline.train.objectives import (
    next_token,
    pairwise_ranking,
    per_round,
    preference,
    summed_logprobs,
    unpaired,
    unrelated_log_ratio,
    weigh_answers,
    weigh_pairs,
)
from pipeline.train.settings import TrainSettings
from pipeline.train.strategy import build as build_strategy
from tests.small import chat, comparison, outputs, policy, same, scorer

LN2 = math.log(2)


class Told(nn.Module):
    """Answers with the values by token that the forest carries, as a policy or as a scalar model."""

    def __init__(self, scalar: bool = False) -> None:
        super().__init__()
        self.scalar = scalar
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, forest: Forest, accuracy: bool = False) -> object:
        values = forest.tokens["told"] + self.shift
        if self.scalar:
            return values
        return outputs(logprobs_T=values, correct_T=(values > -1).float() if accuracy else None)


def told(*segments: tuple, parents: list[int] | None = None) -> list[Segment]:
    """Segments of (values by token, facts, weight)."""
    out = []
    for i, (values, facts, weight) in enumerate(segments):
        parent = -1 if i == 0 else 0
        n = len(values)
        out.append(Segment([9] * n, parent, weights=[weight] * n, tokens={"told": values}, facts=facts))
    return out


def pair(chosen: list[float], rejected: list[float], reference: tuple[float, float] = (0.0, 0.0), prompt=(math.nan,)):
    """A comparison whose better answer stands second, told log-probs of every token, NaN in the prompt."""
    return told(
        (list(prompt), {}, 0.0),
        (rejected, {"answer": 1.0, "worth": 0.0, "reference": reference[1]}, 1.0),
        (chosen, {"answer": 1.0, "worth": 1.0, "reference": reference[0]}, 1.0),
    )


def means(sums) -> dict[str, float]:
    return {k: float(total) / float(count) for k, (total, count) in sums.metrics.items() if float(count)}


def test_next_token_by_hand():
    forest = build([told(([0.0, -1.0, -3.0], {}, 1.0)), told(([-5.0, -2.0], {}, 0.5))])
    out = next_token(Told(), forest)
    same(out.terms["tokens"], 4.0 + 3.5)
    assert [float(x) for x in out.metrics["nll"]] == [7.5, 4.0]


def test_rounds_are_counted_apart_and_late_ones_together():
    rounds = [-1, 0, 1, 1, 5, 3]
    values = [-9.0, -0.5, -2.0, -0.5, -4.0, -0.5]
    weights = [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    out = per_round(Told(), build([[Segment([9] * 6, weights=weights, tokens={"told": values, "round": rounds})]]))
    found = means(out)
    same(out.terms["tokens"], 7.5)
    assert found["nll"] == 1.5 and found["accuracy"] == 3 / 5
    assert (found["round1/nll"], found["round2/nll"], found["round4/nll"]) == (0.5, 1.25, 2.25)
    assert (found["round1/accuracy"], found["round2/accuracy"], found["round4/accuracy"]) == (1.0, 0.5, 0.5)
    assert "round3/nll" not in found  # no such round here


@pytest.mark.parametrize("loss", [next_token, per_round])
def test_a_micro_batch_without_anything_to_train_is_zero_and_finite(loss):
    """T9."""
    module = policy().module.train()
    forest = build([[Segment([5, 6, 7], weights=[0.0] * 3, tokens={"round": [0.0] * 3})]])
    out = loss(module, forest)
    assert float(out.terms["tokens"].detach()) == 0.0
    out.terms["tokens"].backward()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    assert grads and all(torch.isfinite(g).all() and not g.any() for g in grads)


def test_weights_stated_before_are_those_of_the_loss():
    draw = random.Random(0)
    groups = []
    for _ in range(30):
        worth = [draw.randrange(3) for _ in range(draw.randrange(2, 6))]
        groups.append(continuations([1], [[2]] * len(worth), [{"answer": 1.0, "worth": float(w)} for w in worth]))
    forest = build(groups)
    at = answers(forest)
    for weight_by in ("pair", "prompt"):
        pairs = ranking_pairs(forest.facts["worth"][at], forest.group_S[at], weight_by=weight_by)
        assert weigh_pairs(weight_by)(groups)["pairs"] == pytest.approx(float(pairs.weight_P.sum()), abs=1e-4)


def scored(*scores: float) -> list[Segment]:
    """Answers from the worst to the best with that score at their last token and 100 everywhere else."""
    answers_ = [([100.0] * i + [score], {"answer": 1.0, "worth": float(i)}, 1.0) for i, score in enumerate(scores)]
    return told(([100.0, 100.0], {}, 0.0), *answers_)


def test_pairs_are_scored_at_the_last_token_of_each_answer():
    """Correctness.md 4.2: differences 1 and -1; T16, T24: only the last token counts, -1000 does not overflow."""
    one = pairwise_ranking("pair", 0.0)(Told(scalar=True), build([scored(0.5, 1.5)]))
    same(one.terms["pairs"], 0.3132616875)
    same(pairwise_ranking("pair", 0.0)(Told(scalar=True), build([scored(1.5, 0.5)])).terms["pairs"], 1.3132616875)
    same(pairwise_ranking("pair", 0.0)(Told(scalar=True), build([scored(1000.0, 0.0)])).terms["pairs"], 1000.0)
    assert means(one) == pytest.approx(
        {"loss": 0.3132616875, "margin": 1.0, "accuracy": 1.0, "score": 1.0, "length_accuracy": 1.0}
    )


def test_a_ranking_is_all_its_pairs():
    group = scored(0.0, 1.0, 3.0)  # differences 1, 3, 2
    losses = sum(math.log1p(math.exp(-d)) for d in (1, 3, 2))
    same(pairwise_ranking("pair", 0.0)(Told(True), build([group])).terms["pairs"], losses)
    same(pairwise_ranking("prompt", 0.0)(Told(True), build([group])).terms["pairs"], losses / 3)
    centred = losses + 0.5 * (1**2 + 3**2 + 4**2)
    same(pairwise_ranking("pair", 0.5)(Told(True), build([group])).terms["pairs"], centred, atol=1e-5)


def test_permuted_records_give_the_same_loss():
    """T15: answers are paired by their group, wherever it stands."""
    model = scorer().module
    records = [comparison(f"question {i}", "good" * (i + 1), "bad" * (7 - i)) for i in range(6)]
    groups = comparison_groups(records, chat(), 99).groups
    loss = pairwise_ranking("pair", 0.0)
    alone = [float(loss(model, build([g])).terms["pairs"].detach()) for g in groups]
    assert max(alone) - min(alone) > 1e-3  # they differ, so a pair across groups would show
    for order in ([0, 1, 2, 3, 4, 5], [3, 5, 0, 2, 4, 1]):
        together = loss(model, build([groups[i] for i in order]))
        same(together.terms["pairs"].detach(), sum(alone), atol=1e-5)


def test_scores_do_not_see_pads_beside_or_inside():
    """T16: the pad's and the eos's ids inside a text are tokens like others; neighbours change nothing."""
    role = scorer(1)
    pad, eos = role.tokenizer.pad_token_id, role.tokenizer.eos_token_id
    group = continuations([1, pad, 5], [[eos, 6, pad], [7, eos]], [{"answer": 1.0, "worth": w} for w in (1.0, 0.0)])
    long = continuations([1, 5], [[6] * 30, [7]], [{"answer": 1.0, "worth": w} for w in (1.0, 0.0)])
    loss = pairwise_ranking("pair", 0.0)
    alone = [float(loss(role.module, build([g])).terms["pairs"].detach()) for g in (group, long)]
    same(loss(role.module, build([long, group])).terms["pairs"].detach(), sum(alone))
    ids = torch.tensor([[1, pad, 5, eos, 6, pad]])
    plain = role.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.item()
    forest = build([group])
    same(role.module(forest)[forest.last_S[1]].item(), plain)


def test_ties_give_no_loss_but_a_graph():
    tie = continuations([1], [[2], [3]], [{"answer": 1.0, "worth": 1.0}] * 2)
    model = scorer().module
    out = pairwise_ranking("prompt", 1.0)(model, build([tie]))
    out.terms["pairs"].backward()
    assert float(out.terms["pairs"].detach()) == 0.0 and weigh_pairs("prompt")([tie]) == {"pairs": 0.0}


CHOSEN, REJECTED = [-4.0] * 3, [-3.0] * 5  # sums -12 and -15


def dpo(group: list[Segment], sft: float = 0.0, **settings: float):
    return preference(make_loss("sigmoid", **{"beta": 0.1, "sft_coefficient": sft, **settings}))(Told(), build([group]))


def test_dpo_compares_sums_over_tokens():
    """T26: correctness.md 4.2 with answers of unequal length; means would give -4 and -3, and another loss."""
    group = pair(CHOSEN, REJECTED, (-13.0, -14.0))
    out = dpo(group)
    same(out.terms["pairs"], 0.5981388694)
    same(dpo(group, label_smoothing=0.1).terms["pairs"], 0.6181388694)
    same(dpo(group, beta=0.5).terms["pairs"], 0.3132616875)
    found = means(out)
    assert found["margin"] == pytest.approx(0.2) and found["accuracy"] == 1.0
    assert (found["reward_chosen"], found["reward_rejected"]) == pytest.approx((0.1, -0.1))
    assert (found["logp_chosen"], found["logp_rejected"]) == (-12.0, -15.0)


def test_dpo_is_ln_2_where_policy_and_reference_agree():
    for beta in (0.01, 0.1, 5.0):
        same(dpo(pair(CHOSEN, REJECTED, (-12.0, -15.0)), beta=beta).terms["pairs"], LN2, atol=1e-7)


def test_prompt_tokens_are_not_counted():
    """T27: neither their log-probs (NaN here) nor how many there are."""
    losses = [
        dpo(pair(CHOSEN, REJECTED, (-13.0, -14.0), prompt=[value] * n)).terms["pairs"].item()
        for n, value in ((1, math.nan), (7, math.nan), (7, -100.0), (0, 0.0))
    ]
    assert len(set(losses)) == 1 and losses[0] == pytest.approx(0.5981388694)


def test_prompt_tokens_of_a_real_policy_are_not_counted():
    """T27: the model itself gives prompts no log-prob, and the gradient of an answer's sum agrees."""
    group = continuations([5, 6, 7, 8], [[20, 21], [22]])
    (sums,) = summed_logprobs(policy().module, [build([group])])
    assert sums[0] == 0.0 and (sums[1:] < 0).all() and not sums.requires_grad


def test_the_sft_term_is_the_mean_over_the_chosen_answer():
    plain = 0.5981388694
    out = dpo(pair(CHOSEN, REJECTED, (-13.0, -14.0)), sft=0.25)
    same(out.terms["pairs"], plain + 0.25 * 12 / 3)
    assert means(out)["sft_nll"] == 4.0


def test_a_loss_without_a_reference_asks_for_none():
    """SimPO on means -4 and -3 (its margin 1): log(1 + exp(2 * 4 - 2 * 3 + 1)); no fact `reference` anywhere."""
    group = told(
        ([math.nan], {}, 0.0),
        (REJECTED, {"answer": 1.0, "worth": 0.0}, 1.0),
        (CHOSEN, {"answer": 1.0, "worth": 1.0}, 1.0),
    )
    simpo = preference(make_loss("simpo", beta=2.0, gamma=1.0))
    same(simpo(Told(), build([group])).terms["pairs"], math.log1p(math.exp(3.0)), atol=1e-5)
    with pytest.raises(KeyError, match="reference"):
        preference(make_loss("sigmoid"))(Told(), build([group]))


def test_llama_3_leaves_control_tokens_out_of_the_pair_and_keeps_them_in_the_nll():
    """The last token of each answer is its end, log-probs -1 and -2: sums over text -8 and -12, references -9 and -11.

    h = (-8 + 9) - (-12 + 11) = 2, as in correctness.md 4.2; the NLL is (4 + 4 + 1) / 3 = 3 nats a token.
    """
    group = pair([-4.0, -4.0, -1.0], [-3.0] * 4 + [-2.0], (-9.0, -11.0))
    ends = [[0.0], [0.0] * 4 + [1.0], [0.0, 0.0, 1.0]]
    group = [replace(s, tokens={**s.tokens, "control": c}) for s, c in zip(group, ends, strict=True)]
    out = preference(make_loss("llama3"))(Told(), build([group]))
    same(out.terms["pairs"], 0.5981388694 + 0.2 * 3)
    assert means(out)["sft_nll"] == 3.0 and means(out)["logp_chosen"] == -8.0
    averaged = preference(make_loss("sigmoid_norm", beta=1.0))(Told(), build([group]))
    same(averaged.terms["pairs"], math.log1p(math.exp(-(1 / 2 + 1 / 4))))  # lengths without them too


def test_pairs_of_a_ranking_are_separate_records_of_the_sum():
    group = told(
        ([0.0], {}, 0.0),
        *[
            ([v], {"answer": 1.0, "worth": w, "reference": 0.0}, 1.0)
            for v, w in ((-1.0, 2.0), (-2.0, 1.0), (-4.0, 0.0))
        ],
    )
    expected = sum(math.log1p(math.exp(-0.1 * h)) for h in (1, 3, 2))
    same(dpo(group).terms["pairs"], expected)
    assert weigh_pairs("pair")([group]) == {"pairs": 3.0}


@pytest.mark.parametrize("budget", [40, 20, 9])
def test_a_step_does_not_depend_on_how_comparisons_were_cut(budget: int):
    """T11 for pairs: K-wise groups of unequal size in one, two or many micro-batches."""
    records = [comparison("q" * (i % 3), *("abcdef"[: 2 + i % 3])) for i in range(4)]
    groups = comparison_groups(records, chat(), 99).groups

    def gradient(token_budget: int) -> list[Tensor]:
        module = scorer().module
        settings = TrainSettings(token_budget=token_budget, clip=0, learning_rate=1e-9)
        strategy = build_strategy(device="cpu")
        trainer = Trainer(module, pairwise_ranking("prompt", 0.1), settings, strategy, total=1, seed=0)
        caught: list[Tensor] = []
        trainer.engine.update = lambda: caught.extend(p.grad.clone() for p in trainer.engine.parameters)  # type: ignore
        trainer.step(groups, weigh_pairs("prompt")(groups))
        assert caught
        return caught

    # prompts have 4 to 6 tokens, the largest group 6 + 4 * 2
    for one, other in zip(gradient(1000), gradient(max(budget, 14)), strict=True):
        same(other, one, atol=1e-5)


def rating(answer: list[float], desirable: float, reference: float, unrelated: tuple[list[float], float]):
    """A rated answer and one to another prompt, with told log-probs by token and reference sums; NaN in the prompt."""
    other = {"answer": 0.0, "desirable": 0.0, "unrelated": 1.0, "reference": unrelated[1]}
    return told(
        ([math.nan, math.nan], {}, 0.0),
        (answer, {"answer": 1.0, "desirable": desirable, "unrelated": 0.0, "reference": reference}, 1.0),
        (unrelated[0], other, 1.0),
    )


def test_rated_answers_are_held_against_the_reference_point():
    """beta 0.5, z0 1: log ratios 3 (liked) and -1 (disliked) both give 1 - s(1); unrelated ones mean 1.5."""
    groups = [rating([-3.0, -4.0], 1.0, -10.0, ([-1.0], -3.5)), rating([-5.0], 0.0, -4.0, ([-1.0, -1.0], -2.5))]
    answered = build([only(g, "answer") for g in groups])
    out = unpaired(make_loss("kto", beta=0.5), 1.0)(Told(), answered)
    same(out.terms["answers"], 2 * 0.2689414214)
    assert weigh_answers(groups) == {"answers": 2.0} and means(out)["accuracy"] == 1.0
    found = unrelated_log_ratio(Told(), build([only(g, "unrelated") for g in groups]))
    assert means(found) == {"log_ratio": 1.5} and not found.terms
    empty = unpaired(make_loss("kto"), 0.0)(
        Told(), build([only(groups[0], "unrelated")])
    )  # a rank without its own work
    assert empty.terms["answers"].item() == 0.0 and empty.terms["answers"].requires_grad


def test_weigh_tokens_agrees_with_the_loss():
    groups = [told(([0.0, -1.0, -2.0], {}, 1.0))]
    groups[0][0] = Segment([9] * 3, weights=[0.0, 1.0, 1.0], tokens={"told": [0.0, -1.0, -2.0]})
    assert weigh_tokens(groups) == {"tokens": 2.0}
    same(next_token(Told(), build(groups)).terms["tokens"], 3.0)
