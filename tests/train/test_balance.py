"""The load-balancing loss in a step of training: as transformers' Mixtral has it, and counted by tokens."""

from __future__ import annotations

import pytest
import torch
import transformers

from pipeline.data.forest import Segment
from pipeline.llama.heads import ActorCritic
from pipeline.llama.options.experts import balance
from pipeline.train.batches import weigh_tokens
from pipeline.train.loop import LossSums, Trainer
from pipeline.train.objectives import next_token
from pipeline.train.settings import TrainSettings
from pipeline.train.strategy import build
from tests.small import policy, scorer

IDS = [5, 6, 7, 8, 9, 10, 30, 31, 5, 6]
EXPERTS = {"num_local_experts": 4, "router_aux_loss_coef": 0.1}
ONE = [[Segment(IDS, weights=[0.0, *[1.0] * 9])]]


def trainer(module, loss=next_token, **settings) -> Trainer:
    return Trainer(module, loss, TrainSettings(**{"clip": 0.0, **settings}), build(device="cpu"), total=2, seed=0)


def gradients(made: Trainer, groups=ONE) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Of one step, taken where the optimiser would move the weights."""
    kept: dict[str, torch.Tensor] = {}
    clear = made.engine.clear

    def spy() -> None:
        kept.update({name: p.grad.clone() for name, p in made.module.named_parameters() if p.grad is not None})
        clear()

    made.engine.clear = spy
    return made.step(groups, weigh_tokens(groups)), kept


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_has_the_gradient_of_transformers_mixtral(checkpointing: bool, tmp_path) -> None:
    """The loss with `output_router_logits`, on one sequence; filling behind it does not count."""
    made = policy(**EXPERTS)
    made.model.save_pretrained(tmp_path)
    theirs = transformers.MixtralForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([IDS])
    out = theirs(ids, labels=ids, output_router_logits=True)
    out.loss.backward()
    figures, ours = gradients(trainer(made.module, checkpointing=checkpointing))
    assert figures["loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert figures["router/loss"] == pytest.approx(out.aux_loss.item(), rel=1e-5)
    assert figures["loss/router"] == pytest.approx(0.1 * out.aux_loss.item(), rel=1e-5)
    for name, p in theirs.named_parameters():
        assert (ours[f"lm.{name}"] - p.grad).abs().max() <= 1e-5, name


def test_balance_by_hand() -> None:
    """4 tokens, 2 experts, the best one of each: 3 choose the first. 2 (3/4 (3 s + 1 - s)/4 + 1/4 (3 (1-s) + s)/4)."""
    s = torch.tensor(1.0).sigmoid()
    logits = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    first = (3 * s + 1 - s) / 4
    found = balance(logits[None], 1)
    assert found.loss.item() == pytest.approx(2 * (0.75 * first + 0.25 * (1 - first)).item())
    assert (found.busiest.item(), found.idlest.item()) == (0.75, 0.25)
    even = balance(torch.stack([torch.eye(4), torch.eye(4)]), 1)
    assert even.loss.item() == pytest.approx(1.0) and even.busiest.item() == even.idlest.item() == 0.25
    assert even.entropy.item() == pytest.approx(torch.tensor(4.0).log().item())
    collapsed = balance(torch.eye(2)[:, None].expand(2, 5, 2) * 9, 1)  # each layer to an expert of its own
    assert collapsed.loss.item() == pytest.approx(1.0, abs=1e-3)  # which the loss does not see, and the figures do
    assert (collapsed.busiest.item(), collapsed.idlest.item()) == (1.0, 0.0) and collapsed.entropy < 0.01
    again = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func
    drawn = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(0))
    assert balance(drawn, 2).loss.item() == pytest.approx(again(tuple(drawn), 5, 2).item(), rel=1e-6)


def test_micro_batches_count_by_their_tokens() -> None:
    """Two of 10 and 3 tokens: the mean of their losses by tokens, whatever else is in the step."""
    groups = [*ONE, [Segment([40, 41, 42], weights=[0.0, 1.0, 1.0])]]
    alone = [gradients(trainer(policy(**EXPERTS).module), [group])[0]["router/loss"] for group in groups]
    both, _ = gradients(trainer(policy(**EXPERTS).module, token_budget=10), groups)
    assert both["router/loss"] == pytest.approx((10 * alone[0] + 3 * alone[1]) / 13, rel=1e-6)
    assert both["loss/router"] == pytest.approx(0.1 * both["router/loss"], rel=1e-6)
    assert both["loss"] == pytest.approx(both["nll"] + both["loss/router"], rel=1e-6)
    assert both["router/busiest"] > 0.25 > both["router/idlest"]


def test_policy_and_value_model_have_routers_of_their_own() -> None:
    def loss(module, forest) -> LossSums:
        out = module(forest)
        return LossSums({"tokens": -(out.logprobs_T * forest.weights_T).sum() + out.values_T.sum()})

    pair = ActorCritic(policy(**EXPERTS).module, scorer(1, **EXPERTS).module)
    figures, _ = gradients(trainer(pair, loss))
    each = [gradients(trainer(policy(seed, **EXPERTS).module))[0]["router/loss"] for seed in (0, 1)]
    assert figures["router/loss"] == pytest.approx(sum(each) / 2, rel=1e-6)
    assert figures["loss/router"] == pytest.approx(0.1 * sum(each), rel=1e-6)


def test_models_without_experts_have_no_such_term() -> None:
    for made in (policy(norm="layer"), policy()):
        figures, _ = gradients(trainer(made.module))
        assert not any("router" in name for name in figures)
