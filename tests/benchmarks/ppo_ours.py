"""Our side of the PPO benchmark: the parts that stages/ppo.py is composed of, in its order."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from pipeline.train.ppo_settings import CriticSettings, PpoSettings
from tests.benchmarks.common import THREADS, Clock, Stand
from tests.benchmarks.ppo import Task
from tests.benchmarks.shapes import STOP, policy_files, reward_files


def probe(task: Any, trainer: Any, reward: Any) -> dict[str, list[float]]:
    """Log-probs, scores and, with a critic, values of fixed answers, as TRL's functions give them for the same."""
    from pipeline.data.forest import build
    from pipeline.data.groups import continuations
    from pipeline.rollout.scoring import score_samples

    groups = [continuations(prompt, [answer]) for prompt, answer in task.probe()]
    forest = build(groups)
    with trainer.inference():
        out = trainer.engine(forest)
    scores = score_samples(reward, [p for p, _ in task.probe()], [[a] for _, a in task.probe()])
    chosen = forest.weights_T > 0
    return {
        "logprobs": out.logprobs_T[chosen].tolist(),
        "scores": [s for own in scores for s in own],
        **({} if out.values_T is None else {"values": out.values_T[chosen].tolist()}),
    }


def run(task: Any, settings: PpoSettings, *, samples: int, per_turn: int) -> None:
    """Turns of PPO, as stages/ppo.py composes it, on the prompts of the task; `per_turn` answers make the rate."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from pipeline.data.records import Prompt
    from pipeline.flow import heap
    from pipeline.llama.heads import ActorCritic, ScalarModel, ValueHead
    from pipeline.llama.open import open_classifier, open_frozen, open_trainable, open_trainable_classifier
    from pipeline.rollout.collect import EncodedPrompts, Sampler
    from pipeline.rollout.engine import SamplingSettings
    from pipeline.rollout.noise import NoiseKey
    from pipeline.rollout.reward import Reward
    from pipeline.train.loop import Trainer
    from pipeline.train.ppo import Learner
    from pipeline.train.ppo_loss import Phase, ppo_loss
    from pipeline.train.settings import TrainSettings
    from pipeline.train.strategy import build

    heap.keep_freed()  # as every worker of the project does
    torch.set_num_threads(THREADS)
    policy = open_trainable(policy_files(task.models), None, 0)
    policy.chat.stop_ids = (STOP,) if task.stops else ()
    reference = open_frozen(policy_files(task.models))
    reward = Reward(ScalarModel(open_classifier(reward_files(task.models)).model).requires_grad_(False), policy.chat, 0)
    value: Any = None
    if settings.has_critic and settings.critic.start == "shared":
        value = ValueHead(policy.model.config.hidden_size, 0)
    elif settings.has_critic:
        value = open_trainable_classifier(reward_files(task.models), None, 0).module
    ids = task.prompt_ids()
    prompts = EncodedPrompts([Prompt(f"p{i}", ()) for i in range(len(ids))], ids, 0)
    train = TrainSettings(
        learning_rate=task.learning_rate, schedule="constant", warmup=0.0, token_budget=task.token_budget
    )
    strategy, phase = build(device="cpu"), Phase()
    trainer = Trainer(
        ActorCritic(policy.module, value),
        ppo_loss(settings, 1.0, phase),
        train,
        strategy,
        total=task.updates * (task.turns + 1),
        seed=0,
        parts=("policy.", "value.") if settings.has_critic else (),
    )
    learner = Learner(trainer, reference.module, settings, phase)
    sampler = Sampler(
        policy.model,
        policy.chat,
        SamplingSettings(samples=samples, max_new_tokens=task.new),
        NoiseKey(0, "ppo"),
        reward=reward,
        token_budget=task.token_budget,
    )
    stand, clock = Stand(), Clock()
    generate, made = sampler.engine.generate, []
    register_optimizer_step_post_hook(lambda *_: made.append(1))

    def timed(*arguments: Any, **options: Any) -> Any:
        with clock("generation"):
            return generate(*arguments, **options)

    sampler.engine.generate = timed  # type: ignore[method-assign]

    def iteration(number: int) -> dict[str, Any]:
        made.clear()
        with stand.measure() as spent:
            begin = time.perf_counter()
            rollout = sampler.sample(prompts, iteration=number, ranks=strategy)
            targets = learner.targets(rollout.groups([s.scores["proxy"] for s in rollout.samples]), 0.05, number)
            clock.add("scoring", time.perf_counter() - begin - clock.seconds["generation"])
            with clock("updates"):
                learner.optimise(targets, 0.05, number)
        answers = [len(s.ids) for s in rollout.samples]
        own = [answers[i : i + samples] for i in range(0, len(answers), samples)]
        return {
            **spent.rates(per_turn),
            "seconds": clock.read(spent.wall),
            "tokens": sum(answers),
            "updates": len(made),
            "operations": task.operations([len(p) for p in ids], own if samples > 1 else answers),
        }

    ready = probe(task, trainer, reward.model)
    iteration(0)
    stand.answer(**ready)
    number = 1
    while stand.wait():
        stand.answer(**iteration(number))
        number += 1


def main(task: Task) -> None:
    settings = PpoSettings(
        epochs=task.epochs,
        minibatch=task.minibatch,
        value_coefficient=0.1,
        critic=CriticSettings(start="shared" if task.shared_trunk else "reward"),
    )
    run(task, settings, samples=1, per_turn=task.episodes)


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
