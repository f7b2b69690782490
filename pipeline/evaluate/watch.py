"""What a policy stage looks at while it trains: its answers to prompts that it does not train on.

    watch = open_watch(inputs, config, policy, reader, workspace, device, proxy=rewards, sampling=config.sampling)
    figures = watch()              # {"proxy": .., "heldout": .., "gold": .., "kl": .., "stop_rate": .., "choice": ..}

`choice` is what the best checkpoint is chosen by; the judge never is.

The best checkpoint is the one with the highest score of the held-out reward model (of the one trained against where
there is no other) within a KL budget. Proxy and held-out part where the one rises while the other falls (Gao et al.
2023, "Scaling laws for reward model overoptimization").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from pipeline.data.reader import Reader
from pipeline.data.records import Prompt
from pipeline.evaluate.compare import Floats
from pipeline.evaluate.panel import Panel
from pipeline.evaluate.policies import answer, kl_to
from pipeline.flow.artifacts import RewardModel
from pipeline.flow.errors import UserError
from pipeline.flow.stage import Workspace
from pipeline.llama.open import Trainable, open_frozen
from pipeline.rollout.collect import fitting
from pipeline.rollout.engine import SamplingSettings
from pipeline.rollout.noise import NoiseKey
from pipeline.rollout.rewards import Rewards

ERRORS_APART = 2.0  # standard errors of the paired difference
CHOICE = "choice"


def open_watch(
    inputs: Any,
    config: Any,
    policy: Trainable,
    reader: Reader,
    workspace: Workspace,
    device: Any,
    *,
    proxy: RewardModel | Rewards | None,
    sampling: SamplingSettings,
) -> Watch | None:
    """What a row with these inputs and settings looks at; None without `dev`, UserError where no prompt of it fits.

    `policy` is what is trained; KL is to what the row starts from. Answers are drawn as `sampling` says, one a prompt,
    at temperature 1, and never searched for by beams, whose log ratio is no KL. A proxy of several sources is their
    combined score, before length terms and missing ends.
    """
    if inputs.dev is None:
        return None
    dev, budget = reader.read("dev", inputs.dev, "prompts"), config.train.token_budget
    panel = Panel.open(proxy=proxy, heldout=inputs.heldout_reward, judge=inputs.judge, token_budget=budget)
    sampling = sampling.model_copy(update={"samples": 1, "temperature": 1.0, "num_beams": 1})
    reference = open_frozen(inputs.policy)
    try:
        fits = fitting(dev, [reference.chat], config.max_tokens, sampling.max_new_tokens)
    except UserError as problem:
        raise UserError(f"dev: {problem}") from problem
    if len(fits) < len(dev):
        workspace.say(f"dev: {len(dev) - len(fits)} of {len(dev)} prompts are too long and left out")
    asked = reference.chat.prompts_ids([prompt.messages for prompt in fits])
    if (longest := max(map(len, asked)) + sampling.max_new_tokens) > budget:
        raise UserError(
            f"dev: a prompt with its answer may have {longest} tokens, more than train.token_budget {budget}: raise "
            "it, or leave long prompts out"
        )
    key = NoiseKey(workspace.seed, "dev")
    made = Watch(
        policy, fits, panel, reference, sampling, key, config.max_tokens, budget, config.kl_budget, workspace.say
    )
    for network in made.networks:
        network.to(device)
    return made


@dataclass
class Watch:
    """`kl_budget` in nats a response; None chooses among all."""

    policy: Trainable
    prompts: Sequence[Prompt]
    panel: Panel
    reference: Trainable
    sampling: SamplingSettings
    key: NoiseKey
    max_tokens: int
    token_budget: int
    kl_budget: float | None = None
    say: Callable[[str], None] = print
    _best: tuple[float, Floats, Floats] | None = field(default=None)  # held-out mean; proxy and held-out by prompt
    parted: str | None = None
    _within: bool = False  # whether a look was within the budget

    def __call__(self) -> dict[str, float]:
        """The figures of the policy now. KL is known at temperature 1 only."""
        found = answer("", self.policy, self.prompts, self.sampling, self.max_tokens, self.key)
        self.panel.score(found)
        figures = {name: float(values.mean()) for name, values in found.scores.items()}
        figures |= {"length": float(found.length.mean()), "stop_rate": float(found.stopped.mean())}
        if self.sampling.temperature == 1.0 and not self.sampling.truncated:
            figures["kl"] = kl_to(self.reference, self.policy, found.samples, self.token_budget)
        self._compare(found.scores)
        return figures if self.chosen_by is None else figures | {CHOICE: self.choice(figures)}

    @property
    def networks(self) -> list[nn.Module]:
        """The frozen models that it holds."""
        return [self.reference.module, *self.panel.networks]

    def chosen(self, kept_step: int, *, chose: bool, looked: int) -> dict[str, Any]:
        """What a row records of its choice. `chose`: whether the best of `looked` looks is kept; says so where all of
        them were beyond the budget."""
        found = {
            "parted": self.parted,
            "kl_budget": self.kl_budget,
            "kept_step": kept_step,
            "dev_prompts": len(self.prompts),
        }
        if chose and self.chosen_by:
            return found | {"chosen_by": self.chosen_by}
        if looked and self.chosen_by and self.kl_budget is not None and not self._within:
            self.say("no look at dev was within kl_budget: the last weights are kept")
        return found

    def state(self) -> dict[str, Any]:
        """JSON values that `load` takes back, so that a row can be stopped and go on."""
        best = self._best and [self._best[0], self._best[1].tolist(), self._best[2].tolist()]
        return {"best": best, "parted": self.parted, "within": self._within}

    def load(self, state: Mapping[str, Any]) -> None:
        best = state["best"]
        self._best = (best[0], np.array(best[1]), np.array(best[2])) if best else None
        self.parted, self._within = state["parted"], state["within"]

    @property
    def chosen_by(self) -> str | None:
        return next((name for name in ("heldout", "proxy") if name in self.panel.rewards), None)

    def choice(self, figures: Mapping[str, float]) -> float:
        """Higher is better; minus infinity outside the KL budget, and where there is nothing to choose by."""
        over = self.kl_budget is not None and figures.get("kl", 0.0) > self.kl_budget
        self._within |= not over
        return -math.inf if over or self.chosen_by is None else figures[self.chosen_by]

    def _compare(self, scores: Mapping[str, Floats]) -> None:
        """Note, once, that proxy rose and held-out fell since held-out was best, beyond chance over prompts."""
        if not {"proxy", "heldout"} <= scores.keys():
            return
        proxy, heldout = scores["proxy"].mean(1), scores["heldout"].mean(1)
        if self._best is None or heldout.mean() > self._best[0]:
            self._best = (float(heldout.mean()), proxy, heldout)
        elif self.parted is None:
            rise, fall = proxy - self._best[1], heldout - self._best[2]
            if _errors(rise) > ERRORS_APART and _errors(fall) < -ERRORS_APART:
                self.parted = (
                    f"proxy and held-out reward part: {self._best[1].mean():.3f} -> {proxy.mean():.3f} by the model "
                    f"trained against, {self._best[0]:.3f} -> {heldout.mean():.3f} by the held-out one"
                )
                self.say(self.parted)


def _errors(difference: Floats) -> float:
    """The mean in standard errors; infinite where every prompt moved alike."""
    error = float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else 0.0
    mean = float(difference.mean())
    return mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
