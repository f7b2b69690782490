"""Our side of the RLOO benchmark: PPO's parts with `advantage: rloo`, that is, without a critic."""

from __future__ import annotations

import json
import sys

from pipeline.train.ppo_settings import PpoSettings
from tests.benchmarks.ppo_ours import run
from tests.benchmarks.rloo import Task


def main(task: Task) -> None:
    settings = PpoSettings(advantage="rloo", epochs=1, minibatch=task.minibatch)
    run(task, settings, samples=task.samples, per_turn=task.completions)


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
