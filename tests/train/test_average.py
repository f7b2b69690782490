"""Weights that follow others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.flow.errors import UserError
from pipeline.train.average import Follower


def pair() -> tuple[nn.Linear, nn.Linear]:
    leader, follower = nn.Linear(2, 1), nn.Linear(2, 1)
    with torch.no_grad():
        leader.weight.fill_(1.0)
        follower.weight.fill_(0.0)
    leader.bias.requires_grad_(False)
    return leader, follower.requires_grad_(False)


def test_a_moving_average_by_hand():
    """Decay 0.75 towards 1: 0.25, then 0.4375. What is not trained stays."""
    leader, follower = pair()
    bias = follower.bias.clone()
    average = Follower(leader, follower, decay=0.75)
    average.follow()
    assert follower.weight.tolist() == [[0.25, 0.25]]
    average.follow()
    assert follower.weight.tolist() == [[0.4375, 0.4375]]
    assert torch.equal(follower.bias, bias) and leader.weight.tolist() == [[1.0, 1.0]]


def test_a_copy_is_the_same_bits():
    leader, follower = pair()
    Follower(leader, follower).copy()
    assert torch.equal(leader.weight, follower.weight) and leader.weight.data_ptr() != follower.weight.data_ptr()


def test_shards_cannot_be_followed():
    leader, follower = pair()
    leader.weight.ds_tensor = torch.zeros(1)
    with pytest.raises(UserError, match="ZeRO-3"):
        Follower(leader, follower)
