"""Frozen models between the phases that read them: what is held, and that every bit comes back."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.train.parked import Parked, bring
from pipeline.train.strategy import build
from tests.train.ranks import frozen_models
from tests.train.test_strategy import torchrun


def bits(module: nn.Module) -> list[Any]:
    return [p.detach().flatten().tolist() for p in module.parameters()]


def test_whole_models_are_left_alone() -> None:
    one, other, trained = frozen_models()
    held = [p.data_ptr() for p in one.parameters()]
    for kind in ("whole", "sharded"):  # one process has nobody to share with
        parked = Parked(build(device="cpu"), kind, [one, other], [trained])  # type: ignore[arg-type]
        assert parked.bytes == 0 and [p.data_ptr() for p in one.parameters()] == held
        with parked.whole(one):
            pass


def test_phases_put_models_together_and_take_them_apart() -> None:
    """`other` holds `one`'s weight [3, 5] as well, and a bias of its own [3]; `trained` holds `one`'s bias [3]."""
    one, other, trained = frozen_models()
    before = [bits(copy.deepcopy(m)) for m in (one, other, trained)]
    parked = Parked(build(device="cpu"), "offloaded", [one, other], [trained])
    assert one.weight.numel() == other.weight.numel() == other.bias.numel() == 0
    assert one.bias.numel() == 3 and trained.bias.data_ptr() == one.bias.data_ptr()
    with parked.whole(one):
        assert bits(one) == before[0] and one.weight.data_ptr() == other.weight.data_ptr()
        assert other.bias.numel() == 0
        with parked.whole(other, one):
            assert bits(other) == before[1] and one(torch.ones(5)).shape == (3,)
        assert bits(one) == before[0] and other.bias.numel() == 0
    assert one.weight.numel() == 0 and bits(trained) == before[2]


def test_an_error_inside_takes_them_apart_too() -> None:
    one, other, trained = frozen_models()
    parked = Parked(build(device="cpu"), "offloaded", [one, other], [trained])
    with pytest.raises(ZeroDivisionError), parked.whole(one, other):
        1 / 0  # noqa: B018
    assert one.weight.numel() == other.bias.numel() == 0


def test_two_ranks_hold_half_each(tmp_path: Path) -> None:
    """15 + 3 numbers in shares of 8 + 2: the rest of 8 + 1 is not held, 4 bytes each; bfloat16 comes back as well."""
    one, other, _ = frozen_models()
    expected = [bits(one), bits(other)]
    for rank in torchrun(tmp_path / "parked", 2, "ddp", "2", "parked"):
        assert rank["inside"] == [expected, expected]  # in two phases
        assert rank["between"] == [0, 0, 0, 3] and rank["bytes"] == 4 * (7 + 1)
        assert rank["half"] == [0.5, 1.5, -2.0]


@pytest.mark.parametrize(("sharded", "places"), [(False, False), (True, False), (True, True)])
def test_models_come_to_the_device_parked_and_share_what_the_actor_has_too(sharded: bool, places: bool) -> None:
    """Nothing of a still model that can be parked is ever moved whole; ZeRO-3's actor is not moved here at all."""
    one, other, trained = frozen_models()
    came: list[tuple[str, int]] = []
    follower = nn.Linear(5, 3)
    for name, module in {"one": one, "other": other, "trained": trained, "follower": follower}.items():
        size = lambda module=module: sum(p.numel() for p in module.parameters())
        module.to = lambda device, name=name, size=size: came.append((name, size()))  # type: ignore[method-assign,assignment]
    ranks = SimpleNamespace(sharded=sharded, places=places, device=torch.device("cpu"), world=1, rank=0)
    actor = nn.Sequential(trained)
    parked = bring(ranks, "offloaded", actor, [one, other], [follower])  # type: ignore[arg-type]
    own = [] if places else [("trained", sum(p.numel() for p in trained.parameters()))]
    # a bias that one shares with what is trained stays, unless an engine has a copy of its own
    assert came == [*own, ("follower", 18), ("one", 0 if sharded else 3), ("other", 0)]
    with parked.whole(one):
        assert one(torch.ones(5)).shape == (3,)
