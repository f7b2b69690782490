"""Our side of the reward and DPO benchmarks: the project's own loop on groups of a prompt and its answers."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

from tests.benchmarks.common import THREADS, Clock, Stand, peak_mb
from tests.benchmarks.preference import Task
from tests.benchmarks.shapes import policy_files, reward_files


def build_trainer(task: Task, groups: list[Any]) -> tuple[Any, list[Any]]:
    """The trainer as the stage builds it, and the groups, with the reference's log-probs where they are needed."""
    from pipeline.algo.preference import make_loss
    from pipeline.llama.open import open_trainable, open_trainable_classifier
    from pipeline.train import objectives
    from pipeline.train.batches import Plan
    from pipeline.train.loop import Trainer
    from pipeline.train.reference import with_reference, without_dropout
    from pipeline.train.settings import TrainSettings
    from pipeline.train.strategy import build

    settings = TrainSettings(learning_rate=1e-4, batch=task.batch, token_budget=task.token_budget)
    strategy = build(device="cpu")
    weigh = objectives.weigh_pairs("pair")
    plan = Plan(groups, settings, seed=0, strategy=strategy, weigh=weigh)
    if task.kind == "reward":
        scorer = open_trainable_classifier(reward_files(task.models), None, 0)
        loss = objectives.pairwise_ranking("pair", 0.0)
        return Trainer(scorer.module, loss, settings, strategy, total=len(plan), seed=0), groups
    policy = open_trainable(policy_files(task.models), None, 0)
    without_dropout(policy.module)
    loss = objectives.preference(make_loss("sigmoid", beta=0.1, label_smoothing=0.0))
    trainer = Trainer(policy.module, loss, settings, strategy, total=len(plan), seed=0)
    return trainer, with_reference(trainer, plan, SimpleNamespace(progress=lambda *_, **__: None))


def main(task: Task) -> None:
    import torch

    from pipeline.data.groups import continuations
    from pipeline.flow import heap
    from pipeline.train.objectives import weigh_pairs

    heap.keep_freed()  # as every worker of the project does
    torch.set_num_threads(THREADS)
    worth = [{"answer": 1.0, "worth": float(task.answers - 1 - place)} for place in range(task.answers)]
    groups = [continuations(prompt, answers, worth) for prompt, answers in task.records()]
    trainer, groups = build_trainer(task, groups)
    weigh = weigh_pairs("pair")
    stand, clock = Stand(), Clock()
    start_mb = peak_mb()

    def steps(number: int) -> dict[str, Any]:
        loss = 0.0
        with stand.measure() as spent:
            for k in range(number * task.steps, (number + 1) * task.steps):
                batch = groups[k * task.batch : (k + 1) * task.batch]
                figures = trainer.step(batch, weigh(batch))
                loss = loss or figures["loss"]
        return {**spent.rates(task.batch * task.steps), "seconds": clock.read(0.0), "loss": loss}

    first = steps(0)["loss"]
    stand.answer(start_mb=start_mb, first_loss=first)
    number = 1
    while stand.wait():
        stand.answer(**steps(number))
        number += 1


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
