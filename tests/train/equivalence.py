"""Six updates of each stage that trains, on the same records whatever cuts and shares them, and what came out as JSON.

torchrun --nproc_per_node 2 tests/train/equivalence.py OUT STRATEGY [ZERO_STAGE]

test_equivalence.py compares the table of one process, of two, and of padded rows through plain transformers.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from pipeline.algo.preference import make_loss  # noqa: E402
from pipeline.data.forest import Group  # noqa: E402
from pipeline.data.groups import comparison_groups, continuations, conversation_groups  # noqa: E402
from pipeline.data.records import Conversation, Message  # noqa: E402
from pipeline.llama.heads import ActorCritic  # noqa: E402
from pipeline.train.batches import weigh_tokens  # noqa: E402
from pipeline.train.loop import Trainer  # noqa: E402
from pipeline.train.objectives import next_token, pairwise_ranking, per_round, preference, weigh_pairs  # noqa: E402
from pipeline.train.ppo import Learner  # noqa: E402
from pipeline.train.ppo_loss import Phase, ppo_loss  # noqa: E402
from pipeline.train.ppo_settings import PpoSettings  # noqa: E402
from pipeline.train.settings import TrainSettings  # noqa: E402
from pipeline.train.strategy import Strategy, build  # noqa: E402
from tests.small import ask, chat, comparison, forget_gradients, policy, scorer  # noqa: E402

UPDATES = 6
BUDGETS = (2000, 120, 60)  # everything in one pass; several groups in each; one or two
BETA = 0.1
PPO = PpoSettings(epochs=3, minibatch=20, lam=0.9)  # 8 groups of 4 answers: updates on 5 and on 3 of them an epoch
Weigh = Callable[[list[Group]], dict[str, float]]


def conversations() -> list[Conversation]:
    """Two to six messages of unequal lengths, every round trained."""
    draw = random.Random(0)
    return [
        Conversation(
            tuple(
                Message(("user", "assistant")[i % 2], "abcdefgh"[: draw.randrange(1, 9)])
                for i in range(2 * draw.randrange(1, 4))
            )
        )
        for _ in range(7)
    ]


def rankings() -> list[Any]:
    return [comparison("q" * (1 + i % 4), *[c * (1 + (i + j) % 5) for j, c in enumerate("abc"[: 2 + i % 2])])
            for i in range(7)]  # fmt: skip


def pair_groups(reference: bool = False) -> list[Group]:
    groups = comparison_groups(rankings(), chat(), 99).groups
    if reference:
        draw = random.Random(1)
        for group in groups:
            for segment in group[1:]:
                segment.facts["reference"] = -5.0 * len(segment.ids) + draw.random()
    return groups


def chosen_groups() -> list[Group]:
    """What rejection sampling trains on: prompts with the answers that were kept."""
    return [continuations(chat().prompt_ids(ask("p" * (1 + i % 5))), [[40 + i] * (1 + 3 * i % 7)]) for i in range(7)]


def rollout() -> list[Group]:
    """Eight prompts with four answers each, 1 to 9 tokens; what the sampler said is beside the point here."""
    draw = random.Random(2)
    groups = []
    for i in range(8):
        answers = [[draw.randrange(30, 90) for _ in range(draw.randrange(1, 10))] for _ in range(4)]
        facts = [{"answer": 1.0, "score": draw.uniform(-1, 1)} for _ in answers]
        told = [{"sampler_logprobs": [-5.0] * len(a)} for a in answers]
        groups.append(continuations(chat().prompt_ids(ask("r" * (1 + i))), answers, facts, told))
    return groups


def supervised(task: str) -> tuple[Any, Any, list[Group], Weigh]:
    """Module, loss, records and the weight of a batch."""
    if task == "sft":
        return policy().module, per_round, conversation_groups(conversations(), chat(), 99, "all_rounds").groups, weigh
    if task == "rejection":
        return policy().module, next_token, chosen_groups(), weigh
    if task == "reward":
        return scorer().module, pairwise_ranking("pair", 0.0), pair_groups(), weigh_pairs("pair")
    return policy().module, preference(make_loss("sigmoid", beta=BETA)), pair_groups(True), weigh_pairs("pair")


def weigh(groups: list[Group]) -> dict[str, float]:
    return weigh_tokens(groups)


TASKS = ("sft", "rejection", "reward", "dpo", "ppo")


def train(task: str, strategy: Strategy, budget: int, checkpointing: bool) -> dict[str, Any]:
    settings = TrainSettings(
        token_budget=budget, checkpointing=checkpointing, learning_rate=1e-3, schedule="constant", warmup=0.0, clip=0
    )
    if task == "ppo":
        trainer, steps = replayed(strategy, settings)
    else:
        module, loss, groups, weight = supervised(task)
        trainer = Trainer(module, loss, settings, strategy, total=UPDATES, seed=0)
        mine = trainer.share(groups)
        steps = (trainer.step(mine, weight(mine), groups[0]) for _ in range(UPDATES))
    seen = list(steps)
    with trainer.whole():
        weights = {name: p.detach().flatten().tolist() for name, p in trainer.module.named_parameters()}
    return {
        "losses": [step["loss"] for step in seen],
        "norms": [step["gradient_norm"] for step in seen],
        "weights": weights,
    }


def replayed(strategy: Strategy, settings: TrainSettings) -> tuple[Trainer, Iterator[dict[str, float]]]:
    """PPO's updates on `rollout`, recorded one by one; the reference is another policy, so that there is a KL."""
    phase = Phase()
    actor = ActorCritic(policy().module, scorer().module)
    loss = ppo_loss(PPO, 1.0, phase)
    trainer = Trainer(actor, loss, settings, strategy, total=UPDATES, seed=0, parts=("policy.", "value."))
    learner = Learner(trainer, forget_gradients(policy(1)).module, PPO, phase)
    seen: list[dict[str, float]] = []
    step = trainer.step

    def recorded(*arguments: Any) -> dict[str, float]:
        seen.append(step(*arguments))
        return seen[-1]

    trainer.step = recorded  # type: ignore[method-assign, assignment]
    learner.optimise(learner.targets(rollout(), BETA, 1), BETA, 1)
    return trainer, iter(seen)


def table(strategy: Strategy) -> dict[str, Any]:
    """{"task budget checkpointing": what came out}"""
    return {
        f"{task} {budget} {checkpointing}": train(task, strategy, budget, checkpointing)
        for task in TASKS
        for budget in BUDGETS
        for checkpointing in (False, True)
    }


def main(out: str, strategy: str, stage: str = "2") -> None:
    torch.set_num_threads(1)
    processes = int(os.environ["WORLD_SIZE"])
    made = build(processes=processes, strategy=strategy, device="cpu", zero_stage=int(stage), clip=0)
    Path(f"{out}.{made.rank}").write_text(json.dumps(table(made)), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stderr.flush()
    os._exit(0)  # as tests/train/ranks.py ends
