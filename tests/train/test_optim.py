from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.train.optim import adamw, cooldown_steps, learning_rate, parameter_groups, set_learning_rate, warmup_steps
from pipeline.train.settings import TrainSettings
from tests.train.tiny import Tiny


def test_norms_and_biases_do_not_decay_but_embeddings_do() -> None:
    model = Tiny()
    names = {id(p): name for name, p in model.named_parameters()}
    by_decay = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1)
    }
    assert by_decay == {
        0.1: {"embedding.weight", "middle.weight", "head.weight"},
        0.0: {"norm.weight", "norm.bias", "middle.bias"},
    }


def test_frozen_parameters_are_left_out_and_rates_go_by_prefix() -> None:
    model = nn.ModuleDict({"policy": nn.Linear(2, 2), "value": nn.Linear(2, 1)})
    model["policy"].bias.requires_grad_(False)
    optimizer = adamw(model, TrainSettings(), rates={"value.": 3.0})
    set_learning_rate(optimizer, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {
        id(model["policy"].weight): 0.5,
        id(model["value"].weight): 1.5,
        id(model["value"].bias): 1.5,
    }
    with pytest.raises(ValueError, match="critic"):
        parameter_groups(model, 0.0, rates={"critic.": 1.0})


def test_learning_rate_is_the_closed_form() -> None:
    settings = TrainSettings(learning_rate=1e-3, warmup=10 / 110, final_fraction=0.0)
    expected = {5: 5e-4, 10: 1e-3, 35: 8.535533906e-4, 60: 5e-4, 85: 1.464466094e-4, 110: 0.0}
    assert warmup_steps(settings, 110) == 10
    for step, rate in expected.items():
        assert learning_rate(settings, step, 110) == pytest.approx(rate, abs=1e-12)
    assert learning_rate(TrainSettings(learning_rate=2.0), 40, 40) == pytest.approx(0.2)
    assert learning_rate(TrainSettings(learning_rate=2.0), 1, 1) == pytest.approx(0.2)


def test_shapes_of_the_rate() -> None:
    """100 steps, a tenth of warm-up: half way down at step 55, a tenth of the peak at the end."""
    for schedule, middle, end in (("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1, 1), ("wsd", 1, 0.1)):
        settings = TrainSettings(learning_rate=1.0, warmup=0.1, schedule=schedule)  # type: ignore[arg-type]
        rates = [learning_rate(settings, step, 100) for step in (5, 10, 55, 100)]
        assert rates == pytest.approx([0.5, 1.0, middle, end])


def test_wsd_falls_in_its_last_steps_alone() -> None:
    settings = TrainSettings(learning_rate=1.0, warmup=0.1, schedule="wsd", cooldown=0.2, final_fraction=0.01)
    assert cooldown_steps(settings, 100) == 20
    assert [learning_rate(settings, s, 100) for s in (10, 80, 90, 100)] == pytest.approx([1.0, 1.0, 0.1, 0.01])
    assert [cooldown_steps(settings, n) for n in (1, 2, 3)] == [1, 1, 1]
    assert learning_rate(settings, 1, 1) == pytest.approx(0.01)


@pytest.mark.parametrize(("eps", "moved"), [(1e-8, 9.99900e-4), (1e-5, 9.09091e-4)])
def test_first_update_has_epsilon_outside_the_root(eps: float, moved: float) -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    module = nn.ParameterList([weight])
    weight.grad = torch.full_like(weight, 1e-4)
    adamw(module, TrainSettings(learning_rate=1e-3, eps=eps)).step()
    assert float(-weight.detach()) == pytest.approx(moved, rel=1e-5)  # TF1 would give 9.96848e-4 and 2.40253e-4
