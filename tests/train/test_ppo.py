"""PPO between two rollouts: targets and loss by hand, exact starts, and signs by what is learned."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.algo.kl import controller
from pipeline.data.forest import Forest, build
from pipeline.data.groups import answers, continuations
from pipeline.data.records import Prompt
from pipeline.flow.errors import RowFailed
from pipeline.llama.adapters import LoraSettings, add_adapter
from pipeline.llama.heads import ActorCritic
from pipeline.rollout.collect import EncodedPrompts, Rollout, Sampler
from pipeline.rollout.engine import SamplingSettings
from pipeline.rollout.noise import NoiseKey
from pipeline.train.loop import Trainer
from pipeline.train.ppo import Learner, PromptStream, RecordStream, groups_each, make_targets
from pipeline.train.ppo_checks import require_ratio_one, require_sampler, require_scores_last, require_zero_kl
from pipeline.train.ppo_loss import Phase, ppo_loss, token_weights, wanted
from pipeline.train.ppo_settings import PpoSettings
from pipeline.train.reference import without_dropout
from pipeline.train.settings import TrainSettings
from pipeline.train.strategy import build as build_strategy
from tests.small import ask, chat, forget_gradients, outputs, policy, same, scorer

PLAIN = PpoSettings(lam=1.0)


def other(**changes: Any) -> PpoSettings:
    return PpoSettings(**{"lam": 1.0, **changes})


class Told(nn.Module):
    """An actor, or a reference, with given numbers for every token."""

    def __init__(self, logprobs: list[float], values: list[float] | None = None, entropy: float = 0.0) -> None:
        super().__init__()
        self.logprobs_T = nn.Parameter(torch.tensor(logprobs))
        self.values_T = nn.Parameter(torch.tensor(values if values else [0.0] * len(logprobs)))
        self.entropy = entropy
        self.temperatures: list[float] = []

    def forward(self, forest: Forest, *, temperature: float, **options: Any) -> Any:
        self.temperatures.append(temperature)
        entropy = torch.full_like(self.logprobs_T, self.entropy)
        return outputs(logprobs_T=self.logprobs_T, values_T=self.values_T, entropy_T=entropy)


def group(*answers: tuple[int, float], prompt: int = 2):
    """A prompt and answers of (tokens, score)."""
    facts = [{"answer": 1.0, "score": score} for _, score in answers]
    told = [{"sampler_logprobs": [0.0] * n} for n, _ in answers]
    return continuations([1] * prompt, [[5] * n for n, _ in answers], facts, told)


def targets_of(forest: Forest, policy_: Told, reference: Told, beta: float, settings: PpoSettings = PLAIN, **more: Any):
    return make_targets(policy_, reference, [[forest]], beta, settings, **more)


POISON = 1e9  # what stands at prompt tokens


def test_shaped_rewards_become_returns():
    """Correctness.md 4.4: beta .1, KL [.2, -.1, .5], score .8 gives rewards [-.02, .01, .75]; with g = l = 1 and no
    values, returns are sums from each token on. T40: the score stands at the last real token."""
    forest = build([group((3, 0.8))])
    actor = Told([POISON, POISON, -1.0, -1.0, -1.0], [POISON, POISON, 0.0, 0.0, 0.0])
    reference = Told([-POISON, 0.0, -1.2, -0.9, -1.5])
    targets = targets_of(forest, actor, reference, 0.1)
    ((found,),) = targets.minibatches
    same(found.tokens["returns"], [0, 0, 0.74, 0.76, 0.75])
    assert found.tokens["old_logprobs"] is not None and targets.figures["kl"] == pytest.approx(0.6)
    assert targets.largest_kl == pytest.approx(0.5)
    assert targets.figures["return"] == pytest.approx((0.74 + 0.76 + 0.75) / 3)
    raw = torch.tensor([0.74, 0.76, 0.75], dtype=torch.float64)
    same(found.tokens["advantages"][2:], (raw - raw.mean()) / (raw.var(correction=0) + 1e-8).sqrt(), atol=1e-4)
    assert found.tokens["advantages"][:2].tolist() == [0, 0]


@pytest.mark.parametrize("lengths", [(1,), (4,), (1, 3), (3, 1, 2)])
def test_the_score_is_one_reward_at_the_end_of_each_answer(lengths: tuple[int, ...]):
    """T40: TD residuals (lambda 0, no values) are the rewards themselves."""
    scores = [10.0 + k for k in range(len(lengths))]
    forest = build([group(*zip(lengths, scores, strict=True))])
    silent = Told([0.0] * len(forest))
    one_step = other(lam=0.0)
    ((found,),) = targets_of(forest, silent, silent, 0.5, one_step).minibatches
    expected = [0.0, 0.0]
    for n, score in zip(lengths, scores, strict=True):
        expected += [0.0] * (n - 1) + [score]
    same(found.tokens["returns"], expected)


@pytest.mark.parametrize("beta", [0.0, 0.1, 1e5])
def test_a_score_that_stands_elsewhere_is_refused(beta: float):
    """T40: one token early, on another answer's, or missing; not where a huge penalty swallows its last digits."""
    forest = build([group((2, 0.8), (1, 0.5))])
    at = answers(forest)
    scores, kl = forest.facts["score"][at], torch.tensor([0.0, 0.0, 0.3, -4.7, 2.1])
    right = -beta * kl + torch.tensor([0.0, 0.0, 0.0, 0.8, 0.5])
    require_scores_last(right, kl, scores, forest, at, beta)
    for wrong in ([0, 0, 0.8, 0, 0.5], [0, 0, 0, 0, 1.3], [0, 0, 0, 0.8, 0], [0.5, 0, 0, 0.8, 0]):
        with pytest.raises(RowFailed, match="a score does not stand on the last token of its answer"):
            require_scores_last(-beta * kl + torch.tensor(wrong), kl, scores, forest, at, beta)


def test_an_empty_answer_takes_no_reward_from_others():
    forest = build([group((2, 1.0), (0, 50.0), (1, 3.0))])
    silent = Told([0.0] * 5)
    ((found,),) = targets_of(forest, silent, silent, 0.0).minibatches
    same(found.tokens["returns"], [0, 0, 1, 1, 3])


def test_advantages_are_whitened_over_all_minibatches_together():
    """T43: one mean and one variance, whatever the minibatch, and whatever other ranks hold."""
    forests = [build([group((1, s))]) for s in (1.0, 2.0, 3.0, 4.0)]
    silent = Told([0.0] * 3)
    alone = make_targets(silent, silent, [forests[:1], forests[1:]], 0.0, PLAIN)
    flat = [float(f.tokens["advantages"][2]) for batch in alone.minibatches for f in batch]
    assert flat == pytest.approx([-1.3416407811, -0.4472135937, 0.4472135937, 1.3416407811], abs=1e-6)
    # a rank with the first two, told the sums of both ranks
    moments = [7.0, 25.0, 2.0]
    there = {"sums": {}, "spread": moments, "explained": [0.0] * 5}
    here = make_targets(silent, silent, [forests[:2]], 0.0, PLAIN, gather=lambda mine: [mine, there])
    assert [float(f.tokens["advantages"][2]) for f in here.minibatches[0]] == pytest.approx(flat[:2], abs=1e-6)


def test_a_rank_with_fewer_forests_makes_the_passes_of_the_others():
    """Each pass gathers weights that are cut up over the ranks. What the extra ones say is not used."""
    forests = [build([group((1, s))]) for s in (1.0, 2.0)]
    silent = Told([0.0] * 3)
    plain = make_targets(silent, Told([0.0] * 3), [forests, []], 0.0, PLAIN)
    assert len(silent.temperatures) == 2
    counted = make_targets(silent, Told([0.0] * 3), [forests, []], 0.0, PLAIN, passes=[3, 2])
    assert len(silent.temperatures) == 2 + 3 + 2
    assert counted.figures == plain.figures and [len(own) for own in counted.minibatches] == [2, 0]


def test_values_are_a_baseline_and_explain_returns():
    forest = build([group((2, 1.0), (1, 3.0))])
    actor = Told([0.0] * 5, [9.0, 9.0, 0.5, 0.25, 2.0])
    targets = targets_of(forest, actor, Told([0.0] * 5), 0.0)
    ((found,),) = targets.minibatches
    same(found.tokens["old_values"], [9, 9, 0.5, 0.25, 2])
    same(found.tokens["returns"], [0, 0, 1, 1, 3])
    errors, returns = torch.tensor([0.5, 0.75, 1.0]), torch.tensor([1.0, 1.0, 3.0])
    expected = 1 - float(errors.var(correction=0) / returns.var(correction=0))
    assert targets.figures["explained_variance"] == pytest.approx(expected)


def test_the_samplers_temperature_reaches_every_pass():
    """T34: policy, reference and loss divide logits by the temperature that answers were drawn at."""
    forest = build([group((2, 1.0))])
    actor, reference = Told([0.0] * 4), Told([0.0] * 4)
    ((found,),) = targets_of(forest, actor, reference, 0.1, temperature=0.7).minibatches
    ppo_loss(PLAIN, 0.7, Phase())(actor, found)
    require_ratio_one(actor, [found], wanted(PLAIN), 0.7, "fp32")
    assert actor.temperatures == [0.7] * 3 and reference.temperatures == [0.7]


def loss_of(settings: PpoSettings, actor: Any, forest: Forest, **phase: Any):
    return ppo_loss(settings, 1.0, Phase(**phase))(actor, forest)


def test_the_loss_by_hand():
    """Correctness.md 4.4: A = 1 at ratio 1.5 gives -1.2, A = -1 at ratio .5 gives .8; the two value examples .045
    and .5."""
    forest = build([group((2, 0.0))]).with_tokens(
        old_logprobs=torch.zeros(4),
        advantages=torch.tensor([POISON, POISON, 1.0, -1.0]),
        old_values=torch.tensor([0.0, 0.0, 0.5, 0.5]),
        returns=torch.tensor([POISON, POISON, 1.0, 1.0]),
        weight=torch.tensor([0.0, 0.0, 1.0, 1.0]),
    )
    actor = Told([POISON, 0.0, math.log(1.5), math.log(0.5)], [0.0, 0.0, 1.0, 0.0], entropy=2.0)
    out = loss_of(PLAIN, actor, forest)
    same(out.terms["tokens"].detach(), -1.2 + 0.8 + 0.045 + 0.5)
    assert [float(x) for x in out.metrics["clip_fraction"]] == [2.0, 2.0]
    assert [float(x) for x in out.metrics["entropy"]] == [4.0, 2.0]
    weighted = other(value_coefficient=0.1, entropy_coefficient=0.01)
    same(loss_of(weighted, actor, forest).terms["tokens"].detach(), -0.4 + 0.0545 - 0.01 * 4.0)


def test_gradients_reach_answer_tokens_alone():
    forest = build([group((2, 0.0))]).with_tokens(
        **{k: torch.ones(4) for k in ("old_logprobs", "advantages", "old_values", "returns", "weight")}
    )
    actor = Told([1.0] * 4, [0.5] * 4)
    loss_of(PLAIN, actor, forest).terms["tokens"].backward()
    assert (actor.logprobs_T.grad != 0).tolist() == [False, False, True, True]
    assert (actor.values_T.grad != 0).tolist() == [False, False, True, True]


def two_answers():
    facts = [{"answer": 1.0, "score": 1.0}] * 2
    return continuations([1, 9], [[20, 21], [22]], facts, [{"sampler_logprobs": [0.0] * n} for n in (2, 1)])


@pytest.mark.parametrize("change", ["weights", "dropout", "temperature"])
def test_a_ratio_off_one_is_refused(change: str):
    """T32: exactly 1, so that the least difference shows."""
    role = policy()
    if change == "dropout":
        role.module.lm = add_adapter(role.model, LoraSettings(rank=2, dropout=0.5), 0).eval()
        with torch.no_grad():
            for name, parameter in role.module.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
    actor = ActorCritic(role.module, scorer(1).module)
    reference = policy().module
    forests = [build([two_answers()])]
    targets = make_targets(actor, reference, [forests], 0.1, PLAIN)
    require_ratio_one(actor, targets.minibatches[0], wanted(PLAIN), 1.0, "fp32")
    asked = 1.0
    if change == "weights":
        with torch.no_grad():
            next(role.module.parameters()).add_(1e-5)
    elif change == "dropout":
        actor.train()
    else:
        asked = 1.01
    with pytest.raises(RowFailed, match="before the first update"):
        require_ratio_one(actor, targets.minibatches[0], wanted(PLAIN), asked, "fp32")


def test_kl_at_the_start_is_exactly_zero():
    """T37: the same weights on the same forests give the same bits; the least difference is refused."""
    actor = ActorCritic(policy().module, scorer(1).module)
    forests = [build([two_answers()])]
    assert make_targets(actor, policy().module, [forests], 0.1, PLAIN).largest_kl == 0.0
    require_zero_kl(0.0, "fp32")
    stranger = make_targets(actor, policy(1).module, [forests], 0.1, PLAIN)
    for wrong in (stranger.largest_kl, 1e-9, math.nan):
        with pytest.raises(RowFailed, match="the reference is not the policy that this row starts from"):
            require_zero_kl(wrong, "fp32")


def test_prompts_come_once_an_epoch_in_an_order_of_their_own():
    stream = PromptStream(10, 3, seed=0)
    epochs = [[p for i in range(3 * e, 3 * e + 3) for p in stream.batch(i)] for e in range(2)]
    assert all(len(set(epoch)) == 9 for epoch in epochs) and epochs[0] != epochs[1]
    assert stream.batch(4) == PromptStream(10, 3, seed=0).batch(4)  # follows from its number alone
    assert PromptStream(10, 3, seed=1).batch(4) != stream.batch(4)
    assert (
        sorted(PromptStream(4, 99, seed=0).batch(7)) == sorted(PromptStream(4, None, seed=0).batch(0)) == [0, 1, 2, 3]
    )
    assert PromptStream(4, 99, seed=0).shortage() == (
        "prompts is 99, but there are only 4 to ask: all of them are asked each time"
    )
    assert PromptStream(4, 4, seed=0).shortage() is None and PromptStream(4, None, seed=0).shortage() is None


def test_minibatches_hold_whole_groups():
    assert [groups_each(8, 4), groups_each(6, 4), groups_each(2, 4), groups_each(5, 1)] == [2, 1, 1, 5]


def learner(
    role: Any,
    *,
    reference: Any = None,
    total: int = 100,
    settings: PpoSettings | None = None,
    minibatch: int = 8,
    value: Any = "own",
    mix: Any = (),
    **more: Any,
) -> Learner:
    settings = (settings or PLAIN).model_copy(update={"minibatch": minibatch})
    critic = scorer(0).module if value == "own" else value
    actor = ActorCritic(role.module, critic if settings.has_critic else None)
    train = TrainSettings(
        **{"learning_rate": 1e-2, "schedule": "constant", "warmup": 0.0, "betas": (0.9, 0.999), **more}
    )
    phase = Phase()
    trainer = Trainer(
        actor,
        ppo_loss(settings, 1.0, phase),
        train,
        build_strategy(device="cpu"),
        total=total,
        seed=0,
        coefficients={"pretraining": settings.mix.pretraining, "sft": settings.mix.sft},
        rates={"policy.": 1.0, **({"value.": 1.0} if settings.has_critic else {})},
        parts=("policy.", "value."),
    )
    frozen = forget_gradients(policy() if reference is None else reference)
    return Learner(trainer, frozen.module, settings, phase, mix=mix)


def sampled(role: Any, iteration: int, *, samples: int = 4, tokens: int = 2, count: int = 4) -> Rollout:
    ids = [chat().prompt_ids(ask("abcdefgh"[i])) for i in range(count)]
    encoded = EncodedPrompts([Prompt(f"p{i}", ask("abcdefgh"[i])) for i in range(count)], ids, 0)
    settings = SamplingSettings(samples=samples, max_new_tokens=tokens)
    return Sampler(role.model, chat(), settings, NoiseKey(0, "test")).sample(encoded, iteration=iteration)


def optimised(made: Learner, groups: Any, beta: float, iteration: int) -> dict[str, float]:
    return made.optimise(made.targets(groups, beta, iteration), beta, iteration)


def test_an_iteration_starts_exactly_where_the_last_one_ended():
    """T32, T37: ratio 1 in the first minibatch of every iteration, KL 0 in the first iteration alone."""
    role = policy()
    made = learner(role, minibatch=6)
    for iteration in range(2):
        rollout = sampled(role, iteration)
        targets = made.targets(rollout.groups([float(len(s.ids)) for s in rollout.samples]), 0.1, iteration)
        assert len(targets.minibatches) == 4  # one group of four samples each: two would be eight
        assert {int(f.weights_T.sum()) for m in targets.minibatches for f in m} <= set(range(4, 9))
        figures = made.optimise(targets, 0.1, iteration)
        assert figures["first_ratio"] == 1.0
        assert (targets.largest_kl == 0.0) is (iteration == 0)
    assert made.trainer.done == 2 * 2 * 4  # as the stage predicts it


def test_dropout_does_not_stop_it():
    """T33: a policy trained with dropout is updated without, so its first ratio is 1 as well."""
    start, role = (policy(), policy())
    for one in (start, role):
        one.module.lm = add_adapter(one.model, LoraSettings(rank=2, dropout=0.5), 0)
        with torch.no_grad():
            for name, parameter in one.module.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.05)
    start.module.eval()
    made = learner(role, reference=start)
    without_dropout(made.trainer.module)
    rollout = sampled(role, 0)
    assert optimised(made, rollout.groups([1.0] * 16), 0.1, 0)["first_ratio"] == 1.0


def wanted_share(rollout: Rollout, token: int) -> float:
    return sum(s.ids[0] == token for s in rollout.samples) / len(rollout.samples)


def test_a_rewarded_token_becomes_likelier():
    """T36: a bandit whose arms are the first token."""
    role, token = policy(), 40
    made = learner(role, minibatch=64)
    start = float(torch.softmax(first_logits(role), -1)[:, token].mean().detach())
    for iteration in range(25):
        rollout = sampled(role, iteration, samples=32, tokens=1, count=2)
        scores = [float(s.ids[0] >= token) for s in rollout.samples]
        optimised(made, rollout.groups(scores), 0.0, iteration)
    after = torch.softmax(first_logits(role), -1)[:, token:].sum(-1)
    assert start < 0.01 and bool((after > 0.99).all())


def first_logits(role: Any) -> torch.Tensor:
    ids = torch.tensor([chat().prompt_ids(ask(c)) for c in "ab"])
    return role.model(input_ids=ids, use_cache=False).logits[:, -1].double()


def exact_kl_to(role: Any, reference: Any) -> float:
    p, q = (torch.log_softmax(first_logits(r), -1) for r in (role, reference))
    return float((p.exp() * (p - q)).sum(-1).mean().detach())


def test_without_a_reward_the_policy_returns_to_its_reference():
    """T36: under a constant score the penalty alone speaks, and the KL shrinks."""
    start = policy()
    role = policy()
    with torch.no_grad():
        role.model.lm_head.weight[30:60] *= 4.0
    made = learner(role, reference=start, learning_rate=5e-3, minibatch=64)
    before = exact_kl_to(role, start)
    for iteration in range(1, 22):  # not the first: the policy has left its reference
        rollout = sampled(role, iteration, samples=64, tokens=1, count=2)
        optimised(made, rollout.groups([0.7] * 128), 0.5, iteration)
    assert before > 0.1 and exact_kl_to(role, start) < 0.5 * before


def test_a_huge_penalty_holds_the_policy():
    """T36: beta 1000 against a reward that pulls elsewhere."""

    def moved(beta: float) -> float:
        start, role = policy(), policy()
        made = learner(role, reference=start, learning_rate=2e-5)
        for iteration in range(15):
            rollout = sampled(role, iteration, samples=16, tokens=1, count=2)
            scores = [float(s.ids[0] >= 40) for s in rollout.samples]
            optimised(made, rollout.groups(scores), beta, iteration)
        return exact_kl_to(role, start)

    held, free = moved(1e3), moved(0.0)
    assert held < 1e-3 and free > 3 * held, (held, free)


def test_the_controller_sees_nats_a_response():
    """The KL figure is summed over an answer's tokens and averaged over answers, as Ziegler's target is."""
    forest = build([group((3, 0.0), (1, 0.0))])
    actor, reference = Told([0.0] * 6), Told([0.0, 0.0, -1.0, -1.0, -1.0, -1.0])
    kl = targets_of(forest, actor, reference, 0.1).figures["kl"]
    assert kl == 2.0
    adaptive = controller({"kind": "adaptive", "coefficient": 0.15, "target": 6.0, "horizon": 10_000})
    assert adaptive.update(kl, 512).coefficient == pytest.approx(0.148464)


def test_the_entropy_bonus_keeps_the_policy_open():
    """T36: with nothing but the bonus the entropy rises; its sign is what PPO wants maximised."""
    role = policy()
    with torch.no_grad():
        role.model.lm_head.weight[50:] *= 4.0
    made = learner(role, settings=other(entropy_coefficient=1.0, value_coefficient=0.0))
    entropies = []
    for iteration in range(1, 6):
        rollout = sampled(role, iteration)
        entropies.append(optimised(made, rollout.groups([0.0] * 16), 0.0, iteration)["entropy"])
    assert entropies[-1] > entropies[0] + 0.05


def test_answers_to_one_prompt_are_each_others_baseline():
    """RLOO by hand: rewards 1 - beta KL 0.2 = 0.8 and 3; each less the other, at every token of the answer."""
    forest = build([group((2, 1.0), (1, 3.0)), group((1, 5.0), (1, 5.0))])
    actor, reference = Told([0.0] * len(forest)), Told([0.0] * len(forest))
    with torch.no_grad():
        reference.logprobs_T[2] = -2.0
    ((found,),) = targets_of(forest, actor, reference, 0.1, PpoSettings(advantage="rloo")).minibatches
    same(found.tokens["advantages"], [0, 0, -2.2, -2.2, 2.2, 0, 0, 0, 0])
    assert "returns" not in found.tokens and "old_values" not in found.tokens
    ((found,),) = targets_of(forest, actor, reference, 0.1, PpoSettings(advantage="grpo", divide=False)).minibatches
    same(found.tokens["advantages"], [0, 0, -1.1, -1.1, 1.1, 0, 0, 0, 0])


def test_reinforce_takes_returns_and_whitens_them():
    """One answer of two tokens, KL 1 at each, beta 1, score 4: rewards -1 and 3, returns 2 and 3, whitened -1 and 1."""
    forest = build([group((2, 4.0))])
    actor, reference = Told([0.0] * 4), Told([0.0, 0.0, -1.0, -1.0])
    targets = targets_of(forest, actor, reference, 1.0, PpoSettings(advantage="reinforce++"))
    same(targets.minibatches[0][0].tokens["advantages"], [0, 0, -1, 1], atol=1e-4)
    raw = targets_of(forest, actor, reference, 1.0, PpoSettings(advantage="reinforce++", whiten=False))
    same(raw.minibatches[0][0].tokens["advantages"], [0, 0, 2, 3])


def test_the_critic_may_learn_from_another_lambda():
    """Rewards 0, 1 with values 0.5, 0.5: lambda 0 gives advantages 0, 0.5; returns with lambda 1 are 1, 1."""
    forest = build([group((2, 1.0))])
    actor = Told([0.0] * 4, [0.0, 0.0, 0.5, 0.5])
    decoupled = PpoSettings(lam=0.0, value_lam=1.0, whiten=False)
    ((found,),) = targets_of(forest, actor, Told([0.0] * 4), 0.0, decoupled).minibatches
    same(found.tokens["advantages"], [0, 0, 0, 0.5])
    same(found.tokens["returns"], [0, 0, 1, 1])


def test_answers_may_count_alike_whatever_their_length():
    """Answers of one and three tokens: each token counts 1, or 1 and a third; together 4 tokens, or 2 answers."""
    forest = build([group((1, 0.0), (3, 0.0), (0, 0.0))])
    at = torch.tensor([1, 2, 3])
    tokens, count = token_weights(forest, at, "tokens")
    assert tokens.tolist() == [0, 0, 1, 1, 1, 1] and count == 4.0
    answers_, count = token_weights(forest, at, "answers")
    assert answers_.tolist() == pytest.approx([0, 0, 1, 1 / 3, 1 / 3, 1 / 3]) and count == 2.0


def test_a_penalty_in_the_loss_leaves_the_reward_alone():
    """k2 with log ratio 2: 2^2 / 2 = 2 a token, weight 0.1; the reward is the score. T35: its gradient is r."""
    forest = build([group((1, 1.0))])
    reference = Told([0.0, 0.0, -2.0])
    in_loss = other(kl={"where": "loss", "estimator": "k2"}, value_coefficient=0.0, whiten=False, gamma=1.0)
    actor = Told([0.0, 0.0, 0.0])
    ((found,),) = targets_of(forest, actor, reference, 0.1, in_loss).minibatches
    same(found.tokens["returns"], [0, 0, 1])
    quiet = found.with_tokens(advantages=torch.zeros(3))
    out = loss_of(in_loss, actor, quiet, beta=0.1)
    same(out.terms["tokens"].detach(), 0.2)
    out.terms["tokens"].backward()
    assert float(actor.logprobs_T.grad[2]) == pytest.approx(0.1 * 2.0)


def test_the_exact_kl_pulls_back_to_the_reference():
    """T35, T36: with advantages 0 the penalty alone moves the policy, and the KL over all tokens shrinks."""
    start, role = policy(), policy()
    with torch.no_grad():
        role.model.lm_head.weight[30:60] *= 4.0
    exact = PpoSettings(advantage="rloo", kl={"where": "loss", "estimator": "exact"})
    made = learner(role, reference=start, settings=exact, learning_rate=5e-3, minibatch=64)
    before = exact_kl_to(role, start)
    for iteration in range(1, 22):
        rollout = sampled(role, iteration, samples=4, tokens=1, count=2)
        figures = optimised(made, rollout.groups([0.7] * 8), 1.0, iteration)
    assert before > 0.1 and exact_kl_to(role, start) < 0.5 * before
    assert figures["kl_loss"] < before


def test_a_sampler_that_is_another_policy_is_refused():
    require_sampler(1e-5, 1e-6, "fp32")
    for largest, mean in ((0.1, 1e-6), (1e-5, 1e-2), (math.nan, 0.0)):
        with pytest.raises(RowFailed, match="not the same policy"):
            require_sampler(largest, mean, "fp32")
    require_sampler(0.6, 0.002, "bf16")  # one sharp token's rounding
    for largest, mean in ((0.6, 0.06), (math.nan, 0.0)):
        with pytest.raises(RowFailed, match="not the same policy"):
            require_sampler(largest, mean, "bf16")


def test_what_a_sampler_says_is_compared_with_the_trainer():
    """The gap is 0.5 on one of two tokens."""
    forest = build([group((2, 1.0))]).with_tokens(sampler_logprobs=torch.tensor([9.0, 9.0, -0.5, 0.0]))
    targets = targets_of(forest, Told([0.0] * 4), Told([0.0] * 4), 0.0)
    assert targets.largest_gap == pytest.approx(0.5) and targets.figures["sampler_gap"] == pytest.approx(0.25)


def test_other_records_come_once_an_epoch():
    groups = [continuations([1], [[5 + i]]) for i in range(5)]
    stream = RecordStream(groups, "sft", 2, seed=0)
    seen = [g[1].ids[0] for update in range(5) for g in stream.batch(update)]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [5, 6, 7, 8, 9]
    assert {s.facts["mixed"] for s in stream.batch(0)[0]} == {2.0}


def test_the_result_does_not_depend_on_how_a_minibatch_is_cut():
    """T11, T12: one forest or one for every group, with both ways of averaging."""
    found = []
    for settings in (other(), other(average_over="answers"), PpoSettings(advantage="rloo")):
        for budget in (8192, 24):
            role = policy()
            made = learner(role, settings=settings, minibatch=16, token_budget=budget)
            made_groups = [group((1, 0.0), (5, 1.0), prompt=3), group((2, 1.0), (7, 3.0)), group((3, 0.5), (1, 0.0))]
            optimised(made, made_groups, 0.1, 0)
            found.append(torch.cat([p.detach().flatten() for p in role.module.parameters()]))
        assert float((found[-1] - found[-2]).abs().max()) < 2e-5
    assert float((found[0] - found[2]).abs().max()) > 1e-4  # the two ways of averaging differ
