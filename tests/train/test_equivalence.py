"""Token budget, ranks, recomputation, forests or padded rows, pads left or right: one loss and one gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.data.forest import Group
from pipeline.train.strategy import build
from tests.small import chat, policy, scorer
from tests.train import equivalence
from tests.train.equivalence import BETA, BUDGETS, PPO, TASKS, UPDATES, rollout, supervised
from tests.train.test_strategy import torchrun

ONE = {task: f"{task} {BUDGETS[0]} False" for task in TASKS}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return equivalence.table(build(device="cpu"))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The first update to rounding; later ones, which Adam makes of it, and the weights to 1e-5."""
    assert len(found["losses"]) == UPDATES
    assert found["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-6)
    assert found["norms"][0] == pytest.approx(expected["norms"][0], rel=1e-5)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["losses"][0] != expected["losses"][-1]
    for name, values in expected["weights"].items():
        ours, theirs = torch.tensor(found["weights"][name]), torch.tensor(values)
        assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm()), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("task", TASKS)
def test_cuts_and_recomputation(alone: dict[str, Any], task: str, budget: int, checkpointing: bool) -> None:
    assert_same(alone[f"{task} {budget} {checkpointing}"], alone[ONE[task]])


WAYS = [("ddp",), ("fsdp",), ("deepspeed", "1"), ("deepspeed", "2"), ("deepspeed", "3")]
SLOW = [pytest.param(2, way, marks=() if way == ("ddp",) else pytest.mark.slow) for way in WAYS]
SLOW += [pytest.param(4, way, marks=pytest.mark.slow) for way in WAYS]


@pytest.mark.parametrize(("processes", "way"), SLOW)
def test_ranks(alone: dict[str, Any], tmp_path: Path, processes: int, way: tuple[str, ...]) -> None:
    ranks = torchrun(tmp_path / "table", processes, *way, script="equivalence.py")
    for case, expected in alone.items():
        for rank in ranks:
            assert_same(rank[case], expected)


# ----------------------------------------------------------------------------- padded rows, plain transformers


class Rows:
    """Every answer with its prompt as a row of its own, padded on one side, through a plain transformers model."""

    def __init__(self, groups: list[Group], left: bool) -> None:
        self.rows, self.trained, self.group = [], [], []  # type: list[list[int]], list[list[float]], list[int]
        self.answers = []
        for number, group in enumerate(groups):
            for segment in group[1:] or group:
                prompt = group[0] if group[1:] else None
                self.rows.append([*(prompt.ids if prompt else []), *segment.ids])
                self.trained.append([*[0.0] * (len(prompt.ids) if prompt else 0), *segment.weights])
                self.group.append(number)
                self.answers.append(segment)
        width = max(map(len, self.rows))
        pad = chat().tokenizer.pad_token_id
        side: Callable[[list[Any], Any], list[Any]] = (
            (lambda row, fill: [fill] * (width - len(row)) + row)
            if left
            else (lambda row, fill: row + [fill] * (width - len(row)))
        )
        self.ids = torch.tensor([side(row, pad) for row in self.rows])
        self.mask = torch.tensor([side([1] * len(row), 0) for row in self.rows])
        self.weights = torch.tensor([side(row, 0.0) for row in self.trained])
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)

    def logprobs(self, lm: Any) -> Tensor:
        """[rows, width] of each token under the ones before it; 0 for the first."""
        out = lm(input_ids=self.ids, attention_mask=self.mask, position_ids=self.positions, use_cache=False)
        found = torch.log_softmax(out.logits[:, :-1], -1).gather(2, self.ids[:, 1:, None]).squeeze(2)
        return torch.cat([torch.zeros_like(found[:, :1]), found], 1)

    def values(self, model: Any) -> Tensor:
        """[rows, width] of the scalar head at every token."""
        trunk, head = model.model, model.score
        states = trunk(input_ids=self.ids, attention_mask=self.mask, position_ids=self.positions, use_cache=False)
        return head(states.last_hidden_state).squeeze(2)

    def last(self, values: Tensor) -> Tensor:
        at = (self.mask * torch.arange(self.mask.shape[1])).argmax(1)
        return values[torch.arange(len(values)), at]

    def pairs(self, worth: Callable[[Any], float]) -> list[tuple[int, int]]:
        """(better, worse) rows of one group."""
        found = [worth(answer) for answer in self.answers]
        return [
            (i, j)
            for i in range(len(found))
            for j in range(len(found))
            if self.group[i] == self.group[j] and found[i] > found[j]
        ]


def padded(task: str, left: bool) -> tuple[float, float]:
    """Loss and gradient norm by the textbook."""
    if task == "ppo":
        return padded_ppo(left)
    role = scorer() if task == "reward" else policy()
    rows = Rows(supervised(task)[2], left)
    if task in ("sft", "rejection"):
        loss = -(rows.logprobs(role.model) * rows.weights).sum() / rows.weights.sum()
    elif task == "reward":
        scores = rows.last(rows.values(role.model))
        better, worse = zip(*rows.pairs(lambda answer: answer.facts["worth"]), strict=True)
        loss = -torch.nn.functional.logsigmoid(scores[list(better)] - scores[list(worse)]).mean()
    else:
        log_ratio = (rows.logprobs(role.model) * rows.weights).sum(1)
        log_ratio = log_ratio - torch.tensor([answer.facts["reference"] for answer in rows.answers])
        better, worse = zip(*rows.pairs(lambda answer: answer.facts["worth"]), strict=True)
        loss = -torch.nn.functional.logsigmoid(BETA * (log_ratio[list(better)] - log_ratio[list(worse)])).mean()
    loss.backward()
    return float(loss.detach()), norm_of(role.module)


def padded_ppo(left: bool) -> tuple[float, float]:
    """PPO's first minibatch: rewards, GAE by its recursion, whitened over all minibatches, both clipped losses."""
    from pipeline.train.randomness import permutation

    groups = rollout()
    order = permutation(len(groups), 0, "minibatches", 1)
    everything = Rows([groups[i] for i in order], left)
    first = Rows([groups[i] for i in order[: PPO.minibatch // 4]], left)
    actor, critic, reference = policy(), scorer(), policy(1)
    with torch.no_grad():
        old, base, values = everything.logprobs(actor.model), everything.logprobs(reference.model), None
        values = before(everything.values(critic.model))
        advantages, returns = torch.zeros_like(old), torch.zeros_like(old)
        for row, answer in enumerate(everything.answers):
            at = everything.weights[row].nonzero().flatten().tolist()
            ahead = carried = 0.0
            for t in reversed(at):
                reward = -BETA * float(old[row, t] - base[row, t]) + (answer.facts["score"] if t == at[-1] else 0.0)
                carried = reward + PPO.gamma * ahead - float(values[row, t]) + PPO.gamma * PPO.lam * carried
                ahead = float(values[row, t])
                advantages[row, t], returns[row, t] = carried, carried + ahead
        trained = everything.weights > 0
        mean, deviation = advantages[trained].mean(), advantages[trained].std(correction=0)
        white = (advantages - mean) / (deviation + 1e-8)
    n, trained = len(first.rows), first.weights > 0
    width = first.ids.shape[1]
    cut = (lambda x: x[:n, -width:]) if left else (lambda x: x[:n, :width])
    ratio = torch.exp(first.logprobs(actor.model) - cut(old))
    clipped = ratio.clamp(1 - PPO.clip, 1 + PPO.clip)
    policy_loss = -torch.minimum(ratio * cut(white), clipped * cut(white))[trained].mean()
    now = before(first.values(critic.model))
    near = cut(values) + (now - cut(values)).clamp(-PPO.value_clip, PPO.value_clip)
    value_loss = 0.5 * torch.maximum((now - cut(returns)) ** 2, (near - cut(returns)) ** 2)[trained].mean()
    loss = policy_loss + PPO.value_coefficient * value_loss
    loss.backward()
    return float(loss.detach()), (norm_of(actor.module) ** 2 + norm_of(critic.module) ** 2) ** 0.5


def before(values: Tensor) -> Tensor:
    """The value of a token is what the critic says before it is chosen."""
    return torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], 1)


def norm_of(module: Any) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("task", TASKS)
def test_padded_rows(alone: dict[str, Any], task: str, left: bool) -> None:
    loss, norm = padded(task, left)
    ours = alone[ONE[task]]
    assert ours["losses"][0] == pytest.approx(loss, rel=1e-6)
    assert ours["norms"][0] == pytest.approx(norm, rel=1e-5)
