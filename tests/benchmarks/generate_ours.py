"""Our side of the sampling benchmark: the native engine, as rollouts use it."""

from __future__ import annotations

import json
import sys

from tests.benchmarks.common import THREADS, Stand
from tests.benchmarks.generate import Task
from tests.benchmarks.shapes import STOP, policy_files

GREEDY = 8  # prompts and tokens that are compared before the first turn


def main(task: Task) -> None:
    import torch

    from pipeline.flow import heap
    from pipeline.llama.open import open_policy
    from pipeline.rollout.engine import SamplingSettings
    from pipeline.rollout.native import NativeEngine
    from pipeline.rollout.noise import NoiseKey

    heap.keep_freed()  # as every worker of the project does
    torch.set_num_threads(THREADS)
    model = open_policy(policy_files(task.models)).model
    engine = NativeEngine(model, (STOP,) if task.stops else (), pad_id=0, rows=task.batch)
    prompts = task.prompt_ids()
    settings = SamplingSettings(max_new_tokens=task.new, samples=1 if task.copies else task.samples)
    likeliest = SamplingSettings(temperature=0.0, min_new_tokens=GREEDY, max_new_tokens=GREEDY + 1)  # but the stop
    greedy = NativeEngine(model, (STOP,), pad_id=0).generate(prompts[:GREEDY], likeliest, NoiseKey(0, "greedy"))
    stand = Stand()

    def turn(number: int) -> dict[str, float]:
        with stand.measure() as time:
            groups = engine.generate(prompts, settings, NoiseKey(0, "benchmark", number))
        lengths = [[len(g.ids) for g in group] for group in groups]
        tokens = sum(map(sum, lengths))
        operations = sum(task.sampling(len(p), own) for p, own in zip(prompts, lengths, strict=True))
        return {**time.rates(tokens), "tokens": tokens, "operations": operations}

    turn(0)
    once = {tuple(p): g[0].ids[:GREEDY] for p, g in zip(prompts, greedy, strict=False)}  # copies count once
    stand.answer(greedy=[i for ids in once.values() for i in ids])
    number = 1
    while stand.wait():
        stand.answer(**turn(number))
        number += 1


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
