from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.train.optim import (
    adamw,
    cooldown_steps,
    learning_rate,
    optimizer,
    parameter_groups,
    set_learning_rate,
    state_shapes,
    warmup_steps,
)
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
    made = adamw(model, TrainSettings(), rates={"value.": 3.0})
    set_learning_rate(made, 0.5)
    rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
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


def step_of(kind: str, parameter: nn.Parameter, grads: list[torch.Tensor], **settings: object) -> torch.optim.Optimizer:
    module = nn.Module()
    module.weight = parameter
    made = optimizer(module, TrainSettings.model_validate({"learning_rate": 1e-2, "optimizer": kind, **settings}))
    for grad in grads:
        parameter.grad = grad.clone()
        made.step()
    return made


def test_adafactor_is_the_formula() -> None:
    """Shazeer and Stern 2018, algorithm 4 with the steps of section 8, in float64 by hand; its state is a row and a
    column."""
    draw = torch.Generator().manual_seed(0)
    weight, grads = torch.randn(3, 4, generator=draw), [torch.randn(3, 4, generator=draw) for _ in range(3)]
    parameter = nn.Parameter(weight.clone())
    made = step_of("adafactor", parameter, grads)
    x, row, column = weight.double(), torch.zeros(3, 1).double(), torch.zeros(1, 4).double()
    for t, grad in enumerate((g.double() for g in grads), start=1):
        decay = 1 - t**-0.8
        row = decay * row + (1 - decay) * grad.square().mean(1, keepdim=True)
        column = decay * column + (1 - decay) * grad.square().mean(0, keepdim=True)
        update = grad / (row @ column / row.mean()).sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        x = x - max(1e-3, float(x.square().mean().sqrt())) * min(1e-2, t**-0.5) * update
    torch.testing.assert_close(parameter.double(), x, atol=1e-6, rtol=0)
    kept = {k: tuple(v.shape) for k, v in made.state[parameter].items() if isinstance(v, torch.Tensor)}
    assert kept == state_shapes(made, parameter.shape) == {"step": (), "row_var": (3, 1), "col_var": (1, 4)}
    assert state_shapes(made, (4,)) == {"step": (), "variance": (4,)}


def test_moments_in_8_bits_follow_adamw() -> None:
    """The first update knows no earlier moments and is AdamW's; later ones differ by what 8 bits leave."""
    draw = torch.Generator().manual_seed(0)
    weight, grads = torch.randn(64, 80, generator=draw), [torch.randn(64, 80, generator=draw) for _ in range(4)]
    for count, bound in ((1, 1e-6), (4, 4e-3)):
        own, other = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
        made = step_of("adamw8bit", own, grads[:count], weight_decay=0.1)
        step_of("adamw", other, grads[:count], weight_decay=0.1)
        assert (other - weight).abs().max() > 0 and (own - other).abs().max() <= bound
    kept = {k: tuple(v.shape) for k, v in made.state[own].items() if k in state_shapes(made, own.shape) and k != "step"}
    assert kept == {"state1": (64, 80), "state2": (64, 80), "absmax1": (20,), "absmax2": (20,)}
    assert made.state[own]["state1"].dtype == torch.uint8
    small = nn.Parameter(torch.randn(8, 8, generator=draw))
    assert step_of("adamw8bit", small, [torch.ones(8, 8)]).state[small]["state1"].dtype == torch.float32
