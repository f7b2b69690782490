"""A second set of weights that follows a policy: a moving average, or a copy taken now and then."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.flow.errors import UserError


class Follower:
    """What `follower` holds is moved towards the trained parameters of `leader`, which have the same names.

    decay    of the moving average: follower = decay * follower + (1 - decay) * leader, in the follower's precision
    """

    def __init__(self, leader: nn.Module, follower: nn.Module, decay: float = 0.0) -> None:
        self.decay = decay
        own = dict(follower.named_parameters())
        self.pairs = [(p, own[name]) for name, p in leader.named_parameters() if p.requires_grad]
        if any(hasattr(p, "ds_tensor") for p, _ in self.pairs):
            raise UserError("weights sharded by ZeRO-3 cannot be followed: use launch.zero_stage 2, or no average")

    @torch.no_grad()
    def follow(self) -> None:
        for leader, follower in self.pairs:
            follower.lerp_(leader.to(follower.dtype), 1.0 - self.decay)

    @torch.no_grad()
    def copy(self) -> None:
        for leader, follower in self.pairs:
            follower.copy_(leader)
