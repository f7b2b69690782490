"""The same losses and gradients as TRL's trainers on fixed log-probs, through TRL's own loss methods."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.algo.preference import PairLogps, UnpairedLogps, make_loss

LENGTHS = [3, 7, 1, 5, 4, 6, 2, 7]  # tokens of four chosen answers, then of the four rejected ones
WIDTH = 9  # positions of a padded row, the first one a prompt token
DESIRABLE = [True, False, False, True, True, False, True, True]


@pytest.fixture(scope="module")
def dpo_trainer() -> Any:
    return pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer


def by_token() -> tuple[Tensor, Tensor]:
    """Log-probs [8, 8] of the tokens after the first, 0 where nothing is answered, and the mask [8, 9] of answers."""
    draw = torch.Generator().manual_seed(0)
    mask = torch.tensor([[0] + [1] * n + [0] * (WIDTH - 1 - n) for n in LENGTHS])
    logps = -torch.rand(8, WIDTH - 1, generator=draw, dtype=torch.float64).float() * 3
    return (logps * mask[:, 1:]).requires_grad_(), mask


REFERENCE = torch.tensor([-4.0, -9.0, -1.0, -8.0, -5.5, -10.5, -2.0, -12.0])


def stand_in(**settings: Any) -> SimpleNamespace:
    """What TRL's loss methods ask of their trainer."""
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    return SimpleNamespace(
        accelerator=accelerator, model=SimpleNamespace(training=True), aux_loss_enabled=False,
        precompute_ref_logps=True, ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False,
        loss_weights=[1.0], _tp_size=1, _metrics={"train": defaultdict(list)}, _total_train_tokens=0, **settings,
    )  # fmt: skip


def model_of(logps: Tensor) -> Any:
    zeros = torch.zeros_like(logps)
    outputs = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return lambda **_: outputs


def batch_of(mask: Tensor) -> dict[str, Tensor]:
    return {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}


def pairs_of(logps: Tensor) -> PairLogps:
    chosen, rejected = logps.sum(1).chunk(2)
    lengths = torch.tensor(LENGTHS, dtype=torch.float32).chunk(2)
    return PairLogps(chosen, rejected, *REFERENCE.chunk(2), *lengths, -chosen / lengths[0])


@pytest.mark.parametrize(
    ("theirs", "name", "given"),
    [
        ("sigmoid", "sigmoid", {"beta": 0.1}),
        ("robust", "robust", {"beta": 0.3, "label_smoothing": 0.2}),
        ("hinge", "hinge", {"beta": 0.3}),
        ("ipo", "ipo", {"beta": 0.1, "length_normalised": True}),
        ("apo_zero", "apo_zero", {"beta": 0.2}),
        ("sigmoid_norm", "sigmoid_norm", {"beta": 5.0}),
    ],
)
def test_dpo_trainer(dpo_trainer: Any, theirs: str, name: str, given: dict[str, Any]) -> None:
    logps, mask = by_token()
    chosen, rejected = REFERENCE.chunk(2)
    trainer = stand_in(loss_types=[theirs], beta=given["beta"], label_smoothing=given.get("label_smoothing", 0.0))
    inputs = {**batch_of(mask), "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    expected = dpo_trainer._compute_loss(trainer, model_of(logps), inputs, False)
    (theirs_grad,) = torch.autograd.grad(expected, logps)
    out = make_loss(name, **given)(pairs_of(logps))
    (ours_grad,) = torch.autograd.grad(out.losses.mean(), logps)
    torch.testing.assert_close(out.losses.mean(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-5, atol=1e-8)
    margin, count = out.metrics["margin"]
    if name not in ("sigmoid_norm", "ipo"):  # TRL logs rewards of whole answers whatever the loss compares
        assert (margin / count).item() == pytest.approx(trainer._metrics["train"]["rewards/margins"][0], rel=1e-5)


@pytest.mark.parametrize("unrelated", [[0.5, 2.0, -1.0, 0.7], [-3.0, 1.0, 0.5, 0.25]], ids=["above", "clamped"])
def test_kto_trainer(unrelated: list[float]) -> None:
    """z0 from given log-ratios of unrelated answers: 0.55 nats, and -0.3125, which counts as 0."""
    trainer_class = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
    from pipeline.algo.preference import reference_point

    logps, mask = by_token()
    against = torch.zeros(4)
    trainer = stand_in(
        beta=0.3, loss_type="kto", calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.7,
        _compute_kl_logps=lambda model, batch: torch.tensor(unrelated),
    )  # fmt: skip
    inputs = {**batch_of(mask), "label": torch.tensor(DESIRABLE), "ref_logps": REFERENCE, "ref_KL_logps": against}
    expected = trainer_class._compute_loss(trainer, model_of(logps), inputs, False)
    (theirs_grad,) = torch.autograd.grad(expected, logps)
    point = reference_point(sum(unrelated) / 4)
    loss = make_loss("kto", beta=0.3, undesirable_weight=1.7)
    out = loss(UnpairedLogps(logps.sum(1), REFERENCE, torch.tensor(DESIRABLE), point))
    (ours_grad,) = torch.autograd.grad(out.losses.mean(), logps)
    assert trainer._metrics["train"]["kl"] == [pytest.approx(point)]
    torch.testing.assert_close(out.losses.mean(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-5, atol=1e-8)
    for ours, theirs in (("reward_desirable", "rewards/chosen"), ("reward_undesirable", "rewards/rejected")):
        total, count = out.metrics[ours]
        assert (total / count).item() == pytest.approx(trainer._metrics["train"][theirs][0], rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_simpo_of_the_cpo_trainer() -> None:
    trainer_class = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    logps, _ = by_token()
    given = pairs_of(logps)
    trainer = stand_in(loss_type="simpo", beta=2.0, simpo_gamma=0.7, label_smoothing=0.0, alpha=0.0)
    means = given.policy_chosen / given.length_chosen, given.policy_rejected / given.length_rejected
    losses, chosen, rejected = trainer_class.cpo_loss(trainer, *means)
    out = make_loss("simpo", beta=2.0, gamma=0.7)(given)
    torch.testing.assert_close(out.losses, losses, rtol=1e-6, atol=1e-7)
    assert out.metrics["reward_chosen"][0].item() == pytest.approx(chosen.sum().item(), rel=1e-5)
    assert out.metrics["reward_rejected"][0].item() == pytest.approx(rejected.sum().item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_odds_ratio_of_the_orpo_trainer() -> None:
    """TRL's method gives beta * log s(log odds ratio), to be taken from the NLL."""
    trainer_class = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    logps, _ = by_token()
    given = pairs_of(logps)
    means = given.policy_chosen / given.length_chosen, given.policy_rejected / given.length_rejected
    bonus, *_ = trainer_class.odds_ratio_loss(stand_in(beta=0.25), *means)
    out = make_loss("orpo", beta=0.25)(given)
    torch.testing.assert_close(out.losses, given.nll_chosen - bonus, rtol=1e-6, atol=1e-6)
