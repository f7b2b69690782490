"""Our side of the SFT benchmark: the project's own loop on the core."""

from __future__ import annotations

import json
import sys
import time

from tests.benchmarks.common import THREADS, Stand, peak_mb
from tests.benchmarks.sft import Task


def main(task: Task) -> None:
    import torch

    from pipeline.data.forest import Group, Segment
    from pipeline.flow import heap
    from pipeline.llama.heads import PolicyModel
    from pipeline.llama.modeling import LlamaForCausalLM
    from pipeline.train.batches import weigh_tokens
    from pipeline.train.loop import Trainer
    from pipeline.train.objectives import next_token
    from pipeline.train.settings import TrainSettings
    from pipeline.train.strategy import build

    heap.keep_freed()  # as every worker of the project does
    torch.set_num_threads(THREADS)
    source = task.model()
    model = LlamaForCausalLM(source.config)
    model.load_state_dict(source.state_dict())
    del source
    groups: list[Group] = [[Segment(ids, weights=[0.0] + [1.0] * (len(ids) - 1))] for ids in task.records()]
    settings = TrainSettings(learning_rate=1e-4, token_budget=task.token_budget, precision=task.precision)
    updates = len(groups) // task.batch
    trainer = Trainer(PolicyModel(model), next_token, settings, build(device="cpu"), total=updates, seed=0)
    stand = Stand()
    start_mb = peak_mb()

    def steps(number: int) -> tuple[int, float]:
        tokens, loss = 0, 0.0
        for k in range(number * task.steps, (number + 1) * task.steps):
            batch = groups[k * task.batch : (k + 1) * task.batch]
            figures = trainer.step(batch, weigh_tokens(batch))
            tokens += int(figures["tokens"])
            loss = loss or figures["loss"]
        return tokens, loss

    _, first = steps(0)
    stand.answer(start_mb=start_mb, first_loss=first)
    number = 1
    while stand.wait():
        begin = time.perf_counter()
        tokens, _ = steps(number)
        stand.answer(rate=tokens / (time.perf_counter() - begin), peak_mb=peak_mb())
        number += 1


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
