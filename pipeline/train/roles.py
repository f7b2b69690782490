"""The models of a PPO row: who is trained, whom it is compared with, what follows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from pipeline.flow.artifacts import Policy, RewardModel
from pipeline.llama.adapter_settings import AnyAdapter
from pipeline.llama.heads import ActorCritic, PolicyModel, ScalarModel, ValueHead, unwrapped
from pipeline.llama.open import Trainable, open_start, open_trainable, open_trainable_classifier
from pipeline.train.average import Follower
from pipeline.train.ppo_settings import PpoSettings
from pipeline.train.reference import without_dropout


@dataclass
class Roles:
    """`reference` and `average` are frozen; the followers say how they move."""

    policy: Trainable
    reference: Trainable
    actor: ActorCritic
    settings: PpoSettings
    average: Trainable | None = None
    dropout_off: bool = False
    _reference_follower: Follower | None = field(default=None)
    _average_follower: Follower | None = field(default=None)

    def after_update(self) -> None:
        if self._average_follower:
            self._average_follower.follow()

    def after_iteration(self, done: int) -> None:
        """`done` iterations are over: the reference moves where it is not the start."""
        settings = self.settings.reference
        if self._reference_follower is None:
            return
        if settings.kind == "average":
            self._reference_follower.follow()
        elif done % settings.every == 0:
            self._reference_follower.copy()

    def followed(self) -> Mapping[str, Tensor]:
        """What a checkpoint must hold of the followers, by name."""
        found: dict[str, Tensor] = {}
        for name, follower in (("reference", self._reference_follower), ("average", self._average_follower)):
            if follower:
                found |= {f"{name}.{i}": own for i, (_, own) in enumerate(follower.pairs)}
        return found

    @property
    def still(self) -> list[nn.Module]:
        """Frozen models whose weights never move, so that they may share memory."""
        return [] if self._reference_follower else [self.reference.module]

    @property
    def frozen(self) -> list[nn.Module]:
        return [self.reference.module, *([self.average.module] if self.average else [])]


def open_roles(
    policy: Policy, reward: RewardModel | None, settings: PpoSettings, adapter: AnyAdapter | None, seed: int
) -> Roles:
    """The reference is exactly the policy that the row starts from; the critic starts as the settings say."""
    trained = open_trainable(policy, adapter, seed)
    actor = ActorCritic(cast(PolicyModel, trained.module), _critic(policy, reward, trained, settings, adapter, seed))
    moving = settings.reference.kind != "start"
    reference = _follower_of(policy, adapter, seed) if moving else open_start(policy, adapter, seed)
    roles = Roles(trained, reference, actor, settings, dropout_off=without_dropout(actor))
    if moving:
        decay = settings.reference.decay if settings.reference.kind == "average" else 0.0
        roles._reference_follower = Follower(trained.module, reference.module, decay)
    if settings.average is not None:
        roles.average = _follower_of(policy, adapter, seed)
        roles._average_follower = Follower(trained.module, roles.average.module, settings.average)
    return roles


def _critic(
    policy: Policy,
    reward: RewardModel | None,
    trained: Trainable,
    settings: PpoSettings,
    adapter: AnyAdapter | None,
    seed: int,
) -> ScalarModel | ValueHead | None:
    if not settings.has_critic:
        return None
    if settings.critic.start == "shared":
        return ValueHead(unwrapped(trained.model).config.get_text_config().hidden_size, seed)
    start = policy if settings.critic.start == "policy" or reward is None else reward
    critic = cast(ScalarModel, open_trainable_classifier(start, adapter, seed).module)
    if start is reward:  # its scores have mean 0 with the shift, and they are what the critic is to foresee
        critic.shift = float(reward.lineage.get("shift", 0.0))
    return critic


def _follower_of(policy: Policy, adapter: AnyAdapter | None, seed: int) -> Trainable:
    """The policy in the form in which it is trained, frozen: a new adapter starts without any effect."""
    follower = open_trainable(policy, adapter, seed)
    follower.module.requires_grad_(False).eval()
    return follower
